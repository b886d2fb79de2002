"""What a ledger lists as consumed stays consumed, and what it calls stale depends on weights, not on their numbers."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.durable.ledger import Ledger, Stage


@pytest.mark.parametrize(
    ("stage", "step", "goes_on"),
    [
        ("evaluate_start", 0, "evaluate_start"),
        ("warm_start", 0, "warm_start"),
        ("evaluate_warm", 0, "evaluate_warm"),
        ("grpo", 3, "grpo"),
        ("evaluate_final", 3, "grpo"),
        ("evaluate_final", 5, "evaluate_final"),
        ("done", 3, "grpo"),
        ("done", 5, "done"),
        ("done", 9, "done"),
    ],
)
def test_a_run_whose_steps_were_raised_goes_on_where_it_ended(stage: Stage, step: int, goes_on: Stage) -> None:
    ledger = Ledger(stage=stage, step=step)
    assert ledger.reopen(steps=5) == (stage != goes_on)
    assert (ledger.stage, ledger.step) == (goes_on, step)


def test_a_ledger_written_before_there_were_references_is_read() -> None:
    old = msgspec.json.encode({"stage": "grpo", "step": 3, "version": 4, "next_index": 9})
    assert msgspec.json.decode(old, type=Ledger).reference_step == 0


@given(st.permutations(range(12)))
def test_consuming_in_any_order_moves_the_cursor_to_the_first_gap(order: list[int]) -> None:
    ledger = Ledger()
    for position, index in enumerate(order):
        ledger.consume([index])
        consumed = set(order[: position + 1])
        first_gap = next(i for i in range(13) if i not in consumed)
        assert ledger.next_index == first_gap
        assert all(ledger.is_consumed(i) == (i in consumed) for i in range(12))
        assert len(ledger.consumed_beyond) == len(consumed) - first_gap


def published(ledger: Ledger, version: int, kept: int = 3) -> Ledger:
    """A step was learned and published under this number."""
    ledger.unpublished = True
    ledger.publish(version, kept)
    return ledger


def test_staleness_counts_policies() -> None:
    ledger = published(published(Ledger(), 1), 2)
    assert [ledger.staleness([version]) for version in (2, 1, 0)] == [0, 1, 2]
    assert ledger.staleness([2, 0, 1]) == 2 and ledger.staleness([]) == 0


def test_weights_that_a_restart_publishes_again_are_not_newer() -> None:
    ledger = published(Ledger(), 1)
    ledger.publish(4, 3)
    assert [ledger.staleness([version]) for version in (4, 1, 0)] == [0, 0, 1]


def test_a_number_that_a_crash_left_unused_makes_nothing_stale() -> None:
    ledger = published(published(Ledger(), 1), 5)
    assert ledger.staleness([1]) == 1


def test_policies_that_a_crash_lost_or_that_are_too_old_have_no_staleness() -> None:
    ledger = published(Ledger(), 1)
    ledger.publish(4, 3)
    assert ledger.staleness([4, 3]) is None, "3 came after 1 and is lost"
    for version in (5, 6, 7):
        published(ledger, version)
    assert ledger.staleness([4]) is None


@pytest.mark.parametrize("version", [0, 7])
def test_a_ledger_written_before_there_was_a_lineage_knows_its_own_policy(version: int) -> None:
    ledger = msgspec.json.decode(msgspec.json.encode({"stage": "grpo", "version": version}), type=Ledger)
    assert ledger.staleness([version]) == 0 and ledger.staleness([version + 1]) is None
    assert ledger.journal_bytes is None and ledger.order == ""


def test_a_ledger_comes_back_as_it_was() -> None:
    ledger = published(Ledger(journal_bytes=12, order="a", samples=4), 3)
    assert msgspec.json.decode(msgspec.json.encode(ledger), type=Ledger) == ledger
