"""Core attention on PyTorch's scaled-dot-product attention: causal, grouped-query, the same code on CPU and GPU.

Megatron's own unfused attention writes out the [heads, length, length] scores; this one does not, which is most of the
memory and some of the time. Left out: packed sequences, context parallelism, biases, dropout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class SdpaCoreAttention(torch.nn.Module):
    """Takes the place of `core_attention` in Megatron's local layer spec."""

    def __init__(self, config: Any, layer_number: int, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        if config.context_parallel_size != 1 or config.attention_dropout:
            raise ValueError("this attention has no context parallelism and no dropout: set both to none")
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *_: Any, **rest: Any) -> Tensor:
        """query [length, batch, heads, dim], key and value [length, batch, kv_heads, dim] -> [length, batch, heads * dim].

        Rows are padded on the right, where a causal mask keeps padding from being seen; so no other mask is taken.
        """
        if attention_mask is not None or rest.get("packed_seq_params") is not None:
            raise ValueError("this attention is causal over right-padded rows: pass no mask and no packed sequences")
        length, batch = query.shape[:2]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True)
        return mixed.permute(2, 0, 1, 3).reshape(length, batch, -1)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {}
