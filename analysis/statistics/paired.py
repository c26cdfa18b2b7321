"""Confidence intervals of scores and paired comparisons of two methods.

A comparison takes the scores of two methods on several pairs of networks, run by run. Runs with the
same seed see the same images in the same order, so they are paired by construction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

Scores = npt.NDArray[np.float64]
RESAMPLES = 9999
# Runs needed to decide. With 5, all differences have one sign by chance with p = 2 / 2^5 > 0.05.
ENOUGH = 6


class Comparison(NamedTuple):
    """How much better one method is than another, over all paired runs.

    Attributes:
        n: Number of paired runs.
        mean: Mean difference; each pair of networks has the same weight.
        low: Lower end of the 95 % bootstrap interval of the mean.
        high: Upper end of the 95 % bootstrap interval of the mean.
        effect: Cohen's d of paired samples: the mean difference divided by its standard deviation.
        p: p-value of a two-sided sign-flip permutation test.
        probability: Probability of improvement: that a run of the first method beats a run of the
            second.
    """

    n: int
    mean: float
    low: float
    high: float
    effect: float
    p: float
    probability: float

    @property
    def decided(self) -> bool:
        """Whether the interval excludes 0 and there are at least ENOUGH paired runs."""
        return self.n >= ENOUGH and (self.low > 0 or self.high < 0)


def interval(scores: Scores) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean of scores [n]; NaN for n < 2."""
    return _bootstrap([scores]) if len(scores) > 1 else (math.nan, math.nan)


def compare(ours: Mapping[Any, Scores], others: Mapping[Any, Scores]) -> Comparison | None:
    """Compare two methods by their paired runs.

    The bootstrap resamples runs within each pair of networks. If any pair has only one run, it
    resamples all differences together. The probability of improvement follows Agarwal et al. 2021,
    averaged over pairs of networks.

    Args:
        ours: Scores [n] of the first method for each pair of networks.
        others: Scores [n] of the second method, with the runs in the same order.

    Returns:
        The comparison, or None if no pair of networks has runs of both methods.
    """
    shared = [key for key in ours if key in others and len(ours[key])]
    if not shared:
        return None
    differences = [ours[key] - others[key] for key in shared]
    pooled = np.concatenate(differences)
    if len(pooled) == 1:
        low = high = effect = p = math.nan
    else:
        spread = pooled.std(ddof=1)
        effect = float(pooled.mean() / spread) if spread > 0 else math.nan
        repeated = all(len(part) > 1 for part in differences)
        low, high = _bootstrap(differences if repeated else [pooled])
        p = _sign_flips(pooled)
    wins = [
        stats.mannwhitneyu(ours[key], others[key]).statistic / (len(ours[key]) * len(others[key]))
        for key in shared
    ]
    mean = float(np.mean([part.mean() for part in differences]))
    return Comparison(len(pooled), mean, low, high, effect, p, float(np.mean(wins)))


def corrected(p: list[float]) -> list[float]:
    """Correct p-values for multiple comparisons (Benjamini and Hochberg 1995). NaN stays NaN."""
    values = np.asarray(p, dtype=float)
    known = np.isfinite(values)
    if known.any():
        values[known] = stats.false_discovery_control(values[known])
    return values.tolist()


def _bootstrap(samples: list[Scores]) -> tuple[float, float]:
    """Return the bootstrap interval of the mean over samples of their means."""
    pooled = np.concatenate(samples)
    if np.ptp(pooled) == 0:
        return float(pooled[0]), float(pooled[0])

    def statistic(*parts: Scores, axis: int) -> Scores:
        return np.mean([part.mean(axis=axis) for part in parts], axis=0)

    found = stats.bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def _sign_flips(differences: Scores) -> float:
    """Return the two-sided p-value of a sign-flip permutation test of the mean."""
    return float(
        stats.permutation_test(
            (differences,),
            lambda x, axis: x.mean(axis=axis),
            permutation_type="samples",
            n_resamples=RESAMPLES,
            rng=np.random.default_rng(0),
        ).pvalue
    )
