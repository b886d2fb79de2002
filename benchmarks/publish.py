"""Publishing a policy version: onto the volume, into the engines, and for how long that keeps them from decoding.

`volume`      bytes/s of a published version, against a plain safetensors file of the same tensors and one fsync
`collective`  bytes/s of a push into real engines, against `dist.broadcast` of the same buckets to as many plain processes
`pause`       how much of a whole update real SGLang stands still, by either transport
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.publish_fleet import BUCKET_BYTES, measure_pause, measure_push
from services.contract import weights
from services.contract.files import sync
from services.trainer.publishing.buckets import fill_buckets
from services.trainer.publishing.hf_folder import write_hf_folder

ROUNDS, ENGINES = 5, 2


def read_tensors(model: Path) -> dict[str, Tensor]:
    return {name: t.float() for file in sorted(model.glob("*.safetensors")) for name, t in load_file(file).items()}


# -- volume ----------------------------------------------------------------------------------------------------------------


def run_volume(model: Path, folder: Path, rounds: int) -> None:
    tensors = read_tensors(model)
    size = sum(t.nbytes for t in tensors.values())
    root = folder / "weights"
    versions = iter(range(1, 1000))

    def plain() -> None:
        path = folder / "plain.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        sync(path)

    def published() -> None:
        version = next(versions)
        write = lambda target: write_hf_folder(target, model, iter(tensors.items()), "float32")  # noqa: E731
        weights.publish(root, version, version - 1, write)

    rates: dict[str, list[float]] = {"plain": [], "published": []}
    for number in range(rounds):
        for name, work in [("plain", plain), ("published", published)][:: 1 if number % 2 else -1]:
            rates[name].append(size / timed(work) / 1e9)
            shutil.rmtree(root, ignore_errors=True)
            (folder / "plain.safetensors").unlink(missing_ok=True)
        print(f"round {number + 1}: plain {rates['plain'][-1]:.2f} GB/s, published {rates['published'][-1]:.2f} GB/s", flush=True)
    plain_rate, rate = statistics.median(rates["plain"]), statistics.median(rates["published"])
    print(f"{size / 1e9:.2f} GB published at {rate:.2f} GB/s, hashed and synced: {rate / plain_rate:.2f} x save_file and fsync")


def timed(work: Callable[[], None]) -> float:
    os.sync()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# -- collective ------------------------------------------------------------------------------------------------------------


def run_collective(model: Path, folder: Path, rounds: int) -> None:
    buckets = fill_buckets(read_tensors(model).items(), torch.float32, BUCKET_BYTES)
    sizes = [bucket.flat.numel() for bucket in buckets]
    plain = broadcast_rate([bucket.flat for bucket in buckets], rounds)
    print(f"dist.broadcast to {ENGINES} processes: {plain:.2f} GB/s", flush=True)
    seconds = asyncio.run(measure_push(model, folder, rounds, ENGINES))
    rate = sum(sizes) / statistics.median(seconds["pushed"]) / 1e9
    whole = sum(sizes) / statistics.median(seconds["paused"]) / 1e9
    size = f"{sum(sizes) / 1e9:.2f} GB"
    print(f"{size} pushed into {ENGINES} engines, loaded and checked: {rate:.2f} GB/s, {rate / plain:.2f} x dist.broadcast")
    print(f"from the pause to the resume: {whole:.2f} GB/s, {whole / plain:.2f} x dist.broadcast")


def broadcast_rate(flats: list[Tensor], rounds: int) -> float:
    """GB/s of gloo's broadcast from this process to ENGINES others, all buckets, the median of the rounds."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=300))  # type: ignore[attr-defined]
    sizes = [str(flat.numel()) for flat in flats]
    receive = [sys.executable, "-m", "benchmarks.publish", "receive", str(store.port), str(rounds)]
    others = [subprocess.Popen([*receive, str(rank), *sizes]) for rank in range(1, ENGINES + 1)]
    dist.init_process_group("gloo", store=store, rank=0, world_size=ENGINES + 1)
    seconds = []
    for _ in range(rounds):
        dist.barrier()
        started = time.perf_counter()
        for flat in flats:
            dist.broadcast(flat, src=0)
        dist.barrier()
        seconds.append(time.perf_counter() - started)
    dist.destroy_process_group()
    for other in others:
        other.wait()
    return sum(flat.numel() for flat in flats) / statistics.median(seconds) / 1e9


def receive(port: int, rounds: int, rank: int, sizes: list[int]) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=300))  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ENGINES + 1)
    for _ in range(rounds):
        dist.barrier()
        for size in sizes:
            dist.broadcast(torch.empty(size, dtype=torch.uint8), src=0)
        dist.barrier()
    dist.destroy_process_group()


# -- pause -----------------------------------------------------------------------------------------------------------------


def run_pause(model: Path, folder: Path, rounds: int) -> None:
    for transport in ("volume", "collective"):
        updates = asyncio.run(measure_pause(model, folder / transport, rounds, transport))
        share = statistics.median(update.paused_s / update.whole_s for update in updates)
        paused = statistics.median(update.paused_s for update in updates)
        print(f"{transport}: engine paused {paused:.2f} s, {share:.0%} of a whole update (budget 20 %)", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["receive"]:
        port, rounds, rank, *sizes = map(int, sys.argv[2:])
        receive(port, rounds, rank, sizes)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["volume", "collective", "pause"])
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder, such as var/data/models/policy")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--folder", type=Path, help="where to write; its disk is what `volume` measures (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run = {"volume": run_volume, "collective": run_collective, "pause": run_pause}[arguments.what]
        run(arguments.model, Path(folder), arguments.rounds)


if __name__ == "__main__":
    main()
