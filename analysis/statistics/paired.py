"""Confidence intervals of scores and paired comparisons of two methods.

A comparison takes the scores of two methods on several pairs of networks, run by run. Runs with the
same seed see the same images in the same order, so they are paired by construction.

Intervals and p-values are Student's, on the paired differences. They keep their promise with three
runs already, where the percentile bootstrap does not (`benchmarks/coverage.py`). Where seeds are
added until the order is decided, both are corrected for the repeated looks (see `sequential`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import special

from analysis.statistics import sequential
from analysis.statistics.sequential import Looks

Scores = npt.NDArray[np.float64]
ENOUGH = 3  # fewest runs of which a spread is estimated; the spread of two says almost nothing


class Estimate(NamedTuple):
    """A mean, its confidence interval (95 %), and the p-value of the hypothesis that it is 0.

    Interval and p-value are NaN where the runs say nothing: there are too few, or they are equal.
    """

    mean: float
    low: float
    high: float
    p: float


class Comparison(NamedTuple):
    """How much better one method is than another, over all paired runs.

    Attributes:
        n: Number of paired runs.
        mean: Mean difference; each pair of networks has the same weight.
        low: Lower end of the 95 % confidence interval of the mean; NaN as in `Estimate`.
        high: Upper end of the interval.
        effect: Cohen's d of paired samples: the mean difference divided by its standard deviation.
        p: p-value of the two-sided t-test to which the interval belongs.
        probability: Probability of improvement: that a run of the first method beats a run of the
            second.
        probability_low: Lower end of its 95 % confidence interval; NaN with too few runs.
        probability_high: Upper end of this interval.
        wins: Number of paired runs in which the first method is better.
        ties: Number of paired runs in which both are equal.
        losses: Number of paired runs in which the second method is better.
    """

    n: int
    mean: float
    low: float
    high: float
    effect: float
    p: float
    probability: float
    probability_low: float
    probability_high: float
    wins: int
    ties: int
    losses: int


def mean_of(samples: Sequence[Scores], level: float = 0.05) -> Estimate:
    """Estimate the mean over samples of their means, each with the same weight.

    The variance of each sample is estimated by itself. The degrees of freedom follow Welch and
    Satterthwaite, with k = 1 in (sum v)^2 / sum(v^2 / (n - 1 + k)) - k for the variance v of the
    mean of each sample: the original k = 0 gives intervals that are too wide with three runs, and
    Welch's k = 2 (1947) intervals that are too narrow where variances differ. If any sample has
    fewer than `ENOUGH` runs, only the means of the samples are used, as runs of one sample.

    Args:
        samples: The runs of each sample, [n]; for example the differences on a pair of networks.
        level: The probability that the interval leaves out the mean.
    """
    mean = float(np.mean([sample.mean() for sample in samples]))
    if min(map(len, samples)) < ENOUGH:
        samples = [np.array([sample.mean() for sample in samples])]
        if len(samples[0]) < ENOUGH:
            return Estimate(mean, math.nan, math.nan, math.nan)
    sizes = np.array([len(sample) for sample in samples])
    variances = np.array([sample.var(ddof=1) for sample in samples]) / sizes
    total = variances.sum()
    if total <= 1e-24 * max(1.0, mean * mean):  # equal runs, but for rounding
        return Estimate(mean, math.nan, math.nan, math.nan)
    freedom = total**2 / (variances**2 / sizes).sum() - 1
    freedom = min(freedom, (sizes - 1).sum())
    error = math.sqrt(total) / len(samples)
    half = error * float(special.stdtrit(freedom, 1 - level / 2))
    p = 2 * float(special.stdtr(freedom, -abs(mean) / error))
    return Estimate(mean, mean - half, mean + half, p)


def interval(scores: Scores) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean of scores [n]; NaN as in `Estimate`."""
    if not len(scores):
        return math.nan, math.nan
    found = mean_of([scores])
    return found.low, found.high


def mean_at_looks(samples: Sequence[Scores], looks: Looks, level: float = 0.05) -> Estimate:
    """Estimate as `mean_of`, from samples that grow while the estimate is looked at.

    The estimate is that of the last look whose runs are all there: `reached(samples, looks)` runs
    of each sample. Its interval and p-value hold whenever the looks end.

    Args:
        samples: The runs of each sample, [n], in the order in which they were made.
        looks: The number of runs at each look; empty for samples that are complete.
        level: The probability that the interval leaves out the mean.
    """
    if not looks:
        return mean_of(samples, level)
    runs = reached(samples, looks)
    now = [n for n in looks if n <= runs]
    levels = sequential.levels(looks, level)
    found = [
        mean_of([each[:n] for each in samples], at) for n, at in zip(now, levels, strict=False)
    ]
    if not found:
        return mean_of(samples)._replace(low=math.nan, high=math.nan, p=math.nan)
    p = sequential.adjusted([each.p for each in found], looks)
    return found[-1]._replace(p=math.nan if math.isnan(found[-1].p) else p)


def reached(samples: Sequence[Scores], looks: Looks) -> int:
    """Return the number of runs of each sample at the last look whose runs are all there, or 0."""
    return max((n for n in looks if n <= min(map(len, samples))), default=0)


def compare(
    ours: Mapping[Any, Scores], others: Mapping[Any, Scores], looks: Looks = ()
) -> Comparison | None:
    """Compare two methods by their paired runs.

    The probability of improvement follows Agarwal et al. 2021, averaged over pairs of networks.

    Args:
        ours: Scores [n] of the first method for each pair of networks.
        others: Scores [n] of the second method, with the runs in the same order.
        looks: The numbers of seeds at which the methods are compared while more are run; runs after
            the last look that is complete do not count yet. Empty if the seeds are fixed.

    Returns:
        The comparison, or None if no pair of networks has runs of both methods.
    """
    shared = [key for key in ours if key in others and len(ours[key])]
    if not shared:
        return None
    differences = [ours[key] - others[key] for key in shared]
    found = mean_at_looks(differences, looks)
    if runs := reached(differences, looks):
        ours, others = ({key: each[key][:runs] for key in shared} for each in (ours, others))
        differences = [each[:runs] for each in differences]
    pooled = np.concatenate(differences)
    spread = pooled.std(ddof=1) if len(pooled) > 1 else 0.0
    effect = float(pooled.mean() / spread) if spread > 0 else math.nan
    better = float(np.mean([improvement(ours[key], others[key]) for key in shared]))
    counts = [int((pooled > 0).sum()), int((pooled == 0).sum()), int((pooled < 0).sum())]
    bounds = improvement_interval(better, [len(ours[key]) for key in shared])
    return Comparison(len(pooled), *found[:3], effect, found.p, better, *bounds, *counts)


def improvement(ours: Scores, others: Scores) -> float:
    """Return the share of pairs of runs in which the first method is better; a tie counts half.

    This is the statistic of Mann and Whitney, divided by the number of pairs.
    """
    signs = np.sign(ours[:, None] - others[None, :])
    return float(signs.mean() / 2 + 0.5)


def improvement_interval(probability: float, runs: Sequence[int]) -> tuple[float, float]:
    """Return the 95 % confidence interval of a probability of improvement.

    This is the score interval of Newcombe 2006 (method 5): the values that differ from the estimate
    by at most 1.96 standard errors, where the standard error is that of Hanley and McNeil at the
    value itself. It also holds for estimates of 0 and 1, for which the bootstrap has no width.

    Args:
        probability: The estimate, the mean over pairs of networks.
        runs: The number of runs of each method on each pair.

    Returns:
        Lower and upper end; NaN if a pair has fewer than `ENOUGH` runs, or the only pair has
        fewer than four: of equal methods with three runs each, one wins all in 10 % of cases.
    """
    if min(runs) < ENOUGH or sum(runs) < 4:
        return math.nan, math.nan

    from scipy.optimize import brentq  # importing it takes a quarter of a second

    def excess(value: float) -> float:
        shape = (1 - value) / (2 - value) + value / (1 + value)
        variance = sum(value * (1 - value) * (1 + (n - 1) * shape) / n**2 for n in runs)
        return (probability - value) ** 2 - 1.959964**2 * variance / len(runs) ** 2

    inside = min(max(probability, 1e-9), 1 - 1e-9)  # the ends are roots of excess at 0 and 1
    low = 0.0 if excess(1e-9) <= 0 else brentq(excess, 1e-9, inside)
    high = 1.0 if excess(1 - 1e-9) <= 0 else brentq(excess, inside, 1 - 1e-9)
    return float(low), float(high)


def corrected(p: Sequence[float]) -> list[float]:
    """Correct p-values for multiple comparisons (Holm 1979). NaN stays NaN and is not counted.

    The chance that any true hypothesis has a corrected p-value below 0.05 is at most 5 %, whatever
    the number of comparisons and however they depend on each other.
    """
    values = np.array(p, dtype=float)
    known = np.flatnonzero(np.isfinite(values))
    order = known[np.argsort(values[known])]
    factors = np.arange(len(order), 0, -1)
    values[order] = np.minimum(np.maximum.accumulate(values[order] * factors), 1)
    return values.tolist()
