"""Advantages of a rollout relative to the other rollouts of its group (one group: one question sampled several times).

GRPO (Shao et al. 2024, arXiv 2402.03300) divides by the group's standard deviation; Dr. GRPO (Liu et al. 2025,
arXiv 2503.20783) leaves that out, because it weighs questions by how even their rewards are.
An incomplete group is an error here, never a smaller group: its mean would be another baseline.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import torch
from torch import Tensor

STD_FLOOR = 1e-6
"""Added to the standard deviation, so that a group of equal rewards has advantage 0 and not NaN."""


def group_advantages(rewards: Tensor, baseline: Literal["grpo", "dr_grpo"] = "grpo") -> Tensor:
    """Advantages of complete groups.

    rewards: [groups, samples], at least two samples. Returns the same shape and dtype.
    grpo: (reward - mean) / (unbiased standard deviation + 1e-6); dr_grpo: reward - mean.
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards have shape {tuple(rewards.shape)}: give [groups, samples] with at least two samples a group")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if baseline == "dr_grpo":
        return centred
    return centred / (rewards.std(dim=1, keepdim=True) + STD_FLOOR)


def advantages_by_group(
    rewards: Sequence[float],
    group_ids: Sequence[Hashable],
    samples_per_group: int,
    baseline: Literal["grpo", "dr_grpo"] = "grpo",
) -> Tensor:
    """Advantages in the order of `rewards`, whatever the order of the groups. Returns [rollouts], float64.

    Raises ValueError when a group does not have exactly `samples_per_group` rollouts.
    """
    if len(rewards) != len(group_ids):
        raise ValueError(f"{len(rewards)} rewards but {len(group_ids)} group ids: give one of each per rollout")
    members = _members(group_ids)
    for group, indices in members.items():
        if len(indices) != samples_per_group:
            raise ValueError(f"group {group!r} has {len(indices)} rollouts, not {samples_per_group}: train on complete groups only")
    order = torch.tensor([i for indices in members.values() for i in indices], dtype=torch.long)
    ordered = torch.tensor(rewards, dtype=torch.float64)[order].reshape(len(members), samples_per_group)
    advantages = torch.empty(len(rewards), dtype=torch.float64)
    advantages[order] = group_advantages(ordered, baseline).reshape(-1)
    return advantages


def zero_variance(rewards: Sequence[float]) -> bool:
    """Whether all rewards of a group are equal: such a group has advantage 0 throughout and teaches nothing."""
    return len(set(rewards)) <= 1


def _members(group_ids: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    members: dict[Hashable, list[int]] = {}
    for index, group in enumerate(group_ids):
        members.setdefault(group, []).append(index)
    return members
