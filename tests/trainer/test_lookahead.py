"""No more is fed ahead than keeps the trainer busy, and never more than the staleness bound allows."""

from __future__ import annotations

import pytest

from services.trainer.feeding.lookahead import Lookahead


def run(lookahead: Lookahead, batch: int, played_a_step: int, steps: int = 20) -> list[int]:
    """Groups fed ahead after each step, where the rollout plays so many groups while the trainer learns from one batch."""
    finished, seen = 0, []
    for _ in range(steps):
        finished = min(finished + played_a_step, lookahead.groups)
        missing = max(0, batch - finished)  # waited for
        finished = max(0, finished - batch)
        lookahead.note(missing, spare=finished)
        seen.append(lookahead.groups)
    return seen


def test_a_synchronous_run_feeds_nothing_ahead() -> None:
    lookahead = Lookahead(groups_per_step=8, max_staleness=0)
    assert lookahead.groups == 0
    lookahead.note(missing=8, spare=0)
    assert lookahead.groups == 0


@pytest.mark.parametrize("bound", [1, 2, 4])
def test_a_trainer_that_never_waits_has_one_batch_played_ahead(bound: int) -> None:
    assert set(run(Lookahead(8, bound), batch=8, played_a_step=30)) == {8}


@pytest.mark.parametrize("bound", [1, 2, 4])
def test_a_trainer_that_always_waits_has_as_much_played_ahead_as_the_bound_allows(bound: int) -> None:
    seen = run(Lookahead(8, bound), batch=8, played_a_step=5)
    assert seen == sorted(seen) and seen[-1] == bound * 8


def test_what_one_slow_step_added_goes_again() -> None:
    lookahead = Lookahead(8, 4)
    lookahead.note(missing=8, spare=0)
    assert lookahead.groups == 16
    assert run(lookahead, batch=8, played_a_step=30)[-1] == 8
