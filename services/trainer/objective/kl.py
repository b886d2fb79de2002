"""Per-token estimators of the KL divergence from a reference policy (Schulman, "Approximating KL Divergence", 2020).

With d = log-prob - reference log-prob of the sampled token: k1 = d (unbiased, high variance), k2 = d²/2 (biased, low
variance), k3 = exp(-d) - 1 + d (unbiased, low variance, never negative), low_var = k3 clamped to [-10, 10].

Differentiated as a loss on tokens of the policy itself, k2 has the KL's gradient on average, k1 none at all, and k3 that of the
KL in the other direction (Tang & Munos 2025, arXiv 2506.09477). Weighed by exp(log-prob - old log-prob), gradient included, k1 and
k3 have the KL's own, also on tokens of an older policy (`kl_unbiased`; DeepSeek-V3.2, arXiv 2512.02556).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3", "low_var"]
LOW_VAR_LIMIT = 10.0
"""One token that the reference finds impossible would otherwise outweigh the batch."""


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: Estimator, old_logprobs: Tensor | None = None) -> Tensor:
    """KL per token in nats; arguments of one shape. The gradient flows through `logprobs`.

    old_logprobs: weigh by the ratio to the policy that they are of (before the clamp of low_var).
    """
    kl = _plain(logprobs - reference_logprobs, estimator)
    if old_logprobs is not None:
        kl = torch.exp(logprobs - old_logprobs) * kl
    return kl.clamp(-LOW_VAR_LIMIT, LOW_VAR_LIMIT) if estimator == "low_var" else kl


def _plain(difference: Tensor, estimator: Estimator) -> Tensor:
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator in ("k3", "low_var"):
        return torch.exp(-difference) - 1 + difference
    raise ValueError(f"unknown KL estimator {estimator!r}: use k1, k2, k3 or low_var")
