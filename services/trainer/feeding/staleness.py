"""How stale what was trained on was, in policies between the one that wrote it and the one that learned from it."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from services.trainer.durable.ledger import Ledger
from services.trainer.feeding.collect import CompleteGroup, versions_of


def staleness_metrics(groups: list[CompleteGroup], ledger: Ledger, bound: int) -> dict[str, Any]:
    """Of the trajectories in which the model wrote something: mean, greatest, and how many there were of each staleness.

    `staleness/histogram` has a count for each staleness from 0 to `bound`. `staleness/over` counts those above the bound and those
    of policies that the ledger does not know any more; `Batches` lets no such group through, so it is 0 or there is a fault.
    """
    written = [versions for group in groups for t in group.trajectories if (versions := versions_of(t))]
    found = [ledger.staleness(versions) for versions in written]
    known = [staleness for staleness in found if staleness is not None]
    return {
        "staleness/mean": fmean(known or [0]),
        "staleness/max": float(max(known, default=0)),
        "staleness/over": float(sum(staleness is None or staleness > bound for staleness in found)),
        "staleness/histogram": [known.count(n) for n in range(bound + 1)],
    }
