"""The gated activation against the formula as autograd takes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from services.trainer.megatron.activation import SwiGlu
from tests.trainer.plain_torch import saved_bytes


def plain(gate_and_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def test_value_and_gradient_are_those_of_the_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    found, expected = (torch.randn(5, 2, 12, generator=draw.manual_seed(0), dtype=torch.float64).requires_grad_() for _ in "ab")
    weights = torch.randn(5, 2, 6, generator=draw, dtype=torch.float64)
    result = SwiGlu(None)(found)
    torch.testing.assert_close(result, plain(expected))
    (result * weights).sum().backward()
    (plain(expected) * weights).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)


def test_only_the_input_is_kept() -> None:
    given, kept = torch.randn(8, 12, requires_grad=True), []
    with saved_bytes(kept):
        SwiGlu(None)(given)
    assert sum(kept) == given.nbytes
