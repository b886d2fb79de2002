"""Graded groups become rows for the learner: tokens first, then what the objective wants to know of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from services.contract.config import ObjectiveConfig
from services.trainer.feeding.collect import CompleteGroup
from services.trainer.megatron.batching import Row
from services.trainer.objective.advantages import RolloutBatch, gae_returns
from services.trainer.objective.corrections import correct, mean_weight
from services.trainer.objective.functions import advantages_of
from services.trainer.objective.kl import kl_estimate
from services.trainer.objective.packed import rollout_index
from services.trainer.shaping import shaped_rewards

if TYPE_CHECKING:
    from services.trainer.megatron.critic import Critic
    from services.trainer.megatron.learner import Learner


ROUNDING = 1e-12
"""Returns that vary by less are equal but for the sums that they were made by."""


def policy_rows(groups: list[CompleteGroup]) -> list[Row]:
    """One row a trajectory; the tokens are those sampled, the mask is derived from the spans.

    Raises ValueError when a group is smaller than the others: its mean would be another baseline.
    """
    samples = max(len(group.trajectories) for group in groups)
    for group in groups:
        if len(group.trajectories) < samples:
            raise ValueError(f"group {group.group_id} has {len(group.trajectories)} rollouts, others {samples}: feed it again")
    return [
        Row(
            token_ids=trajectory.prompt_ids + trajectory.response_ids,
            prompt_length=len(trajectory.prompt_ids),
            loss_mask=trajectory.loss_mask,
            engine_logprobs=trajectory.logprobs,
            temperature=trajectory.temperature,
        )
        for group in groups
        for trajectory in group.trajectories
    ]


def with_logprobs(rows: list[Row], learner: Learner, o: ObjectiveConfig) -> list[Row]:
    """The rows with the log-probs of the reference and of the old policy, as far as the objective asks for them."""
    if o.kl_coef:
        rows = [replace(row, reference_logprobs=v) for row, v in zip(rows, learner.reference_logprobs(rows), strict=True)]
    if o.old_policy == "engine":
        return [_with_values(row, old_logprobs=row.engine_logprobs) for row in rows]
    if o.recomputes_logprobs:
        return [_with_values(row, old_logprobs=v) for row, v in zip(rows, learner.logprobs(rows), strict=True)]
    return rows


def with_old_values(rows: list[Row], critic: Critic) -> list[Row]:
    """The rows with what the critic expects at each token, before it learns from them."""
    return [_with_values(row, old_values=values) for row, values in zip(rows, critic.values(rows), strict=True)]


def with_advantages(rows: list[Row], groups: list[CompleteGroup], o: ObjectiveConfig) -> list[Row]:
    """The rows with their advantages, and with the critic's `returns` if there is one. Rows are in the order of the groups'
    trajectories."""
    batch = _rollout_batch(rows, groups, o)
    if o.has_critic:
        rows = [_with_values(row, returns=returns) for row, returns in zip(rows, gae_returns(batch, o), strict=True)]
    found = advantages_of(batch, o)
    if not any(values.dim() for values in found):
        return [replace(row, advantage=values.item()) for row, values in zip(rows, found, strict=True)]
    per_token = [torch.where(mask, values, 0.0).tolist() for mask, values in zip(batch.masks, found, strict=True)]
    return [_with_values(row, advantages=values) for row, values in zip(rows, per_token, strict=True)]


def _rollout_batch(rows: list[Row], groups: list[CompleteGroup], o: ObjectiveConfig) -> RolloutBatch:
    rewards = torch.tensor([shaped_rewards(group, o) for group in groups], dtype=torch.float64)
    masks = [torch.tensor(row.loss_mask, dtype=torch.bool) for row in rows]
    kl = [_kl(row, mask, o) for row, mask in zip(rows, masks, strict=True)] if o.kl_in_reward else None
    values = [torch.as_tensor(row.token_values["old_values"], dtype=torch.float64) for row in rows] if o.has_critic else None
    return RolloutBatch(rewards, masks, kl, values)


def whole_batch_mean_weight(rows: list[Row], o: ObjectiveConfig) -> float:
    """What the importance weights are divided by: their mean over all model tokens of the batch, on all ranks alike."""
    if not o.importance_normalize:
        return 1.0
    old = _at_model_tokens(rows, [row.token_values["old_logprobs"] for row in rows])
    engine = _at_model_tokens(rows, [row.engine_logprobs for row in rows])
    rollout = rollout_index([len(row.targets) for row in rows])
    return mean_weight(correct(old, engine, rollout, o).weights, rollout, o.importance_level)


def critic_figures(rows: list[Row]) -> dict[str, float]:
    """How well the critic foresaw the returns of the batch's model tokens, before it learned from them.

    value_mean, returns_mean; explained_variance = 1 - Var(return - value) / Var(return): 1 is all, 0 no better than a constant,
    absent where the returns do not differ.
    """
    values = _at_model_tokens(rows, [row.token_values["old_values"] for row in rows])
    returns = _at_model_tokens(rows, [row.token_values["returns"] for row in rows])
    if not len(returns):
        return {}
    figures = {"value_mean": float(values.mean()), "returns_mean": float(returns.mean())}
    spread = float(returns.var(correction=0))
    if spread > ROUNDING:
        figures["explained_variance"] = 1 - float((returns - values).var(correction=0)) / spread
    return figures


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


def _with_values(row: Row, **values: Any) -> Row:
    return replace(row, token_values={**row.token_values, **values})


def _kl(row: Row, mask: Tensor, o: ObjectiveConfig) -> Tensor:
    """[response] float64, 0 where observed."""
    old, reference = (torch.as_tensor(v, dtype=torch.float64) for v in (row.token_values["old_logprobs"], row.reference_logprobs))
    return torch.where(mask, kl_estimate(old, reference, o.kl_estimator), 0.0)


def _at_model_tokens(rows: list[Row], lists: list[Any]) -> Tensor:
    """[n] float64, the rows one after another. lists: [response] of each."""
    every = torch.cat([torch.as_tensor(values, dtype=torch.float64) for values in lists])
    return every[torch.tensor([own for row in rows for own in row.loss_mask], dtype=torch.bool)]
