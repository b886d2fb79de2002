"""How a batch is dealt into optimizer steps, and what is told of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contract.config import ObjectiveConfig
from services.trainer.megatron.batching import Row
from services.trainer.update import parts, summary


def batch(groups: int, samples: int = 2) -> list[list[Row]]:
    """Every row says which group it is of: its only token."""
    return [[Row(token_ids=[g], prompt_length=1, loss_mask=[]) for _ in range(samples)] for g in range(groups)]


def dealt(groups: int, seed: str = "0/1", **options: int) -> list[list[int]]:
    return [[row.token_ids[0] for row in part] for part in parts(batch(groups), ObjectiveConfig(**options), seed)]


def test_one_step_is_the_batch_as_it_came() -> None:
    assert dealt(3) == [[0, 0, 1, 1, 2, 2]]
    assert dealt(3, epochs=2) == [[0, 0, 1, 1, 2, 2]] * 2


@given(size=st.integers(1, 4), minibatches=st.integers(1, 4), epochs=st.integers(1, 3), seed=st.text(max_size=5))
def test_every_pass_has_every_group_once_and_whole(size: int, minibatches: int, epochs: int, seed: str) -> None:
    groups = size * minibatches
    found = dealt(groups, seed, epochs=epochs, minibatches=minibatches)
    assert len(found) == epochs * minibatches
    for epoch in range(epochs):
        one_pass = found[epoch * minibatches : (epoch + 1) * minibatches]
        assert all(len(part) == 2 * size and part[::2] == part[1::2] for part in one_pass)
        assert sorted(g for part in one_pass for g in part[::2]) == list(range(groups))


def test_the_order_depends_on_the_seed_and_the_pass_alone() -> None:
    assert dealt(8, "0/1", minibatches=4, epochs=2) == dealt(8, "0/1", minibatches=4, epochs=2)
    assert dealt(8, "0/1", minibatches=4) != dealt(8, "0/2", minibatches=4)
    first, second = dealt(8, minibatches=4, epochs=2)[:4], dealt(8, minibatches=4, epochs=2)[4:]
    assert first != second


def step(tokens: float, **figures: float) -> dict[str, float]:
    base = {"tokens": 2 * tokens, "trained_tokens": tokens, "rows": 4.0, "rows_trained": 3.0, "seconds": 1.0}
    return base | {"loss": 1.0, "grad_norm": 2.0, "padding": 0.0} | figures


def test_one_step_is_told_as_it_is() -> None:
    assert summary([step(5, mismatch_k3=0.25)]) == step(5, mismatch_k3=0.25)


def test_several_steps_are_added_up_or_averaged() -> None:
    found = summary([step(10, loss=1.0, mismatch_k3=1.0), step(30, loss=2.0, mismatch_k3=3.0)])
    assert (found["tokens"], found["trained_tokens"], found["rows"], found["seconds"]) == (80, 40, 8, 2)
    assert (found["loss"], found["grad_norm"]) == (1.5, 2.0)
    assert found["mismatch_k3"] == pytest.approx(2.5)
    assert found["optimizer_steps"] == 2


def test_a_step_without_anything_to_learn_tells_nothing_of_the_tokens() -> None:
    assert summary([step(0), step(10, mismatch_k3=1.0)])["mismatch_k3"] == 1.0
    assert "mismatch_k3" not in summary([step(0), step(0)])
    assert summary([step(0, microbatches=1.0), step(0, microbatches=3.0)])["microbatches"] == 2.0
