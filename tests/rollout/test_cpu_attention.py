"""The quick attention against the textbook's: softmax(QKᵀ·scale) V, position by position."""

from __future__ import annotations

import math

import torch

from services.rollout.cpu_attention import _decode, _extend, _ordinary

HEADS, KV_HEADS, SIZE, SLOTS, POSITIONS = 6, 2, 8, 96, 16
OPTIONS = {"scaling": 1 / math.sqrt(SIZE), "enable_gqa": True, "causal": True}


def make_cache() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values, and a table whose requests lie scattered in the slots."""
    torch.manual_seed(0)
    keys, values = torch.randn(SLOTS, KV_HEADS, SIZE), torch.randn(SLOTS, KV_HEADS, SIZE)
    return keys, values, torch.randperm(SLOTS)[: 5 * POSITIONS].view(5, POSITIONS).int()


def textbook(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """One position's query [heads, head] over the places it may see."""
    out = []
    for head in range(HEADS):
        k, v = keys[places.long(), head // (HEADS // KV_HEADS)], values[places.long(), head // (HEADS // KV_HEADS)]
        out.append(torch.softmax(k @ query[head] * OPTIONS["scaling"], 0) @ v)
    return torch.stack(out)


def test_decoding_attends_to_the_requests_own_positions() -> None:
    keys, values, table = make_cache()
    query, requests, lengths = torch.randn(3, HEADS, SIZE), [4, 0, 2], [16, 1, 7]
    output = _decode(query, torch.empty_like(query), keys, values, table, requests, lengths, OPTIONS)
    for row, (request, length) in enumerate(zip(requests, lengths, strict=True)):
        assert torch.allclose(output[row], textbook(query[row], keys, values, table[request, :length]), atol=1e-5)


def test_extending_attends_to_the_prefix_and_to_nothing_that_comes_later() -> None:
    keys, values, table = make_cache()
    requests, lengths, prefixes = [1, 3, 0], [9, 5, 12], [6, 0, 11]
    query = torch.randn(sum(lengths) - sum(prefixes), HEADS, SIZE)
    output = _extend(query, torch.empty_like(query), keys, values, table, requests, lengths, prefixes, OPTIONS)
    row = 0
    for request, length, prefix in zip(requests, lengths, prefixes, strict=True):
        for position in range(prefix, length):
            expected = textbook(query[row], keys, values, table[request, : position + 1])
            assert torch.allclose(output[row], expected, atol=1e-5)
            row += 1
    assert row == len(query)


def test_whatever_is_out_of_the_ordinary_is_left_to_sglang() -> None:
    query, keys = torch.empty(1, HEADS, SIZE), torch.empty(SLOTS, KV_HEADS, SIZE)
    plain = OPTIONS | {"is_cross_attn": False, "sliding_window_size": None}
    assert _ordinary(query, keys, (None,), plain)
    assert not _ordinary(query, keys, (None,), plain | {"sliding_window_size": 128})
    assert not _ordinary(query, keys, (None,), plain | {"is_cross_attn": True})
    assert not _ordinary(query, keys, (torch.ones(1),), plain)
    assert not _ordinary(query, keys.bfloat16(), (None,), plain)
