"""The objectives once more in plain torch, a rollout at a time: no packing, no masks, no shared code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor


@dataclass
class Rollout:
    """One rollout's model tokens, [n] each."""

    new: Tensor
    """With gradient."""
    engine: Tensor
    reference: Tensor
    places: list[int]
    """Where in the response each of them stands."""
    reward: float
    old: Tensor | None = None
    entropy: Tensor | None = None
    """With gradient, at the row's temperature."""

    @property
    def before(self) -> Tensor:
        return self.new.detach() if self.old is None else self.old


Groups = list[list[Rollout]]
Loss = Callable[[Groups], Tensor]


def every(groups: Groups) -> list[Rollout]:
    return [rollout for group in groups for rollout in group]


def mean_of_means(losses: list[Tensor]) -> Tensor:
    return torch.stack([loss.mean() for loss in losses]).mean()


def centred(groups: Groups, divide: bool = True) -> list[float]:
    found = []
    for group in groups:
        rewards = [r.reward for r in group]
        scale = stdev(rewards) + 1e-6 if divide else 1.0
        found += [(reward - fmean(rewards)) / scale for reward in rewards]
    return found


def against_others(rewards: list[list[float]]) -> list[float]:
    return [r - fmean(group[:i] + group[i + 1 :]) for group in rewards for i, r in enumerate(group)]


def whitened(advantages: list[Tensor]) -> list[Tensor]:
    flat = torch.cat(advantages).double()
    return [((a - flat.mean()) / (flat.var() + 1e-8).sqrt()).float() for a in advantages]


def pairs(groups: Groups, advantages: list[Any]) -> list[tuple[Rollout, Any]]:
    return list(zip(every(groups), advantages, strict=True))


def grpo(groups: Groups) -> Tensor:
    return mean_of_means(
        [-a * (r.before - r.engine).exp().clamp(max=2.0) * (r.new - r.before).exp() for r, a in pairs(groups, centred(groups))]
    )


def several_steps(groups: Groups) -> Tensor:
    losses = []
    for r, a in pairs(groups, centred(groups)):
        ratio, weight = (r.new - r.before).exp(), (r.before - r.engine).exp().clamp(max=2.0)
        losses.append(-torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a) * weight)
    return mean_of_means(losses)


def dr_grpo(groups: Groups) -> Tensor:
    losses = [-a * (r.new - r.before).exp() for r, a in pairs(groups, centred(groups, divide=False))]
    return torch.cat(losses).sum() / (len(losses) * 16)


def rloo_icepop(groups: Groups) -> Tensor:
    losses = []
    for r, a in pairs(groups, against_others([[r.reward for r in group] for group in groups])):
        weight = (r.before - r.engine).exp()
        weight = torch.tensor([w if 0.9 <= w <= 1.1 else 0.0 for w in weight.tolist()])
        losses.append(-a * weight * (r.new - r.before).exp())
    return torch.cat(losses).mean()


def rloo_kl(groups: Groups) -> Tensor:
    rewards = [[r.reward - 0.05 * float((r.before - r.reference).sum()) for r in group] for group in groups]
    return mean_of_means([-a * (r.new - r.before).exp() for r, a in pairs(groups, against_others(rewards))])


def reinforce_plus_plus(groups: Groups) -> Tensor:
    returns = []
    for r in every(groups):
        rewards = -0.05 * (r.before - r.reference).square() / 2
        rewards[-1] += r.reward
        later = [[0.9 ** (q - p) if q >= p else 0.0 for q in r.places] for p in r.places]
        returns.append(torch.tensor(later) @ rewards)
    return mean_of_means([-a * (r.new - r.before).exp() for r, a in pairs(groups, whitened(returns))])


def reinforce_plus_plus_baseline(groups: Groups) -> Tensor:
    returns = []
    for r, a in pairs(groups, centred(groups, divide=False)):
        gap = r.reference - r.before
        returns.append(a - 0.05 * (gap.exp() - 1 - gap))
    return mean_of_means([-a * (r.new - r.before).exp() for r, a in pairs(groups, whitened(returns))])


def gspo(groups: Groups) -> Tensor:
    losses = []
    for r, a in pairs(groups, centred(groups)):
        ratio = (r.new - r.engine).mean().exp()
        losses.append(-torch.minimum(ratio * a, ratio.clamp(0.97, 1.04) * a))
    return torch.stack(losses).mean()


def cispo(groups: Groups) -> Tensor:
    return mean_of_means(
        [-a * (r.new.detach() - r.engine).exp().clamp(0.9, 1.1) * r.new for r, a in pairs(groups, centred(groups))]
    )


def dual_clip(groups: Groups) -> Tensor:
    losses = []
    for r, a in pairs(groups, centred(groups)):
        ratio = (r.new - r.engine).exp()
        loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)
        losses.append(loss.clamp(max=-1.1 * a) if a < 0 else loss)
    return mean_of_means(losses)


def unbiased_kl(groups: Groups) -> Tensor:
    losses = []
    for r, a in pairs(groups, centred(groups)):
        ratio, gap = (r.new - r.engine).exp(), r.reference - r.new
        losses.append(-torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a) + 0.3 * ratio * (gap.exp() - 1 - gap))
    return mean_of_means(losses)


def mis(groups: Groups) -> Tensor:
    weights = [(r.before - r.engine).sum().exp() for r in every(groups)]
    mean = torch.stack(weights).mean()
    losses = []
    for (r, a), weight in zip(pairs(groups, centred(groups)), weights, strict=True):
        token = (r.before - r.engine).exp()
        kept = bool(0.7 <= weight <= 1.4) and not bool((token < 0.75).any())
        gap = r.reference - r.new
        loss = -a * weight / mean * (r.new - r.before).exp() + 0.2 * (gap.exp() - 1 - gap)
        losses.append(loss * ((token <= 1.2).float() if kept else 0.0))
    return mean_of_means(losses)


def overlong(groups: Groups) -> Tensor:
    punished = [[replace(r, reward=r.reward - shortfall(len(r.new))) for r in group] for group in groups]
    return mean_of_means([-a * (r.new - r.before).exp() for r, a in pairs(punished, centred(punished))])


def shortfall(tokens: int) -> float:
    """Half a point at 10 tokens, nothing at 4."""
    return 0.5 * min(1.0, max(0.0, (tokens - 4) / 6))


def ranks_and_reinforce(groups: Groups) -> Tensor:
    advantages = []
    for group in groups:
        rewards = [r.reward for r in group]
        advantages += [sum((r > q) - (r < q) for q in rewards) / (len(rewards) - 1) for r in rewards]
    return mean_of_means([-a * r.new for r, a in pairs(groups, advantages)])


def entropy_bonus(groups: Groups) -> Tensor:
    losses = []
    for r, a in pairs(groups, centred(groups)):
        assert r.entropy is not None
        losses.append(-a * (r.new - r.before).exp() - 2.0 * r.entropy)
    return mean_of_means(losses)


NO_CORRECTION = {"importance": "none"}
KL_IN_REWARD = {"kl_coef": 0.05, "kl_in": "reward", "importance": "none"}
TO_ENGINE = {"old_policy": "engine", "importance": "none"}
FAMILIES: dict[str, tuple[dict[str, Any], Loss]] = {
    "grpo": ({}, grpo),
    "dr_grpo": ({"advantage": "dr_grpo", "aggregate": "fixed_length", "fixed_length": 16, **NO_CORRECTION}, dr_grpo),
    "rloo with icepop": (
        {"advantage": "rloo", "aggregate": "token_mean", "importance": "icepop", "importance_low": 0.9, "importance_high": 1.1},
        rloo_icepop,
    ),
    "rloo with KL": ({"advantage": "rloo", "kl_estimator": "k1", **KL_IN_REWARD}, rloo_kl),
    "reinforce_plus_plus": (
        {"advantage": "reinforce_plus_plus", "gamma": 0.9, "kl_estimator": "k2", **KL_IN_REWARD},
        reinforce_plus_plus,
    ),
    "reinforce_plus_plus_baseline": (
        {"advantage": "reinforce_plus_plus_baseline", "kl_estimator": "k3", **KL_IN_REWARD},
        reinforce_plus_plus_baseline,
    ),
    "gspo": ({"loss": "gspo", "clip_low": 0.03, "clip_high": 0.04, **TO_ENGINE}, gspo),
    "cispo": ({"loss": "cispo", "clip_low": 0.1, "clip_high": 0.1, **TO_ENGINE}, cispo),
    "dual clip": ({"dual_clip": 1.1, **TO_ENGINE}, dual_clip),
    "unbiased KL": ({"kl_coef": 0.3, "kl_estimator": "k3", "kl_unbiased": True, **TO_ENGINE}, unbiased_kl),
    "mis": (
        {
            "importance": "mis",
            "importance_level": "sequence",
            "importance_low": 0.7,
            "importance_high": 1.4,
            "importance_normalize": True,
            "reject_level": "token",
            "reject_high": 1.2,
            "veto": 0.75,
            "kl_coef": 0.2,
        },
        mis,
    ),
    "overlong": ({"overlong_tokens": 10, "overlong_buffer": 6, "overlong_penalty": 0.5, **NO_CORRECTION}, overlong),
    "functions of one's own": (
        {"advantage": "my_objective:ranks", "loss": "my_objective:reinforce", **NO_CORRECTION},
        ranks_and_reinforce,
    ),
    "entropy bonus": ({"entropy_coef": 2.0, **NO_CORRECTION}, entropy_bonus),
    "several steps": ({"epochs": 2, "minibatches": 3}, several_steps),
}
