"""Two ranks that ask the lead for things; each writes down what it was told.

python -m tests.trainer.ranks_worker FOLDER PORT
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from services.contract.weights import NoSpace
from services.trainer.ranks import on_lead, on_lead_with_export

TIMEOUT_S = 2.0


def main() -> None:
    folder, port = Path(sys.argv[1]), sys.argv[2]
    rank = 0 if os.fork() else 1
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT_S))
    (folder / f"rank{rank}.json").write_text(json.dumps(report(rank)))
    dist.destroy_process_group()
    if rank == 0:
        os.wait()


def report(rank: int) -> dict[str, Any]:
    """What each call came to on this rank."""
    return {
        "result": on_lead(lambda: f"of rank {rank}"),
        "error": told(lambda: on_lead(refuse)),
        "late": on_lead(lambda: time.sleep(2 * TIMEOUT_S) or "late"),
        "tried_again": tried_again(),
        "given_up": told(lambda: on_lead_with_export(gather_and_refuse, export)),
        "in_step": sum_up(),
    }


def refuse() -> None:
    raise NoSpace("full")


def export() -> Iterator[float]:
    """Three tensors that both ranks must gather."""
    for _ in range(3):
        yield sum_up()


def gather_and_refuse(begin: Callable[[], Iterator[float]]) -> None:
    """As a disk that fills up after the first tensor."""
    next(begin())
    refuse()


def told(work: Callable[[], Any]) -> str:
    try:
        return f"no error: {work()}"
    except NoSpace as error:
        return str(error)


def sum_up() -> float:
    """A collective that needs both ranks: 2.0."""
    value = torch.ones(1)
    dist.all_reduce(value)
    return float(value)


def tried_again() -> list[list[float]]:
    """As a publication: the ranks gather twice, because the disk was full in the middle of the first time."""
    read: list[list[float]] = []

    def work(begin: Callable[[], Iterator[float]]) -> None:
        read.append([next(begin())])
        read.append(list(begin()))

    on_lead_with_export(work, export)
    return read


if __name__ == "__main__":
    main()
