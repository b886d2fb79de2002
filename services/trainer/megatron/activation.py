"""The gated activation of the feed-forward layer, silu(gate) × up (Shazeer 2020), keeping only its input for the gradient.

Megatron's unfused one keeps three more tensors of the layer's largest width, one of them a copy made to add 0. They were half of
what a step keeps; here silu is computed once more instead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class SwiGlu(torch.nn.Module):
    """Takes the place of `activation_func` in Megatron's specification of an MLP: [..., 2 × width] -> [..., width]."""

    def __init__(self, config: Any) -> None:
        super().__init__()

    def forward(self, gate_and_up: Tensor) -> Tensor:
        return _SwiGlu.apply(gate_and_up)  # type: ignore[return-value]

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {}


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gate_and_up,), (gradient,) = ctx.saved_tensors, gradients
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        by_gate, by_up = result.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(gate), out=by_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=by_gate)
        return result
