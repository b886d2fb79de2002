"""Rows into micro-batches."""

from __future__ import annotations

import pytest
import torch

from services.trainer.megatron.batching import Row, filler, micro_batch
from services.trainer.megatron.loss import Totals

CPU = torch.device("cpu")


def make_row(tokens: list[int], prompt: int, mask: list[int], **more: object) -> Row:
    return Row(token_ids=tokens, prompt_length=prompt, loss_mask=mask, **more)  # type: ignore[arg-type]


def test_a_row_is_read_up_to_its_last_model_token() -> None:
    row = make_row([5, 6, 7, 8, 9, 10], prompt=2, mask=[1, 0, 1, 0])
    assert (row.targets, row.input_length) == ([2, 4], 4)
    batch = micro_batch([row], [0], CPU)
    assert (batch.input_ids.tolist(), batch.ends.tolist()) == ([[5, 6, 7, 8]], [0, 4])
    assert batch.positions.tolist() == [1, 3]
    assert batch.targets.tolist() == [7, 9]


def test_rows_lie_behind_each_other_without_padding() -> None:
    long = make_row([1, 2, 3, 4], 1, [1, 1, 1], advantage=2.0, engine_logprobs=[-1.0, -2.0, -3.0], temperature=0.5)
    short = make_row([5, 6, 7], 2, [1], advantage=-1.0, engine_logprobs=[-4.0])
    batch = micro_batch([short, long], [1, 0], CPU)
    assert batch.input_ids.tolist() == [[1, 2, 3, 5, 6]]
    assert (batch.ends.tolist(), batch.longest) == ([0, 3, 5], 3)
    assert batch.positions.tolist() == [0, 1, 2, 4]
    assert batch.targets.tolist() == [2, 3, 4, 7]
    assert batch.temperatures.tolist() == [0.5, 0.5, 0.5, 1.0]
    assert (batch.rows, batch.counts) == ([1, 0], [3, 1])


def test_a_loss_is_told_about_every_model_token() -> None:
    long = make_row([1, 2, 3, 4], 1, [1, 0, 1], advantage=2.0, engine_logprobs=[-1.0, -2.0, -3.0])
    short = make_row([5, 6, 7], 2, [1], advantage=-1.0, engine_logprobs=[-4.0], weight=3.0)
    tokens = micro_batch([long, short], [0, 1], CPU).tokens
    assert tokens.advantages.tolist() == [2, 2, -1]
    assert tokens.rollout_tokens.tolist() == [2, 2, 1]
    assert tokens.row_index.tolist() == [0, 0, 1]
    assert tokens.weights.tolist() == [1, 1, 3]
    assert tokens.engine_logprobs is not None
    assert tokens.engine_logprobs.tolist() == [-1, -3, -4]
    assert tokens.reference_logprobs is None


def test_values_that_every_row_has_reach_the_loss_by_name() -> None:
    first = make_row([1, 2, 3, 4], 1, [1, 0, 1], token_values={"returns": [1.0, 2.0, 3.0], "old_logprobs": [0.0, 0.0, 0.0]})
    second = make_row([5, 6, 7], 2, [1], token_values={"returns": [4.0]})
    values = micro_batch([first, second], [0, 1], CPU).tokens.token_values
    assert {name: tensor.tolist() for name, tensor in values.items()} == {"returns": [1, 3, 4]}


def test_a_filler_counts_for_nothing() -> None:
    batch = filler(CPU)
    assert (batch.rows, batch.counts, batch.input_ids.numel()) == ([], [], 1)
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
        ({"token_values": {"returns": [0.0]}}, "returns has 1 entries for a response of 2 tokens"),
        ({"temperature": 0.0}, "temperature 0.0 is not above 0"),
    ],
)
def test_rows_that_do_not_fit_together_are_refused(change: dict[str, object], reason: str) -> None:
    values: dict[str, object] = {"token_ids": [1, 2, 3], "prompt_length": 1, "loss_mask": [1, 1]}
    with pytest.raises(ValueError, match=reason):
        Row(**(values | change))  # type: ignore[arg-type]
