"""Compare many methods at once by their ranks, as Demšar 2006 does.

A block is one run of every method under the same conditions: one seed on one pair of networks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

from analysis.statistics.paired import Scores


class Ranking(NamedTuple):
    """The mean ranks of methods, and which differences of them are more than chance.

    Attributes:
        blocks: The number of blocks N.
        ranks: The mean rank of each method, [methods]; 1 is best, and ties share their mean rank.
        p: The p-value of Friedman's test of the hypothesis that all methods are equal.
        distance: Nemenyi's critical difference at 5 %: two methods whose mean ranks differ by more
            are different. q sqrt(k (k + 1) / (6 N)) for k methods, where q is the studentized range
            for infinitely many degrees of freedom, divided by sqrt(2) (Demšar 2006, section 3.2.2).
    """

    blocks: int
    ranks: Scores
    p: float
    distance: float

    def groups(self) -> list[tuple[int, int]]:
        """Return the largest groups of methods that are not different.

        Returns:
            The first and last place of each group, in the order of the mean ranks.
        """
        ranks = np.sort(self.ranks)
        ends = np.searchsorted(ranks, ranks + self.distance, side="right") - 1
        spans = [(first, int(last)) for first, last in enumerate(ends) if last > first]
        return [span for span in spans if not any(_within(span, other) for other in spans)]


def _within(span: tuple[int, int], other: tuple[int, int]) -> bool:
    return span != other and other[0] <= span[0] and span[1] <= other[1]


def rank(scores: Scores) -> Ranking | None:
    """Rank methods by their scores.

    Args:
        scores: The score of each method in each block, [blocks, methods]; higher is better. Blocks
            in which a method is missing (NaN) are left out.

    Returns:
        The ranking, or None with fewer than three methods or two complete blocks.
    """
    complete = scores[~np.isnan(scores).any(axis=1)]
    blocks, methods = complete.shape
    if blocks < 2 or methods < 3:
        return None
    ranks = stats.rankdata(-complete, axis=1).mean(axis=0)
    equal = bool((complete == complete[:, :1]).all())  # Friedman's statistic is then 0 / 0
    p = 1.0 if equal else float(stats.friedmanchisquare(*complete.T).pvalue)
    q = float(stats.studentized_range.ppf(0.95, methods, np.inf)) / math.sqrt(2)
    distance = q * math.sqrt(methods * (methods + 1) / (6 * blocks))
    return Ranking(blocks, ranks, p, distance)
