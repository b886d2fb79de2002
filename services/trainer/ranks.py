"""One rank leads: it alone talks to Redis and writes files. What it decides, every rank learns, errors included."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


class StopRequested(Exception):
    """SIGTERM or Ctrl-C arrived: save what was learned and leave."""


def is_lead() -> bool:
    return dist.get_rank() == 0


def on_lead(work: Callable[[], T]) -> T:
    """Run `work` on the lead and return its result on every rank; raise its error on every rank."""
    if dist.get_world_size() == 1:
        return work()
    outcome: list = [None, None]
    if is_lead():
        try:
            outcome[0] = work()
        except Exception as error:  # noqa: BLE001 - the other ranks must not be left waiting
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
