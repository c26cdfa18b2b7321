"""How many seeds a comparison takes, from the spread that was seen so far.

The test is that of `paired.mean_of`: Student's, on the paired differences of several pairs of
networks. Its power follows from the non-central t distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from analysis.statistics.paired import ENOUGH, Scores

MOST = 10_000  # seeds, above which none is named


def spreads(differences: Sequence[Scores], confidence: float = 0.0) -> Scores:
    """Return the standard deviation of the differences on each pair, [pairs].

    Args:
        differences: The paired differences on each pair, [n], of at least two runs.
        confidence: 0 for the estimate, else the upper confidence bound at this level, such as 0.8:
            the spread of few runs is often much larger than it looks. Scores are taken as normal.
    """
    freedom = np.array([len(each) - 1 for each in differences])
    variances = np.array([each.var(ddof=1) for each in differences])
    if confidence:
        variances = variances * freedom / stats.chi2.ppf(1 - confidence, freedom)
    return np.sqrt(variances)


def power(effect: float, spread: Scores, seeds: int, level: float = 0.05) -> float:
    """Return the probability that a gain is decided.

    Args:
        effect: The true gain, in points.
        spread: The standard deviation of the differences on each pair, [pairs].
        seeds: The number of seeds on each pair.
        level: The level of the test: 0.05, divided by the number of comparisons.
    """
    variances = spread**2 / seeds
    total = float(variances.sum())
    if total == 0:
        return 1.0
    freedom = min(total**2 * seeds / float((variances**2).sum()) - 1, len(spread) * (seeds - 1))
    shift = abs(effect) * len(spread) / math.sqrt(total)
    limit = stats.t.ppf(1 - level / 2, freedom)
    upper, lower = stats.nct.sf(limit, freedom, shift), stats.nct.cdf(-limit, freedom, shift)
    return float(np.nan_to_num(upper, nan=1.0) + np.nan_to_num(lower))


def seeds_needed(
    effect: float, spread: Scores, level: float = 0.05, wanted: float = 0.8
) -> int | None:
    """Return the smallest number of seeds on each pair with the wanted power; None above `MOST`.

    The arguments are those of `power`.
    """
    low, high = ENOUGH, ENOUGH
    while power(effect, spread, high, level) < wanted:
        low, high = high, 2 * high
        if low > MOST:
            return None
    while low < high:
        middle = (low + high) // 2
        if power(effect, spread, middle, level) < wanted:
            low = middle + 1
        else:
            high = middle
    return low


def detectable(spread: Scores, seeds: int, level: float = 0.05, wanted: float = 0.8) -> float:
    """Return the smallest gain, in points, that `seeds` seeds decide with the wanted power."""
    scale = float(np.sqrt((spread**2).sum()))
    if scale == 0:
        return 0.0

    def lack(effect: float) -> float:
        return power(effect, spread, seeds, level) - wanted

    most = scale
    while lack(most) < 0:
        most *= 2
    return float(brentq(lack, 0.0, most, xtol=1e-4 * scale))
