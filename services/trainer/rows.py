"""Graded groups become rows for the learner, and how far engine and trainer lie apart on them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from services.trainer.collect import CompleteGroup
from services.trainer.megatron.batching import Row
from services.trainer.megatron.learner import Learner


def policy_rows(groups: list[CompleteGroup], advantages: list[list[float]]) -> list[Row]:
    """One row a trajectory; the tokens are those sampled, the mask is derived from the spans."""
    return [
        Row(
            token_ids=trajectory.prompt_ids + trajectory.response_ids,
            prompt_length=len(trajectory.prompt_ids),
            loss_mask=trajectory.loss_mask,
            engine_logprobs=trajectory.logprobs,
            advantage=advantage,
            temperature=trajectory.temperature,
        )
        for group, group_advantages in zip(groups, advantages, strict=True)
        for trajectory, advantage in zip(group.trajectories, group_advantages, strict=True)
    ]


def with_reference(rows: list[Row], logprobs: list[Tensor]) -> list[Row]:
    """The rows with the reference policy's log-probs on them."""
    return [replace(row, reference_logprobs=values) for row, values in zip(rows, logprobs, strict=True)]


def no_advantage(rows: list[Row]) -> bool:
    """Whether every group's rewards are equal: then the learner computes nothing, and so measures nothing."""
    return all(row.advantage == 0 for row in rows)


def mismatch_figures(learner: Learner, rows: list[Row], sample: int = 4) -> dict[str, float]:
    """Mean |trainer - engine| and KL(engine ‖ trainer) by k3 over the model tokens of the first rows, in nats."""
    chosen = [row for row in rows if row.targets][:sample]
    gaps = [torch.zeros(0)]
    for row, trainer in zip(chosen, learner.logprobs(chosen), strict=True):
        own = torch.tensor(row.loss_mask, dtype=torch.bool)
        gaps.append(trainer[own] - torch.tensor(row.engine_logprobs, dtype=torch.float32)[own])
    gap = torch.cat(gaps)
    if not len(gap):
        return {"mismatch_abs": 0.0, "mismatch_k3": 0.0}
    return {"mismatch_abs": float(gap.abs().mean()), "mismatch_k3": float((gap.exp() - 1 - gap).mean())}
