"""Model tokens of several rollouts, one after another: sums over the tokens of each rollout.

`rollout` says which rollout each token belongs to: [n] integers, in any order. Results are given back to every token, [n].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rollout_index(counts: Sequence[int], device: torch.device | None = None) -> Tensor:
    """[n]: 0 for the first rollout's tokens, 1 for the second's … counts: tokens of each rollout."""
    return torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(counts, dtype=torch.long, device=device))


def rollout_sums(values: Tensor, rollout: Tensor) -> Tensor:
    """The sum over the token's rollout, for every token. values: [n], its gradient is kept."""
    if not len(values):
        return values
    return torch.zeros(int(rollout.max()) + 1, dtype=values.dtype, device=values.device).index_add(0, rollout, values)[rollout]


def rollout_means(values: Tensor, rollout: Tensor) -> Tensor:
    """The mean over the token's rollout, for every token."""
    return rollout_sums(values, rollout) / rollout_sums(torch.ones_like(values), rollout)
