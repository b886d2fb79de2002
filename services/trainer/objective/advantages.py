"""Advantages: how much better a rollout, or a token of it, was than could be expected.

| `objective.advantage`        | advantage                                                  | source                   |
|------------------------------|------------------------------------------------------------|--------------------------|
| grpo                         | (R - mean of the group) / (its standard deviation + 1e-6)  | GRPO (2402.03300)        |
| dr_grpo                      | R - mean of the group                                      | Dr. GRPO (2503.20783)    |
| rloo                         | R - mean of the group's other rollouts                     | RLOO (2402.14740)        |
| reinforce_plus_plus          | discounted sum of the token rewards that follow, whitened  | REINFORCE++ (2501.03262) |
| reinforce_plus_plus_baseline | R - mean of the group - kl_coef·KL of the token, whitened  | the same, with baseline  |
| gae                          | Σ (gae_gamma·gae_lambda)^k · δ of the k-th token after it, | PPO (1707.06347) with    |
|                              | δ = reward + gae_gamma·next value - value; whitened        | GAE (1506.02438)         |

A group is one question sampled several times. An incomplete group is an error here, never a smaller group: its mean would be
another baseline. Whitening is over all model tokens of the batch. With the KL in the reward, rloo subtracts kl_coef times the
rollout's summed KL from R; a token of reinforce_plus_plus and of gae is rewarded -kl_coef·KL, the last one R besides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from services.contract.config import ObjectiveConfig

STD_FLOOR = 1e-6
"""Added to the standard deviation, so that a group of equal rewards has advantage 0 and not NaN."""
VARIANCE_FLOOR = 1e-8
Baseline = Literal["grpo", "dr_grpo", "rloo"]


@dataclass(frozen=True)
class RolloutBatch:
    """A batch as an advantage sees it. Rollouts are in the order of `rewards`, group after group; all float64."""

    rewards: Tensor
    """[groups, samples]"""
    masks: list[Tensor]
    """Per rollout, bool [response]: True at the model's own tokens."""
    kl: list[Tensor] | None = None
    """Per rollout, [response]: estimated KL to the reference in nats, 0 where observed. None unless the KL is in the reward."""
    values: list[Tensor] | None = None
    """Per rollout, [response]: what the critic expected after reading all before the token. None without a critic."""

    def __post_init__(self) -> None:
        if self.rewards.dim() != 2:
            raise ValueError(f"rewards have shape {tuple(self.rewards.shape)}: give [groups, samples]")
        if len(self.masks) != self.rewards.numel():
            raise ValueError(f"{len(self.masks)} rollouts for {self.rewards.numel()} rewards: train on complete groups only")


AdvantageFunction = Callable[[RolloutBatch, ObjectiveConfig], list[Tensor]]
"""One tensor a rollout: a scalar for all its tokens, or [response]."""


def group_advantages(rewards: Tensor, baseline: Baseline = "grpo") -> Tensor:
    """rewards: [groups, samples], at least two samples, else ValueError. Returns the same shape and dtype."""
    if rewards.shape[1] < 2:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}: a group's baseline needs two samples or more")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if baseline == "rloo":
        return centred * (rewards.shape[1] / (rewards.shape[1] - 1))
    if baseline == "dr_grpo":
        return centred
    return centred / (rewards.std(dim=1, keepdim=True) + STD_FLOOR)


def zero_variance(rewards: Sequence[float]) -> bool:
    """Whether all rewards of a group are equal: such a group has advantage 0 throughout and teaches nothing. A group of one has
    nothing to be equal to."""
    return len(rewards) > 1 and len(set(rewards)) == 1


def token_rewards(reward: float, mask: Tensor, kl: Tensor | None, kl_coef: float) -> Tensor:
    """[response]: -kl_coef·KL at the model's tokens, and the rollout's reward on the last of them."""
    rewards = torch.zeros(len(mask), dtype=torch.float64)
    if kl is not None:
        rewards -= kl_coef * torch.where(mask, kl, 0.0)
    if mask.any():
        rewards[int(mask.nonzero()[-1])] += reward
    return rewards


def discounted_returns(rewards: Tensor, gamma: float) -> Tensor:
    """Σ over k ≥ t of gamma^(k - t) · reward of k, for one rollout [response]. Observed tokens count as time, as in slime."""
    backwards = accumulate(reversed(rewards.tolist()), lambda following, reward: reward + gamma * following)
    return torch.tensor(list(backwards)[::-1], dtype=rewards.dtype)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438) over the model's tokens of one rollout, all [response].

    An observation is not the policy's doing: it is no step in time, and its value is never asked for. Nothing follows the last
    token. Returns (advantages, returns = advantages + values), both 0 at observed tokens.
    """
    rewards, own = rewards[mask], values[mask]
    deltas = rewards + gamma * torch.cat([own[1:], own.new_zeros(min(1, len(own)))]) - own
    advantages = torch.zeros_like(values)
    advantages[mask] = discounted_returns(deltas, gamma * lam)
    return advantages, torch.where(mask, advantages + values, 0.0)


def whiten(values: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    """Shift and scale to mean 0 and variance 1 over all model tokens (unbiased variance + 1e-8). Lists of [response].

    With fewer than two model tokens there is no variance: then only the mean is taken off.
    """
    own = torch.cat([v[m] for v, m in zip(values, masks, strict=True)]) if values else torch.zeros(0)
    if not len(own):
        return values
    scale = torch.rsqrt(own.var() + VARIANCE_FLOOR) if len(own) > 1 else torch.ones(())
    return [(v - own.mean()) * scale for v in values]


def grpo(batch: RolloutBatch, _: ObjectiveConfig) -> list[Tensor]:
    return _each(group_advantages(batch.rewards, "grpo"))


def dr_grpo(batch: RolloutBatch, _: ObjectiveConfig) -> list[Tensor]:
    return _each(group_advantages(batch.rewards, "dr_grpo"))


def rloo(batch: RolloutBatch, o: ObjectiveConfig) -> list[Tensor]:
    rewards = batch.rewards
    if batch.kl is not None:
        rewards = rewards - o.kl_coef * torch.stack([kl.sum() for kl in batch.kl]).reshape(rewards.shape)
    return _each(group_advantages(rewards, "rloo"))


def reinforce_plus_plus(batch: RolloutBatch, o: ObjectiveConfig) -> list[Tensor]:
    return whiten(reinforce_returns(batch, o), batch.masks)


def reinforce_returns(batch: RolloutBatch, o: ObjectiveConfig) -> list[Tensor]:
    """REINFORCE++ before it is whitened: per rollout [response]."""
    return [discounted_returns(rewards, o.gamma) for rewards in _token_rewards(batch, o)]


def reinforce_plus_plus_baseline(batch: RolloutBatch, o: ObjectiveConfig) -> list[Tensor]:
    return whiten(baseline_returns(batch, o), batch.masks)


def baseline_returns(batch: RolloutBatch, o: ObjectiveConfig) -> list[Tensor]:
    """REINFORCE++ with the group's baseline, before it is whitened: per rollout [response]."""
    centred = dr_grpo(batch, o)
    kls = batch.kl or [torch.zeros(len(mask), dtype=torch.float64) for mask in batch.masks]
    return [value - o.kl_coef * kl for value, kl in zip(centred, kls, strict=True)]


def gae_advantages(batch: RolloutBatch, o: ObjectiveConfig) -> list[Tensor]:
    """PPO's: per rollout [response], 0 at observed tokens unless whitened."""
    found = [advantages for advantages, _ in _gae_of_each(batch, o)]
    return whiten(found, batch.masks) if o.gae_whiten else found


def gae_returns(batch: RolloutBatch, o: ObjectiveConfig) -> list[Tensor]:
    """What the critic learns to expect: the advantages before whitening + its values, per rollout [response], 0 where observed."""
    return [returns for _, returns in _gae_of_each(batch, o)]


def _gae_of_each(batch: RolloutBatch, o: ObjectiveConfig) -> list[tuple[Tensor, Tensor]]:
    if batch.values is None:
        raise ValueError('advantage = "gae" needs the values of a critic: give them with the batch')
    rollouts = zip(_token_rewards(batch, o), batch.values, batch.masks, strict=True)
    return [gae(rewards, values, mask, o.gae_gamma, o.gae_lambda) for rewards, values, mask in rollouts]


def _token_rewards(batch: RolloutBatch, o: ObjectiveConfig) -> list[Tensor]:
    kls = batch.kl or [None] * len(batch.masks)
    rewards = batch.rewards.reshape(-1).tolist()
    return [token_rewards(r, mask, kl, o.kl_coef) for r, mask, kl in zip(rewards, batch.masks, kls, strict=True)]


def _each(advantages: Tensor) -> list[Tensor]:
    return list(advantages.reshape(-1).unbind())


ADVANTAGES: dict[str, AdvantageFunction] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "gae": gae_advantages,
}
