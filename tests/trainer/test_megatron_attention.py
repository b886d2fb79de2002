"""Attention over packed sequences against the written-out formula."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from services.trainer.megatron.attention import PackedAttention

LENGTHS = [5, 1, 7]
HEADS, KV_HEADS, DIM = 4, 2, 8


def attention(**config: Any) -> PackedAttention:
    return PackedAttention(SimpleNamespace(**{"context_parallel_size": 1, "attention_dropout": 0.0} | config), 1)


def packed(lengths: list[int]) -> SimpleNamespace:
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return SimpleNamespace(cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths))


def inputs() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(sum(LENGTHS), heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One sequence: softmax of the scaled causal scores, key and value heads shared by their query heads."""
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / DIM**0.5
    future = torch.ones_like(scores[0]).triu(1).bool()
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), value).flatten(1)


def test_each_sequence_is_attended_to_by_itself() -> None:
    query, key, value = inputs()
    found = attention()(query, key, value, None, packed_seq_params=packed(LENGTHS))
    parts = zip(*(x.split(LENGTHS) for x in (query, key, value)), strict=True)
    torch.testing.assert_close(found, torch.cat([written_out(*part) for part in parts]))


def test_no_gradient_crosses_from_one_sequence_to_another() -> None:
    query, key, value = inputs()
    found = attention()(query, key, value, None, packed_seq_params=packed(LENGTHS))
    found[: LENGTHS[0]].sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad is not None
        assert not tensor.grad[LENGTHS[0] :].any()
    assert value.grad is not None and value.grad[: LENGTHS[0]].any()


def test_what_it_does_not_do_is_refused() -> None:
    query, key, value = (x.detach() for x in inputs())
    with pytest.raises(ValueError, match="pass packed_seq_params and no mask"):
        attention()(query, key, value, None)
    with pytest.raises(ValueError, match="pass packed_seq_params and no mask"):
        attention()(query, key, value, torch.ones(1), packed_seq_params=packed(LENGTHS))
    with pytest.raises(ValueError, match="no context parallelism and no dropout"):
        attention(context_parallel_size=2)
