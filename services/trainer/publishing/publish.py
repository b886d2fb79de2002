"""A policy version goes out: over the volume, or pushed straight into the engines; then it is current.

Over the volume in two phases: `staged` is set when the version lies there whole; every engine verifies it while it goes on
serving; when all live engines have it (or the grace ran out) `current` is set, and each engine swaps on its own. An engine that
was late takes no new group until it has caught up, so a slow one costs throughput and never correctness.

With `weights.transport = "collective"` a version is pushed (`collective.py`) and written to the volume after that:

| the push        | the version is written to the volume                  | current is set               |
|-----------------|-------------------------------------------------------|------------------------------|
| reached all     | if it is the `volume_every`th since the last one,     | when all engines have it     |
|                 | for a checkpoint, or when an engine turns up without  |                              |
|                 | it (it was starting, or was started anew)             |                              |
| failed, or      | at once                                               | as over the volume: the      |
| nobody serves   |                                                       | engines load it from there   |

So the lead keeps a copy of the last pushed version in memory (`buckets.py`) for as long as the volume has none.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from services.contract.config import Config
from services.contract.policy import PolicyBoard, PolicyVersion
from services.contract.weights import (
    WeightsError,
    Write,
    collect_garbage,
    publish,
    published_versions,
    verify,
    version_folder,
)
from services.trainer.durable.room import pause, when_there_is_room
from services.trainer.publishing.buckets import Bucket, all_tensors, fill_buckets
from services.trainer.publishing.collective import Pusher, PushFailed, PushTimes
from services.trainer.publishing.hf_folder import write_hf_folder

logger = logging.getLogger("trainer")

Export = Callable[[], Iterator[tuple[str, Tensor]]]
"""Begins a pass over the policy's weights: (Hugging Face name, whole tensor). A second call begins another."""
POLL_S = 0.2
LOOK_FOR_NEED_S = 1.0


@dataclass
class Kept:
    """A pushed version that is not on the volume yet."""

    version: int
    parent: int
    buckets: list[Bucket]


class Publisher:
    """Lives on the lead rank; the other ranks only take part in gathering the tensors."""

    def __init__(self, config: Config, board: PolicyBoard, check_stop: Callable[[], None]) -> None:
        self.config, self.board, self.check_stop = config, board, check_stop
        self.root = config.weights_folder
        self._pusher = Pusher(config, board, check_stop) if config.weights.transport == "collective" else None
        self._kept: Kept | None = None
        self.last_push: PushTimes | None = None
        self._pushed_since = 0
        """Versions that went out since one was written to the volume."""
        self._look_again = 0.0

    def announce_start(self) -> None:
        """Version 0 is the starting checkpoint itself, where `prepare` left it."""
        self.board.commit(PolicyVersion(0, str(self.config.model_path)))

    def serves(self, version: int) -> bool:
        """Whether engines can load `version`: it is current, and its folder is there and whole."""
        current = self.board.current()
        if current is None or current.version != version or not Path(current.path).exists():
            return False
        try:
            if Path(current.path).parent == self.root:  # the starting model has no manifest
                verify(Path(current.path))
        except WeightsError as error:
            logger.warning("version %d is published anew under the next number: %s", version, error)
            return False
        return True

    def next_version(self) -> int:
        """Above everything ever published: after a crash, versions beyond the checkpoint must not be published again."""
        current = self.board.current()
        taken = [current.version if current else 0, self.board.pushes.last_version()]
        return 1 + max([*taken, *published_versions(self.root)])

    def publish(self, version: int, parent: int, export: Export) -> None:
        """Bring the version to the engines and make it current. Raises NoSpace when the volume stays full."""
        if self._pusher is None:
            self._through_volume(version, parent, export)
            return
        weights = self.config.weights
        buckets = fill_buckets(export(), getattr(torch, weights.dtype), weights.bucket_bytes)
        try:
            self.last_push = self._pusher.push(version, buckets, lambda: self._commit(version, pushed=True))
        except PushFailed as error:
            logger.warning("version %d goes out over the volume, for its push failed: %s", version, error)
            self._kept = None
            self._through_volume(version, parent, lambda: all_tensors(buckets))
        else:
            self._kept = Kept(version, parent, buckets)
            self._pushed_since += 1
            if self._pushed_since >= weights.volume_every:
                self.put_on_volume()

    def _through_volume(self, version: int, parent: int, export: Export) -> None:
        self._write(version, parent, export)
        self.board.stage(self._policy(version))
        self._wait_until_staged(version)
        self._commit(version)
        collect_garbage(self.root, self.config.weights.keep_last, self._in_use())

    def _commit(self, version: int, pushed: bool = False) -> None:
        self.board.commit(self._policy(version, pushed))

    def _policy(self, version: int, pushed: bool = False) -> PolicyVersion:
        return PolicyVersion(version, str(version_folder(self.root, version)), pushed)

    def close(self) -> None:
        """Leave the group with the engines."""
        if self._pusher:
            self._pusher.close()

    # -- the volume ----------------------------------------------------------------------------------------------------

    def put_on_volume(self) -> None:
        """Write the last pushed version there, unless it is there already."""
        if self._kept:
            kept, self._kept = self._kept, None
            try:
                self._write(kept.version, kept.parent, lambda: all_tensors(kept.buckets))
            except BaseException:
                self._kept = kept
                raise
            collect_garbage(self.root, self.config.weights.keep_last, self._in_use())

    def wait(self) -> None:
        """To be called wherever the lead waits: engines that came too late for the last push get it from the volume."""
        self.check_stop()
        if self._kept and time.monotonic() > self._look_again:
            self._look_again = time.monotonic() + LOOK_FOR_NEED_S
            if late := self._without(self._kept.version):
                logger.info("version %d is written to the volume for %s", self._kept.version, ", ".join(late))
                self.put_on_volume()

    def _without(self, version: int) -> list[str]:
        """Engines that do not have the version and are not just about to say that they do."""
        late = ("loading", "stale")
        return [e.engine_id for e in self.board.live_engines() if e.version < version and e.state in late]

    def _write(self, version: int, parent: int, export: Export) -> Path:
        model, dtype = self.config.model_path, self.config.weights.dtype
        path = self._patiently(version, parent, lambda folder: write_hf_folder(folder, model, export(), dtype))
        self._pushed_since = 0
        return path

    def _patiently(self, version: int, parent: int, write: Write) -> Path:
        needed = sum(f.stat().st_size for f in self.config.model_path.glob("*.safetensors"))
        return when_there_is_room(lambda: publish(self.root, version, parent, write, bytes_needed=needed), self._wait_for_room)

    def _wait_for_room(self, told: str) -> None:
        logger.warning(told)
        collect_garbage(self.root, 1, self._in_use())
        pause(self.check_stop)

    def _wait_until_staged(self, version: int) -> None:
        deadline = time.monotonic() + self.config.weights.staging_grace_s
        told: set[str] = set()
        while waiting := [e for e in self.board.live_engines() if e.state != "loading" and e.staged < version]:
            for engine in waiting:
                if engine.trouble and engine.trouble not in told:
                    told.add(engine.trouble)
                    logger.warning("engine %s cannot use %s", engine.engine_id, engine.trouble)
            if time.monotonic() > deadline:
                names = ", ".join(engine.engine_id for engine in waiting)
                logger.warning("version %d goes current although %s did not verify it in time", version, names)
                return
            self.check_stop()
            time.sleep(POLL_S)

    def _in_use(self) -> list[int]:
        return [version for engine in self.board.live_engines() for version in (engine.version, *engine.reading)]
