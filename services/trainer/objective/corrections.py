"""Correction for the gap between the engine that sampled the tokens and the trainer that learns from them.

Both compute the same policy, but not to the last bit, and under staleness not even the same policy. With r the ratio
trainer/engine at `importance_level` (of the token; of the sequence, the product over its tokens; or their geometric mean):

| `importance` | weight of the policy loss       | left out of every term | source                                           |
|--------------|---------------------------------|------------------------|--------------------------------------------------|
| none         | 1                               | nothing                |                                                  |
| tis          | r clamped to [low, high]        | nothing                | truncated importance sampling (Yao et al. 2025)  |
| icepop       | r inside [low, high], 0 outside | nothing                | IcePop (Ling team 2025, arXiv 2510.18855)        |
| mis          | r                               | tokens with r outside  | masked importance sampling (Liu, Li et al. 2025) |

Independent of that, `reject_level` leaves out tokens or rollouts whose ratio at that level lies outside its own bounds, and `veto`
a rollout with any token below a threshold. What is left out still counts in the averages' denominators.
`importance_normalize` divides the weights by their mean over the whole batch (see `mean_weight`).
All tensors are [n]: model tokens of whole rollouts (`packed`), log-probs in nats; no gradient flows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from services.contract.config import ObjectiveConfig
from services.contract.config.objective import Level
from services.trainer.objective.packed import rollout_means, rollout_sums

LOG_RATIO_LIMIT = 20.0
"""A sequence's log-ratios add up; exp of more than this is no weight but an accident."""


@dataclass(frozen=True)
class Correction:
    """What the correction does to each token, [n]."""

    weights: Tensor
    """Factors of the policy loss."""
    keep: Tensor
    """False at tokens that are left out of every term."""


def correct(train_logprobs: Tensor, engine_logprobs: Tensor, rollout: Tensor, o: ObjectiveConfig) -> Correction:
    """The correction that the options ask for, not yet normalised."""
    difference = (train_logprobs - engine_logprobs).detach()
    ratio = importance_ratio(difference, rollout, o.importance_level)
    inside = (ratio >= o.importance_low) & (ratio <= o.importance_high)
    keep = torch.ones_like(inside) if o.importance != "mis" else inside
    keep = keep & _accepted(difference, rollout, o) & _not_vetoed(difference, rollout, o.veto)
    return Correction(_weights(ratio, inside, o), keep)


def importance_ratio(difference: Tensor, rollout: Tensor, level: Level) -> Tensor:
    """exp of the log-ratio trainer - engine at a level, for every token; log-ratios are bounded to ±20."""
    if level == "sequence":
        difference = rollout_sums(difference, rollout)
    elif level == "geometric":
        difference = rollout_means(difference, rollout)
    return torch.exp(difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def mean_weight(weights: Tensor, rollout: Tensor, level: Level) -> float:
    """The mean that the weights of a whole batch are divided by, 1 if there is nothing to divide.

    token: over tokens. sequence and geometric: over rollouts, since all tokens of one have the same weight.
    """
    if not len(weights):
        return 1.0
    if level == "token":
        mean = weights.mean()
    else:
        sizes = rollout_sums(torch.ones_like(weights), rollout)
        mean = (weights / sizes).sum() / (1 / sizes).sum()
    return float(mean) or 1.0


def _weights(ratio: Tensor, inside: Tensor, o: ObjectiveConfig) -> Tensor:
    if o.importance == "none":
        return torch.ones_like(ratio)
    if o.importance == "tis":
        return ratio.clamp(o.importance_low, o.importance_high)
    if o.importance == "icepop":
        return torch.where(inside, ratio, torch.zeros_like(ratio))
    return ratio


def _accepted(difference: Tensor, rollout: Tensor, o: ObjectiveConfig) -> Tensor:
    if o.reject_level == "none":
        return torch.ones_like(difference, dtype=torch.bool)
    ratio = importance_ratio(difference, rollout, o.reject_level)
    return (ratio >= (o.reject_low or 0.0)) & (ratio <= (math.inf if o.reject_high is None else o.reject_high))


def _not_vetoed(difference: Tensor, rollout: Tensor, veto: float | None) -> Tensor:
    if veto is None:
        return torch.ones_like(difference, dtype=torch.bool)
    return rollout_sums((difference < math.log(veto)).to(difference.dtype), rollout) == 0


@dataclass(frozen=True)
class Mismatch:
    """Per token, [n]. Average over model tokens for a batch figure."""

    ratio: Tensor
    """exp(trainer - engine)."""
    absolute: Tensor
    """|trainer - engine| in nats."""
    k1: Tensor
    """KL(engine ‖ trainer), estimated by engine - trainer: the tokens were sampled by the engine."""
    k3: Tensor
    """The same KL, estimated by ratio - 1 - log ratio, which is never negative."""
    outside: Tensor
    """1.0 where the ratio lies outside [low, high]."""


def mismatch(train_logprobs: Tensor, engine_logprobs: Tensor, low: float, high: float) -> Mismatch:
    """How far trainer and engine lie apart. All tensors of one shape, log-probs in nats."""
    difference = (train_logprobs - engine_logprobs).detach()
    ratio = torch.exp(difference)
    outside = ((ratio < low) | (ratio > high)).to(ratio.dtype)
    return Mismatch(ratio=ratio, absolute=difference.abs(), k1=-difference, k3=ratio - 1 - difference, outside=outside)
