"""Per-token estimators of the KL divergence from a reference policy (Schulman, "Approximating KL Divergence", 2020).

With d = log-prob - reference log-prob of the sampled token: k1 = d (unbiased, high variance), k2 = d²/2 (biased, low
variance), k3 = exp(-d) - 1 + d (unbiased, low variance, never negative), low_var = k3 clamped to [-10, 10].
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3", "low_var"]
LOW_VAR_LIMIT = 10.0
"""One token that the reference finds impossible would otherwise outweigh the batch."""


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: Estimator) -> Tensor:
    """KL per token in nats; both arguments of one shape. The gradient flows through `logprobs`."""
    difference = logprobs - reference_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    k3 = torch.exp(-difference) - 1 + difference
    if estimator == "k3":
        return k3
    if estimator == "low_var":
        return k3.clamp(-LOW_VAR_LIMIT, LOW_VAR_LIMIT)
    raise ValueError(f"unknown KL estimator {estimator!r}: use k1, k2, k3 or low_var")
