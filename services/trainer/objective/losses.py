"""Policy losses per token, and the two ways to average them over a batch.

The averages take the denominators of the *whole* batch as arguments. So what is computed on one micro-batch, or on one
data-parallel rank, is that part's share of the loss: the shares sum to the loss, however the batch was cut.
All functions are elementwise over any common shape; masks are 1 at model tokens and 0 at observed ones.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (Schulman et al. 2017) with a separate upper bound (DAPO, arXiv 2503.14476).

    Log-probs in nats, all arguments of one shape; only `logprobs` should carry a gradient.
    Returns (loss per token, 1.0 where the clipped term is the larger loss and so stops the gradient).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    plain = -ratio * advantages
    clipped = -ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    return torch.maximum(plain, clipped), (clipped > plain).to(logprobs.dtype).detach()


def rollout_mean(values: Tensor, mask: Tensor, rollout_tokens: Tensor, rollouts: int) -> Tensor:
    """This part's share of: mean over each rollout's model tokens, then mean over rollouts. Scalar.

    rollout_tokens: model tokens of the rollout that a value belongs to (broadcasts against `values`), in the whole batch.
    rollouts: rollouts in the whole batch, those without any model token included.
    """
    return (masked(values, mask) / rollout_tokens.clamp(min=1)).sum() / rollouts


def token_mean(values: Tensor, mask: Tensor, tokens: int) -> Tensor:
    """This part's share of the mean over all model tokens of the batch. tokens: how many the whole batch has. Scalar."""
    return masked(values, mask).sum() / max(tokens, 1)


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where the mask is set, else 0. Not a product: an infinity at an observed token must not become NaN."""
    return torch.where(mask.bool(), values, torch.zeros_like(values))
