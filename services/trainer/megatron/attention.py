"""Core attention over packed sequences: causal, grouped-query, never across two sequences.

| where                   | what runs                                                                               |
|-------------------------|-----------------------------------------------------------------------------------------|
| CPU; GPU in float32     | PyTorch's scaled-dot-product attention, one sequence after another                      |
| GPU in bfloat16         | PyTorch's variable-length flash attention, all sequences in one kernel (not run here)   |

None writes out the [heads, length, length] scores, as Megatron's own unfused attention does; it also refuses packed sequences.
Left out: context parallelism, biases, dropout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class PackedAttention(torch.nn.Module):
    """Takes the place of `core_attention` in Megatron's local layer spec."""

    def __init__(self, config: Any, layer_number: int, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        if config.context_parallel_size != 1 or config.attention_dropout:
            raise ValueError("this attention has no context parallelism and no dropout: set both to none")
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *_: Any, **rest: Any) -> Tensor:
        """query [tokens, heads, dim], key and value [tokens, kv_heads, dim] -> [tokens, heads * dim].

        Where sequences begin and end is told by `packed_seq_params` alone, so no mask is taken.
        """
        packed = rest.get("packed_seq_params")
        if attention_mask is not None or packed is None:
            raise ValueError("this attention is causal over packed sequences: pass packed_seq_params and no mask")
        if query.is_cuda and query.dtype != torch.float32:
            return self._flash(query, key, value, packed)
        return self._one_by_one(query, key, value, packed.cu_seqlens_q.diff().tolist())

    def _one_by_one(self, query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
        # split and not slices: the gradient of a slice is as long as the whole batch, once for every sequence.
        sequences = zip(*(x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (query, key, value)), strict=True)
        mixed = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True)
            for q, k, v in sequences
        ]
        return torch.cat([x.squeeze(0).transpose(0, 1).flatten(1) for x in mixed])

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, packed: Any) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        ends, longest = packed.cu_seqlens_q, packed.max_seqlen_q
        causal = (-1, 0)
        mixed = varlen_attn(
            query, key, value, ends, ends, longest, longest, scale=self.softmax_scale, window_size=causal, enable_gqa=True
        )
        return mixed.flatten(1)  # type: ignore[union-attr]

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {}
