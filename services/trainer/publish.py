"""A policy version goes out: written on the volume, verified by the engines, made current.

Two phases: `staged` is set when the version lies on the volume whole; every engine verifies it while it goes on serving;
when all live engines have it (or the grace ran out) `current` is set, and each engine swaps on its own. An engine that was
late takes no new group until it has caught up, so a slow one costs throughput and never correctness.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from services.contract.config import Config
from services.contract.policy import PolicyBoard, PolicyVersion
from services.contract.weights import NoSpace, collect_garbage, publish, published_versions

logger = logging.getLogger("trainer")

Tensors = Iterator[tuple[str, torch.Tensor]]
SHARD_BYTES = 2 << 30
COPIED = ("*.json", "*.txt", "*.model", "*.jinja")
"""Files of the starting model that belong to every version: configuration and tokenizer."""
NOT_COPIED = ("model.safetensors.index.json", "manifest.json")
POLL_S = 0.2
FULL_DISK_RETRIES, FULL_DISK_WAIT_S = 10, 30.0


def write_hf_folder(folder: Path, starting_model: Path, tensors: Tensors, dtype: str) -> None:
    """Write a Hugging Face folder: weights as safetensors shards, configuration and tokenizer from the starting model."""
    for pattern in COPIED:
        for path in starting_model.glob(pattern):
            if path.name not in NOT_COPIED:
                shutil.copyfile(path, folder / path.name)
    shards = _write_shards(folder, tensors, getattr(torch, dtype))
    if len(shards) == 1:
        (folder / shards[0][0]).rename(folder / "model.safetensors")
    else:
        _write_index(folder, shards)


def _write_shards(folder: Path, tensors: Tensors, dtype: torch.dtype) -> list[tuple[str, dict[str, int]]]:
    """Shards of about SHARD_BYTES; returns (file name, {tensor name: bytes}) for each."""
    shards: list[tuple[str, dict[str, int]]] = []
    held: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"model-{len(shards) + 1:05d}.safetensors"
        save_file(held, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)  # safetensors writes for the owner only; workers may run as another user
        shards.append((name, {n: t.nbytes for n, t in held.items()}))
        held.clear()

    for name, tensor in tensors:
        held[name] = tensor.to(dtype).contiguous()
        if sum(t.nbytes for t in held.values()) > SHARD_BYTES:
            flush()
    if held:
        flush()
    return shards


def _write_index(folder: Path, shards: list[tuple[str, dict[str, int]]]) -> None:
    weight_map = {name: file for file, sizes in shards for name in sizes}
    total = sum(size for _, sizes in shards for size in sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


class Publisher:
    """Lives on the lead rank; the other ranks only take part in gathering the tensors."""

    def __init__(self, config: Config, board: PolicyBoard, check_stop: Callable[[], None]) -> None:
        self.config, self.board, self.check_stop = config, board, check_stop
        self.root = config.weights_folder

    def announce_start(self) -> None:
        """Version 0 is the starting checkpoint itself, where `prepare` left it."""
        self.board.commit(PolicyVersion(0, str(self.config.model_path)))

    def serves(self, version: int) -> bool:
        """Whether engines can load `version`: it is current, and its folder is there."""
        current = self.board.current()
        return current is not None and current.version == version and Path(current.path).exists()

    def next_version(self) -> int:
        """Above everything ever published: after a crash, versions beyond the checkpoint must not be published again."""
        current = self.board.current()
        return 1 + max([0, current.version if current else 0, *published_versions(self.root)])

    def publish(self, version: int, parent: int, write: Callable[[Path], None]) -> Path:
        """Write the version, let the engines verify it, make it current. Raises NoSpace when the volume stays full."""
        path = self._write_patiently(version, parent, write)
        policy = PolicyVersion(version, str(path))
        self.board.stage(policy)
        self._wait_until_staged(version)
        self.board.commit(policy)
        collect_garbage(self.root, self.config.weights.keep_last, self._in_use())
        return path

    def _write_patiently(self, version: int, parent: int, write: Callable[[Path], None]) -> Path:
        """A full disk is told about once and waited for: somebody may free it, and the run keeps what it has learned."""
        needed = sum(f.stat().st_size for f in self.config.model_path.glob("*.safetensors"))
        for attempt in range(1, FULL_DISK_RETRIES + 1):
            try:
                return publish(self.root, version, parent, write, bytes_needed=needed)
            except NoSpace as error:
                if attempt == FULL_DISK_RETRIES:
                    raise
                logger.warning("%s; trying again in %.0f s (%d of %d)", error, FULL_DISK_WAIT_S, attempt, FULL_DISK_RETRIES)
                collect_garbage(self.root, 1, self._in_use())
                self._sleep(FULL_DISK_WAIT_S)
        raise AssertionError("unreachable")

    def _wait_until_staged(self, version: int) -> None:
        deadline = time.monotonic() + self.config.weights.staging_grace_s
        while waiting := [e.engine_id for e in self.board.live_engines() if e.state != "loading" and e.staged < version]:
            if time.monotonic() > deadline:
                logger.warning("version %d goes current although %s did not verify it in time", version, ", ".join(waiting))
                return
            self._sleep(POLL_S)

    def _in_use(self) -> list[int]:
        return [version for engine in self.board.live_engines() for version in (engine.version, *engine.reading)]

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.check_stop()
            time.sleep(min(left, 1.0))
