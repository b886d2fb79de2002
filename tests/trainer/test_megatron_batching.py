"""Rows into micro-batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.megatron.batching import Row, deal, filler, micro_batch, plan
from services.trainer.megatron.loss import Totals

CPU = torch.device("cpu")


def make_row(tokens: list[int], prompt: int, mask: list[int], **more: object) -> Row:
    return Row(token_ids=tokens, prompt_length=prompt, loss_mask=mask, **more)  # type: ignore[arg-type]


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 5))
def test_every_row_is_dealt_to_one_rank(lengths: list[int], ranks: int) -> None:
    shares = deal(lengths, ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths, default=0)


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 2000))
def test_micro_batches_hold_every_row_within_the_bound(lengths: list[int], bound: int) -> None:
    batches = plan(lengths, bound)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= bound for b in batches)


def test_a_row_is_read_up_to_its_last_model_token() -> None:
    row = make_row([5, 6, 7, 8, 9, 10], prompt=2, mask=[1, 0, 1, 0])
    assert (row.targets, row.input_length) == ([2, 4], 4)
    batch = micro_batch([row], [0], CPU)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8]]
    assert batch.positions.tolist() == [1, 3]
    assert batch.targets.tolist() == [7, 9]


def test_rows_are_padded_right_and_tokens_follow_row_by_row() -> None:
    long = make_row([1, 2, 3, 4], 1, [1, 1, 1], advantage=2.0, engine_logprobs=[-1.0, -2.0, -3.0], temperature=0.5)
    short = make_row([5, 6, 7], 2, [1], advantage=-1.0, engine_logprobs=[-4.0])
    batch = micro_batch([short, long], [1, 0], CPU)
    assert batch.input_ids.tolist() == [[1, 2, 3], [5, 6, 0]]
    assert batch.positions.tolist() == [0, 2, 4, 3]
    assert batch.targets.tolist() == [2, 3, 4, 7]
    assert batch.temperatures.tolist() == [0.5, 0.5, 0.5, 1.0]
    assert batch.tokens.advantages.tolist() == [2, 2, 2, -1]
    assert batch.tokens.rollout_tokens.tolist() == [3, 3, 3, 1]
    assert batch.tokens.engine_logprobs is not None
    assert batch.tokens.engine_logprobs.tolist() == [-1, -2, -3, -4]
    assert batch.tokens.reference_logprobs is None
    assert (batch.rows, batch.counts, batch.read_tokens) == ([1, 0], [3, 1], 5)


def test_a_filler_counts_for_nothing() -> None:
    batch = filler(CPU)
    assert (batch.rows, batch.counts, batch.read_tokens) == ([], [], 0)
    assert batch.positions.numel() == 1


def test_totals_count_rows_that_are_not_computed() -> None:
    rows = [make_row([1, 2, 3], 1, [1, 1], weight=0.5), make_row([1, 2], 1, [0]), make_row([1, 2], 1, [1])]
    assert Totals.of(rows) == Totals(rollouts=3, tokens=3, weight=2.0)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"prompt_length": 0}, "cannot have prompt_length 0"),
        ({"prompt_length": 4}, "cannot have prompt_length 4"),
        ({"loss_mask": [1]}, "loss_mask has 1 entries for a response of 2 tokens"),
        ({"engine_logprobs": [0.0]}, "engine_logprobs has 1 entries"),
        ({"temperature": 0.0}, "temperature 0.0 is not above 0"),
    ],
)
def test_rows_that_do_not_fit_together_are_refused(change: dict[str, object], reason: str) -> None:
    values: dict[str, object] = {"token_ids": [1, 2, 3], "prompt_length": 1, "loss_mask": [1, 1]}
    with pytest.raises(ValueError, match=reason):
        Row(**(values | change))  # type: ignore[arg-type]
