"""One batch of groups becomes one or more optimizer steps.

Reference and old log-probs, advantages and the weights' mean are made once, over the whole batch, before the first step; then the
batch is gone through `epochs` times in `minibatches` parts of whole groups. A part's averages have its own denominators.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from statistics import fmean
from typing import TYPE_CHECKING

from services.contract.config import ObjectiveConfig
from services.trainer.collect import CompleteGroup
from services.trainer.megatron.batching import Row
from services.trainer.megatron.loss import PolicyLoss
from services.trainer.rows import mismatch_figures, policy_rows, whole_batch_mean_weight, with_advantages, with_logprobs

if TYPE_CHECKING:
    from services.trainer.megatron.learner import Learner

ADDED_UP = ("tokens", "trained_tokens", "rows", "rows_trained", "seconds")
"""Figures of an optimizer step that are sums over what it computed."""
ONE_EACH = ("loss", "grad_norm", "padding")
"""Figures of the step as such. All others are means over its trained tokens."""


def update(learner: Learner, groups: list[CompleteGroup], o: ObjectiveConfig, learning_rate: float, seed: str) -> dict[str, float]:
    """Learn from the batch. seed: of the order of the parts. Returns the learner's figures over all its optimizer steps."""
    rows = with_advantages(with_logprobs(policy_rows(groups), learner, o), groups, o)
    loss = PolicyLoss(o, whole_batch_mean_weight(rows, o))
    # Without any row to compute, the steps would say nothing about the mismatch.
    gap = {} if any(row.targets and loss.contributes(row) for row in rows) else mismatch_figures(learner, rows)
    samples = len(rows) // len(groups)
    by_group = [rows[i : i + samples] for i in range(0, len(rows), samples)]
    return gap | summary([learner.train_step(part, loss, learning_rate) for part in parts(by_group, o, seed)])


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
