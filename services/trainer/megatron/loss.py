"""The two losses that the learner is trained with, put together from `services.trainer.objective`.

A loss sees one micro-batch's model tokens and the totals of the whole batch; it returns that micro-batch's share of the
loss, and sums of per-token figures that the learner turns into means over the tokens trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from services.contract.config import ObjectiveConfig
from services.trainer.megatron.batching import Row, TokenBatch
from services.trainer.objective.corrections import icepop, mismatch, truncated_importance
from services.trainer.objective.kl import kl_estimate
from services.trainer.objective.losses import clipped_surrogate, rollout_mean, token_mean


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
    def contributes(self, row: Row) -> bool:
        """False when the row's gradient is known to be 0: it is not computed, but stays in the denominators."""
        ...

    def __call__(self, logprobs: Tensor, tokens: TokenBatch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        """logprobs [n], carrying the gradient. Returns (share of the loss, sums over the n tokens)."""
        ...


@dataclass(frozen=True)
class SupervisedLoss:
    """Cross-entropy on model tokens: mean over the batch's tokens, rows weighted."""

    def contributes(self, row: Row) -> bool:
        return row.weight != 0

    def __call__(self, logprobs: Tensor, tokens: TokenBatch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        share = -(tokens.weights * logprobs).sum() / max(totals.weight, 1e-9)
        return share, {"negative_logprob": -logprobs.detach().sum()}


@dataclass(frozen=True)
class GrpoLoss:
    """Clipped surrogate, corrected for the engine's mismatch, plus KL to the reference policy.

    One optimizer step is taken per batch, so the old policy is the one being trained: old log-probs are its own,
    without gradient, and the ratio is 1 until a batch is used more than once.
    """

    objective: ObjectiveConfig

    def contributes(self, row: Row) -> bool:
        return row.advantage != 0 or self.objective.kl_coef > 0

    def __call__(self, logprobs: Tensor, tokens: TokenBatch, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        o, old, mask = self.objective, logprobs.detach(), torch.ones_like(tokens.weights)
        loss, clipped = clipped_surrogate(logprobs, old, tokens.advantages, o.clip_low, o.clip_high)
        sums = {"clip_fraction": clipped.sum(), "negative_logprob": -old.sum()}
        if tokens.engine_logprobs is not None:
            loss = loss * self._importance(old, tokens.engine_logprobs, mask)
            sums |= self._mismatch_sums(old, tokens.engine_logprobs, mask)
        elif o.importance != "none":
            raise ValueError(f'importance = "{o.importance}" needs engine_logprobs on every row: carry them, or set it to "none"')
        if o.kl_coef > 0:
            if tokens.reference_logprobs is None:
                raise ValueError(
                    "kl_coef is above 0, but rows carry no reference_logprobs: fill them by Learner.reference_logprobs"
                )
            kl = kl_estimate(logprobs, tokens.reference_logprobs, o.kl_estimator)
            loss = loss + o.kl_coef * kl
            sums["reference_kl"] = kl.detach().sum()
        if o.aggregate == "rollout_mean":
            return rollout_mean(loss, mask, tokens.rollout_tokens, totals.rollouts), sums
        return token_mean(loss, mask, totals.tokens), sums

    def _importance(self, old: Tensor, engine: Tensor, mask: Tensor) -> Tensor:
        o = self.objective
        if o.importance == "none":
            return mask
        weigh = truncated_importance if o.importance == "tis" else icepop
        return weigh(old, engine, mask, o.importance_low, o.importance_high)

    def _mismatch_sums(self, old: Tensor, engine: Tensor, mask: Tensor) -> dict[str, Tensor]:
        gap = mismatch(old, engine, mask, self.objective.importance_low, self.objective.importance_high)
        return {
            "mismatch_abs": gap.absolute.sum(),
            "mismatch_k1": gap.k1.sum(),
            "mismatch_k3": gap.k3.sum(),
            "importance_mean": gap.ratio.sum(),
            "importance_clip_fraction": gap.outside.sum(),
        }
