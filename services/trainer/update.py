"""One batch of groups becomes one or more optimizer steps.

Reference and old log-probs, the critic's old values, advantages and the weights' mean are made once, over the whole batch, before
the first step; then the batch is gone through `epochs` times in `minibatches` parts of whole groups, by the critic and then by the
policy. A part's averages have its own denominators.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from statistics import fmean
from typing import TYPE_CHECKING

from services.contract.config import ObjectiveConfig
from services.trainer.feeding.collect import CompleteGroup
from services.trainer.learning_rate import Rates
from services.trainer.megatron.batching import Row
from services.trainer.megatron.loss import PolicyLoss
from services.trainer.rows import (
    critic_figures,
    mismatch_figures,
    policy_rows,
    whole_batch_mean_weight,
    with_advantages,
    with_logprobs,
    with_old_values,
)

if TYPE_CHECKING:
    from services.trainer.megatron.critic import Critic
    from services.trainer.megatron.learner import Learner

ADDED_UP = ("tokens", "trained_tokens", "rows", "rows_trained", "seconds")
"""Figures of an optimizer step that are sums over what it computed."""
ONE_EACH = ("loss", "grad_norm", "padding")
"""Figures of the step as such. All others are means over its trained tokens."""
NO_STEP = {"loss": 0.0, "grad_norm": 0.0}
"""Of a batch that only the critic learned from."""


def update(
    learner: Learner, groups: list[CompleteGroup], o: ObjectiveConfig, rates: Rates, seed: str, critic: Critic | None = None
) -> dict[str, float]:
    """Learn from the batch. seed: of the order of the parts. Returns the figures of all optimizer steps, the policy's and the
    critic's.

    critic: what `advantage = "gae"` needs, and nothing else has. Without a policy's rate only the critic learns.
    """
    rows = with_logprobs(policy_rows(groups), learner, o)
    rows = with_advantages(with_old_values(rows, critic) if critic else rows, groups, o)
    samples = len(rows) // len(groups)
    by_group = [rows[i : i + samples] for i in range(0, len(rows), samples)]
    dealt = list(parts(by_group, o, seed))
    found = _update_critic(critic, dealt, o, rates.critic) | critic_figures(rows) if critic else {}
    if rates.policy is None:
        return found | NO_STEP | mismatch_figures(learner, rows)
    loss = PolicyLoss(o, whole_batch_mean_weight(rows, o))
    # Without any row to compute, the steps would say nothing about the mismatch.
    gap = {} if any(row.targets and loss.contributes(row) for row in rows) else mismatch_figures(learner, rows)
    return found | gap | summary([learner.train_step(part, loss, rates.policy) for part in dealt])


def _update_critic(critic: Critic, dealt: list[list[Row]], o: ObjectiveConfig, rate: float | None) -> dict[str, float]:
    if rate is None:
        raise ValueError("a critic learns at a rate of its own: give Rates.critic")
    figures = summary([critic.train_step(part, o.value_clip, rate) for part in dealt])
    named = {"value_loss": "loss", "critic_grad_norm": "grad_norm", "critic_s": "seconds"}
    named = {ours: figures[theirs] for ours, theirs in named.items()}
    return named | {name: figures[name] for name in ("value_clip_fraction",) if name in figures}


def parts(groups: list[list[Row]], o: ObjectiveConfig, seed: str) -> Iterator[list[Row]]:
    """The rows of each optimizer step. Groups are shuffled before each pass, unless a part is the whole batch."""
    size = len(groups) // o.minibatches
    for epoch in range(o.epochs):
        order = random.Random(f"{seed}/{epoch}").sample(groups, len(groups)) if o.minibatches > 1 else groups
        for start in range(0, len(groups), size):
            yield [row for group in order[start : start + size] for row in group]


def summary(steps: list[dict[str, float]]) -> dict[str, float]:
    """One row of figures for all optimizer steps of a batch; `optimizer_steps` says how many if there were several."""
    if len(steps) == 1:
        return steps[0]
    figures = {name: sum(step[name] for step in steps) for name in ADDED_UP}
    figures |= {name: fmean(step[name] for step in steps) for name in ONE_EACH}
    for name in sorted({name for step in steps for name in step} - figures.keys()):
        told = [step for step in steps if name in step]
        weights = [step["trained_tokens"] for step in told]
        figures[name] = fmean((step[name] for step in told), weights if any(weights) else None)
    return figures | {"optimizer_steps": float(len(steps))}
