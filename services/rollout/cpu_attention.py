"""SGLang's attention on a CPU without its detours. What is computed is the same; two costs are left out.

* The KV cache is read by whole rows (`index_select`); SGLang 0.5.23 gathers it number by number, a third of a decoding step.
* After a cached prefix only the new positions attend; SGLang computes every position anew and throws the old ones away,
  which made the second turn of an episode, and every sample of a group but the first, pay for the whole square.

Anything out of the ordinary (cross attention, sliding windows, mixed dtypes) goes SGLang's own way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as attend

UNDERSTOOD = {"scaling", "enable_gqa", "causal"}
"""The options of SGLang's functions that mean something here; the others must be unset."""


def install() -> None:
    """Put both functions in the place of SGLang's, in this process."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend as Backend

    slow_decode, slow_extend = Backend._run_sdpa_forward_decode, Backend._run_sdpa_forward_extend

    def decode(
        self: Any, query: Any, output: Any, k: Any, v: Any, table: Any, requests: Any, lengths: Any, *rest: Any, **options: Any
    ):
        if not _ordinary(query, k, rest, options):
            return slow_decode(self, query, output, k, v, table, requests, lengths, *rest, **options)
        return _decode(query, output, k, v, table, requests.tolist(), lengths.tolist(), options)

    def extend(
        self: Any, query: Any, output: Any, k: Any, v: Any, table: Any, requests: Any, lengths: Any, prefixes: Any, new: Any,
        *rest: Any, **options: Any,
    ):  # fmt: skip
        if not options.get("causal") or not _ordinary(query, k, rest, options):
            return slow_extend(self, query, output, k, v, table, requests, lengths, prefixes, new, *rest, **options)
        return _extend(query, output, k, v, table, requests.tolist(), lengths.tolist(), prefixes.tolist(), options)

    Backend._run_sdpa_forward_decode, Backend._run_sdpa_forward_extend = decode, extend  # type: ignore[method-assign]


def _ordinary(query: torch.Tensor, keys: torch.Tensor, rest: tuple[Any, ...], options: dict[str, Any]) -> bool:
    unknown = {name for name, value in options.items() if value} - UNDERSTOOD
    return not unknown and all(value is None for value in rest) and query.dtype == keys.dtype


def _cached(cache: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[slots, heads, head] at [positions] -> [1, heads, positions, head]."""
    return cache.index_select(0, places).movedim(0, 1)[None]


def _decode(
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    requests: list[int],
    lengths: list[int],
    options: dict[str, Any],
) -> torch.Tensor:
    """One new position a request. query, output: [requests, heads, head]; table: [requests, positions] -> slot."""
    scale, grouped = options.get("scaling"), options.get("enable_gqa", False)
    for row, (request, length) in enumerate(zip(requests, lengths, strict=True)):
        places = table[request, :length]
        keys, values = _cached(k_cache, places), _cached(v_cache, places)
        output[row] = attend(query[row, None, :, None], keys, values, scale=scale, enable_gqa=grouped)[0, :, 0]
    return output


def _extend(
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table: torch.Tensor,
    requests: list[int],
    lengths: list[int],
    prefixes: list[int],
    options: dict[str, Any],
) -> torch.Tensor:
    """Positions [prefix, length) of each request, one request after the other in query and output: [tokens, heads, head]."""
    scale, grouped = options.get("scaling"), options.get("enable_gqa", False)
    start = 0
    for request, length, prefix in zip(requests, lengths, prefixes, strict=True):
        places, end = table[request, :length], start + length - prefix
        keys, values = _cached(k_cache, places), _cached(v_cache, places)
        queries = query[start:end].movedim(0, 1)[None]
        seen = torch.ones(end - start, length, dtype=torch.bool).tril(prefix) if prefix else None
        attended = attend(queries, keys, values, attn_mask=seen, is_causal=not prefix, scale=scale, enable_gqa=grouped)
        output[start:end] = attended[0].movedim(0, 1)
        start = end
    return output
