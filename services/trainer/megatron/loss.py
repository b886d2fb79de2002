"""The two losses that the learner is trained with, put together from `services.trainer.objective`.

A loss sees one micro-batch's model tokens and the totals of the whole batch; it returns that micro-batch's share of the
loss, and sums of per-token figures that the learner turns into means over the tokens trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from services.contract.config import ObjectiveConfig
from services.trainer.megatron.batching import Row, TokenBatch
from services.trainer.objective.corrections import correct, mismatch
from services.trainer.objective.functions import loss_function, token_losses
from services.trainer.objective.kl import kl_estimate
from services.trainer.objective.losses import LOSSES, PolicyTokens, TokenLoss, fixed_length_mean, rollout_mean, token_mean


@dataclass(frozen=True)
class Totals:
    """Denominators of the whole batch, over all ranks, rows that are skipped included."""

    rollouts: int
    tokens: int
    weight: float
    """Sum of row weight × model tokens."""

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Totals:
        counts = [len(row.targets) for row in rows]
        return cls(len(rows), sum(counts), sum(row.weight * n for row, n in zip(rows, counts, strict=True)))


class Loss(Protocol):
    @property
    def wants_entropy(self) -> bool:
        """Whether `tokens.entropy` must be there."""
        ...

    def contributes(self, row: Row) -> bool:
        """False when the row's gradient is known to be 0: it is not computed, but stays in the denominators."""
        ...

    def __call__(self, logprobs: Tensor, tokens: TokenBatch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        """logprobs [n], carrying the gradient. Returns (share of the loss, sums over the n tokens)."""
        ...


@dataclass(frozen=True)
class SupervisedLoss:
    """Cross-entropy on model tokens: mean over the batch's tokens, rows weighted."""

    wants_entropy = False

    def contributes(self, row: Row) -> bool:
        return row.weight != 0

    def __call__(self, logprobs: Tensor, tokens: TokenBatch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        share = -(tokens.weights * logprobs).sum() / max(totals.weight, 1e-9)
        return share, {"negative_logprob": -logprobs.detach().sum()}


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss, corrected for the engine's mismatch, plus KL to the reference policy, minus the entropy bonus.

    The old policy is that of the rows' `old_logprobs`. Rows without them are computed once: then the old policy is the one being
    trained, old log-probs are its own without gradient, and the ratio is 1. Rows may bring `advantages`, one a token, instead
    of the row's own. Both are `token_values`.
    """

    objective: ObjectiveConfig
    mean_weight: float = 1.0
    """Of the importance weights over the whole batch, which they are divided by."""

    @property
    def wants_entropy(self) -> bool:
        return self.objective.entropy_coef > 0

    @cached_property
    def function(self) -> TokenLoss:
        return loss_function(self.objective)

    def contributes(self, row: Row) -> bool:
        o = self.objective
        has_advantage = row.advantage != 0 or any(row.token_values.get("advantages", ()))
        return has_advantage or o.kl_in_loss or o.entropy_coef > 0 or o.loss not in LOSSES

    def __call__(self, logprobs: Tensor, tokens: TokenBatch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        o, now = self.objective, logprobs.detach()
        old = tokens.token_values.get("old_logprobs", now)
        policy = PolicyTokens(logprobs, old, tokens.token_values.get("advantages", tokens.advantages), tokens.row_index)
        loss, clipped = token_losses(self.function, policy, o)
        sums = {"clip_fraction": clipped.sum(), "negative_logprob": -now.sum()}
        if "old_logprobs" in tokens.token_values:
            sums["policy_kl"] = (old - now).sum()
        keep = torch.ones_like(tokens.weights, dtype=torch.bool)
        if tokens.engine_logprobs is not None:
            train = now if o.old_policy == "engine" else old
            correction = correct(train, tokens.engine_logprobs, tokens.row_index, o)
            loss, keep = loss * (correction.weights / self.mean_weight), correction.keep
            sums |= _mismatch_sums(train, tokens.engine_logprobs, keep, o)
        elif o.importance != "none":
            raise ValueError(f'importance = "{o.importance}" needs engine_logprobs on every row: carry them, or set it to "none"')
        if o.kl_in_loss:
            kl = self._kl(logprobs, old, tokens.reference_logprobs)
            loss = loss + o.kl_coef * kl
            sums["reference_kl"] = kl.detach().sum()
        if o.entropy_coef > 0:
            entropy = _given(tokens.entropy, "entropy_coef is above 0, but the learner gave no entropy of the tokens")
            loss = loss - o.entropy_coef * entropy
            sums["entropy"] = entropy.detach().sum()
        return self._aggregate(loss, keep, tokens, totals), sums

    def _kl(self, logprobs: Tensor, old: Tensor, reference: Tensor | None) -> Tensor:
        o = self.objective
        missing = "kl_coef is above 0, but rows carry no reference_logprobs: fill them by Learner.reference_logprobs"
        return kl_estimate(logprobs, _given(reference, missing), o.kl_estimator, old if o.kl_unbiased else None)

    def _aggregate(self, loss: Tensor, keep: Tensor, tokens: TokenBatch, totals: Totals) -> Tensor:
        o = self.objective
        if o.aggregate == "rollout_mean":
            return rollout_mean(loss, keep, tokens.rollout_tokens, totals.rollouts)
        if o.aggregate == "fixed_length":
            return fixed_length_mean(loss, keep, totals.rollouts, o.fixed_length or 1)
        return token_mean(loss, keep, totals.tokens)


def _given(values: Tensor | None, missing: str) -> Tensor:
    if values is None:
        raise ValueError(missing)
    return values


def _mismatch_sums(train: Tensor, engine: Tensor, keep: Tensor, o: ObjectiveConfig) -> dict[str, Tensor]:
    gap = mismatch(train, engine, o.importance_low, o.importance_high)
    sums = {
        "mismatch_abs": gap.absolute.sum(),
        "mismatch_k1": gap.k1.sum(),
        "mismatch_k3": gap.k3.sum(),
        "importance_mean": gap.ratio.sum(),
        "importance_clip_fraction": gap.outside.sum(),
    }
    if o.importance == "mis" or o.reject_level != "none" or o.veto is not None:
        sums["rejected_fraction"] = (~keep).sum()
    return sums
