"""Policy losses per token, and the ways to average them over a batch.

| `objective.loss` | loss of a token, with ratio r = exp(log-prob - old log-prob)  | source                         |
|------------------|---------------------------------------------------------------|--------------------------------|
| clipped          | max(-r·A, -clip(r)·A)                                         | PPO (1707.06347)               |
| gspo             | the same with r = exp(mean over the rollout of the log-ratio) | GSPO (2507.18071)              |
| cispo            | -clip(r)·A·log-prob, no gradient through clip(r)              | CISPO (MiniMax-M1, 2506.13585) |

clip(r) bounds r to [1 - clip_low, 1 + clip_high] (two bounds: DAPO, 2503.14476). With `dual_clip` = c the first two losses are
at most -c·A where A < 0 (Ye et al. 2020, 1912.09729).

The averages take the denominators of the *whole* batch as arguments. So what is computed on one micro-batch, or on one
data-parallel rank, is that part's share of the loss: the shares sum to the loss, however the batch was cut.
Log-probs are in nats. Tensors hold model tokens only; nothing here ever sees an observed token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from services.contract.config import ObjectiveConfig
from services.trainer.objective.packed import rollout_means


@dataclass(frozen=True)
class PolicyTokens:
    """Model tokens of whole rollouts, one after another; all [n]."""

    logprobs: Tensor
    """Under the policy being trained; the only one that carries a gradient."""
    old_logprobs: Tensor
    advantages: Tensor
    rollout: Tensor
    """Which rollout each token belongs to, counted from 0."""


TokenLoss = Callable[[PolicyTokens, ObjectiveConfig], tuple[Tensor, Tensor]]
"""(loss per token [n], 1.0 at tokens that a clip acted on [n] without gradient)."""


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate. All arguments of one shape; only `logprobs` should carry a gradient.

    Returns (loss per token, 1.0 where the clipped term is the larger loss and so stops the gradient).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    plain = -ratio * advantages
    clipped = -ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    loss = torch.maximum(plain, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss, (clipped > plain).to(logprobs.dtype).detach()


def clipped(tokens: PolicyTokens, o: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    return clipped_surrogate(tokens.logprobs, tokens.old_logprobs, tokens.advantages, o.clip_low, o.clip_high, o.dual_clip)


def gspo(tokens: PolicyTokens, o: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Every token has its sequence's loss, so the mean over a rollout is that of the sequence. The ratio stays within some
    thousandths of 1: GSPO's own bounds are 3e-4 and 4e-4."""
    mean = rollout_means(tokens.logprobs - tokens.old_logprobs, tokens.rollout)
    return clipped_surrogate(mean, torch.zeros_like(mean), tokens.advantages, o.clip_low, o.clip_high, o.dual_clip)


def cispo(tokens: PolicyTokens, o: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """No token loses its gradient; an outlier's is bounded."""
    ratio = torch.exp(tokens.logprobs - tokens.old_logprobs).detach()
    weight = ratio.clamp(1.0 - o.clip_low, 1.0 + o.clip_high)
    return -weight * tokens.advantages * tokens.logprobs, (weight != ratio).to(ratio.dtype)


LOSSES: dict[str, TokenLoss] = {"clipped": clipped, "gspo": gspo, "cispo": cispo}


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """A critic's clipped squared error per token, max((v - R)², (old + clamp(v - old, ±clip) - R)²), without a factor ½.

    All of one shape; only `values` carries a gradient. Returns (loss, 1.0 where the clip stops the gradient).
    Source: PPO as in OpenAI's baselines; slime and verl do the same (verl halves it).
    """
    near = old_values + (values - old_values).clamp(-clip, clip)
    plain, bounded = (values - returns).square(), (near - returns).square()
    return torch.maximum(plain, bounded), (bounded > plain).to(values.dtype).detach()


def rollout_mean(values: Tensor, mask: Tensor, rollout_tokens: Tensor, rollouts: int) -> Tensor:
    """This part's share of: mean over each rollout's model tokens, then mean over rollouts. Scalar.

    mask: 0 where a token is left out; it still counts in the denominators.
    rollout_tokens: model tokens of the rollout that a value belongs to (broadcasts against `values`), in the whole batch.
    rollouts: rollouts in the whole batch, those without any model token included.
    """
    return (masked(values, mask) / rollout_tokens.clamp(min=1)).sum() / rollouts


def token_mean(values: Tensor, mask: Tensor, tokens: int) -> Tensor:
    """This part's share of the mean over all model tokens of the batch. tokens: how many the whole batch has. Scalar."""
    return masked(values, mask).sum() / max(tokens, 1)


def fixed_length_mean(values: Tensor, mask: Tensor, rollouts: int, length: int) -> Tensor:
    """This part's share of the sum over tokens / (rollouts × length): a long answer's tokens weigh as much as a short one's.

    Source: Dr. GRPO (arXiv 2503.20783), where `length` is the generation budget. Scalar.
    """
    return masked(values, mask).sum() / (rollouts * length)


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where the mask is set, else 0. Not a product: an infinity at a token left out must not become NaN."""
    return torch.where(mask.bool(), values, torch.zeros_like(values))
