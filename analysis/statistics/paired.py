"""What can be said of scores: intervals, paired comparisons. Knows nothing of how they were made.

A comparison takes the scores of two methods on several pairs of networks, run by run: the same
seed means the same images in the same order, so that runs are paired by construction.
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
ENOUGH = 6  # runs: fewer have all one sign by chance more than once in 20 times (2 / 2^5)


class Comparison(NamedTuple):
    """How much better one method is than another, over all paired runs."""

    n: int  # paired runs
    mean: float  # of the differences, each pair of networks counted alike
    low: float  # 95 % bootstrap interval of the mean
    high: float
    effect: float  # Cohen's d of paired samples: mean difference over its standard deviation
    p: float  # of a sign-flip permutation test, two-sided
    probability: float  # of improvement: that a run of the one beats a run of the other

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out 0, and there are runs enough to believe it."""
        return self.n >= ENOUGH and (self.low > 0 or self.high < 0)


def interval(scores: Scores) -> tuple[float, float]:
    """95 % bootstrap interval (percentile) of the mean of [n] scores; NaN for fewer than two."""
    return _bootstrap([scores]) if len(scores) > 1 else (math.nan, math.nan)


def compare(ours: Mapping[Any, Scores], others: Mapping[Any, Scores]) -> Comparison | None:
    """Scores by pair of networks, the runs of both in the same order; None where nothing is paired.

    Runs are resampled within each pair of networks, or, where pairs have one run each, the pairs
    are. Probability of improvement: Agarwal et al. 2021, averaged over pairs of networks.
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
    """p-values corrected for being many (Benjamini and Hochberg 1995); NaN stays NaN."""
    values = np.asarray(p, dtype=float)
    known = np.isfinite(values)
    if known.any():
        values[known] = stats.false_discovery_control(values[known])
    return values.tolist()


def _bootstrap(samples: list[Scores]) -> tuple[float, float]:
    """Of the mean over samples of their means."""
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
    return float(
        stats.permutation_test(
            (differences,),
            lambda x, axis: x.mean(axis=axis),
            permutation_type="samples",
            n_resamples=RESAMPLES,
            rng=np.random.default_rng(0),
        ).pvalue
    )
