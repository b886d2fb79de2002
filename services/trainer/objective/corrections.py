"""Correction for the gap between the engine that sampled the tokens and the trainer that learns from them.

Both compute the same policy, but not to the last bit, and under staleness not even the same policy. Each token's loss is
multiplied by a weight made from the probability ratio trainer/engine. TIS (truncated importance sampling, Yao et al.
2025) bounds the ratio; IcePop (Ling team 2025) drops tokens whose ratio leaves the range.
Observed tokens have no engine log-prob (0 stands there), so every function takes the mask and puts 0 in their place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from services.trainer.objective.losses import masked


def truncated_importance(train_logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    """TIS: the ratio clamped to [low, high], 0 at observed tokens. Same shape as the arguments; no gradient."""
    return masked(_ratio(train_logprobs, engine_logprobs, mask).clamp(low, high), mask)


def icepop(train_logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor, low: float, high: float) -> Tensor:
    """IcePop: the ratio itself inside [low, high], 0 outside it and at observed tokens. Same shape; no gradient."""
    ratio = _ratio(train_logprobs, engine_logprobs, mask)
    inside = (ratio >= low) & (ratio <= high)
    return masked(torch.where(inside, ratio, torch.zeros_like(ratio)), mask)


@dataclass(frozen=True)
class Mismatch:
    """Per token, 0 at observed tokens; same shape as the log-probs. Average over model tokens for a batch figure."""

    ratio: Tensor
    """exp(trainer - engine)."""
    absolute: Tensor
    """|trainer - engine| in nats."""
    k1: Tensor
    """KL(engine ‖ trainer), estimated by engine - trainer: the tokens were sampled by the engine."""
    k3: Tensor
    """The same KL, estimated by ratio - 1 - log ratio, which is never negative."""
    outside: Tensor
    """1.0 where the ratio lies outside [low, high]; both corrections act there."""


def mismatch(train_logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor, low: float, high: float) -> Mismatch:
    """How far trainer and engine lie apart. All tensors of one shape, log-probs in nats."""
    difference = masked((train_logprobs - engine_logprobs).detach(), mask)
    ratio = torch.exp(difference)
    outside = ((ratio < low) | (ratio > high)).to(ratio.dtype)
    return Mismatch(
        ratio=masked(ratio, mask),
        absolute=difference.abs(),
        k1=-difference,
        k3=ratio - 1 - difference,
        outside=masked(outside, mask),
    )


def _ratio(train_logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor) -> Tensor:
    return torch.exp(masked((train_logprobs - engine_logprobs).detach(), mask))
