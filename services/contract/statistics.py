"""How sure a figure of an evaluation is, and whether two of them differ. Pure functions of lists; no numpy.

Everything is over questions, never over samples: samples of one question stand or fall together. Random numbers are seeded, so
the same answers give the same interval every time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import fmean, stdev

Z95 = 1.959963984540054
"""The normal distribution leaves 2.5 % above this."""
RESAMPLES = 2000
MANY = 2000
"""From so many questions on, the bootstrap's interval is the normal one to the digits shown, and is taken as that."""


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): it stays inside [0, 1] and is not empty at 0 or 1. Of no trials: (0, 1)."""
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, Z95**2 / trials
    centre, half = share + z2 / 2, Z95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials))
    return max(0.0, (centre - half) / (1 + z2)), min(1.0, (centre + half) / (1 + z2))


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `values`, one a question: percentile bootstrap (Efron 1979). Of none: (0, 0)."""
    if not values:
        return 0.0, 0.0
    if len(values) >= MANY:
        half = Z95 * stdev(values) / math.sqrt(len(values))
        return fmean(values) - half, fmean(values) + half
    means = _resampled_means(values, seed)
    return means[round(0.025 * (RESAMPLES - 1))], means[round(0.975 * (RESAMPLES - 1))]


def mean_of_independent(parts: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """95 % interval of the mean of independent estimates, each (estimate, low, high): MOVER (Zou and Donner 2008), whose two sides
    are as uneven as those of the parts, and which stays inside [0, 1] where they do. Of none: (0, 0)."""
    if not parts:
        return 0.0, 0.0
    mean = fmean(estimate for estimate, _, _ in parts)
    below = math.sqrt(math.fsum((estimate - low) ** 2 for estimate, low, _ in parts)) / len(parts)
    above = math.sqrt(math.fsum((high - estimate) ** 2 for estimate, _, high in parts)) / len(parts)
    return mean - below, mean + above


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that at least one of k samples is right, estimated without bias from `right` of `samples` (Chen et al. 2021,
    arXiv 2107.03374). Raises ValueError unless 1 <= k <= samples."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples: k must be between 1 and the number of samples")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def ks_of(samples: int) -> list[int]:
    """The k for which pass@k is told: 1, 2, 4 … and the number of samples. None for one sample, whose pass@1 is its match."""
    powers = [2**i for i in range(samples.bit_length()) if 2**i < samples]
    return [*powers, samples] if samples > 1 else []


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value that two policies are equally often right (McNemar 1947, by the binomial distribution), from the
    questions that only one of them got right."""
    n, fewer = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def bootstrap_p(differences: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value that the mean of paired differences is 0: how often the mean of as many differences drawn around 0 is as
    far from it. Never below 1 / (RESAMPLES + 1), which is all that so many draws can tell."""
    if not any(differences):
        return 1.0
    mean = fmean(differences)
    around_zero = [difference - mean for difference in differences]
    if len(differences) >= MANY:
        return math.erfc(abs(mean) / (stdev(differences) / math.sqrt(len(differences))) / math.sqrt(2)) if any(around_zero) else 0.0
    extreme = sum(abs(drawn) >= abs(mean) - 1e-12 for drawn in _resampled_means(around_zero, seed))
    return (extreme + 1) / (RESAMPLES + 1)


def _resampled_means(values: Sequence[float], seed: int) -> list[float]:
    draw = random.Random(seed)
    return sorted(math.fsum(draw.choices(values, k=len(values))) / len(values) for _ in range(RESAMPLES))
