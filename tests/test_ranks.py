import itertools
import math

import numpy as np
import pytest
from scipy import stats

from analysis.statistics import ranks
from analysis.statistics.paired import compare, improvement, improvement_interval

# Demšar 2006, table 5 (a): critical values q for the Nemenyi test at 5 %, by number of methods
Q = {3: 2.343, 4: 2.569, 5: 2.728, 6: 2.850, 7: 2.949, 8: 3.031, 9: 3.102, 10: 3.164}


@pytest.mark.parametrize("methods", Q)
def test_the_critical_difference_is_that_of_the_table(methods):
    scores = np.random.default_rng(0).normal(size=(12, methods))
    found = ranks.rank(scores)
    expected = Q[methods] * math.sqrt(methods * (methods + 1) / (6 * 12))
    assert found.distance == pytest.approx(expected, rel=1e-3)


def test_ranks_by_hand():
    """The mean ranks of three methods in four blocks; the fifth block lacks one."""
    scores = np.array([[9, 8, 7], [9, 7, 8], [5, 5, 1], [1, 2, 3], [np.nan, 1, 2]], dtype=float)
    found = ranks.rank(scores)
    assert found.blocks == 4
    assert found.ranks == pytest.approx([(1 + 1 + 1.5 + 3) / 4, (2 + 3 + 1.5 + 2) / 4, 9 / 4])
    # Friedman's statistic with the correction for ties, from the ranks: 12 N / (k (k + 1)) ...
    rows = np.array([[1, 2, 3], [1, 3, 2], [1.5, 1.5, 3], [3, 2, 1]])
    sums = ((rows.mean(0) - 2) ** 2).sum() * 4 * 12 / (3 * 4)
    statistic = sums / (1 - (2**3 - 2) / (4 * (3**3 - 3)))
    assert found.p == pytest.approx(stats.chi2.sf(statistic, 2))


def test_too_little_to_rank():
    assert ranks.rank(np.zeros((1, 3))) is None and ranks.rank(np.zeros((5, 2))) is None
    assert ranks.rank(np.full((3, 3), np.nan)) is None
    equal = ranks.rank(np.ones((5, 3)))
    assert equal.p == 1 and list(equal.ranks) == [2, 2, 2] and equal.groups() == [(0, 2)]


def test_groups_are_the_largest_without_a_difference():
    rng = np.random.default_rng(1)
    for _ in range(50):
        found = ranks.Ranking(9, np.sort(rng.uniform(1, 8, 8)), 0.0, rng.uniform(0.2, 4))
        alike = [
            (first, last)
            for first, last in itertools.combinations(range(8), 2)
            if found.ranks[last] - found.ranks[first] <= found.distance
        ]
        largest = [
            (first, last)
            for first, last in alike
            if (first - 1, last) not in alike and (first, last + 1) not in alike
        ]
        assert found.groups() == sorted(largest)


def test_improvement_is_that_of_mann_and_whitney():
    rng = np.random.default_rng(2)
    one, other = rng.integers(0, 5, 7).astype(float), rng.integers(0, 5, 9).astype(float)
    expected = stats.mannwhitneyu(one, other).statistic / 63
    assert improvement(one, other) == pytest.approx(expected)


def test_wins_ties_and_losses_by_hand():
    found = compare(
        {"a": np.array([3.0, 2.0, 1.0]), "b": np.array([5.0, 5.0, 5.0])},
        {"a": np.array([2.0, 2.0, 2.0]), "b": np.array([4.0, 4.0, 6.0])},
    )
    assert (found.wins, found.ties, found.losses) == (3, 1, 2)


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("runs", [[4], [10], [3, 3, 5]])
def test_the_interval_of_an_improvement_by_brute_force(probability, runs):
    """The interval holds the values that are at most 1.96 of their own standard errors away."""
    values = np.linspace(1e-6, 1 - 1e-6, 200_001)
    variance = np.zeros_like(values)
    for n in runs:  # Hanley and McNeil 1982 with the mean of both sample sizes, Newcombe 2006
        q1, q2 = values / (2 - values), 2 * values**2 / (1 + values)
        for q in (q1, q2):
            variance += (n - 1) * (q - values**2) / n**2 / len(runs) ** 2
        variance += values * (1 - values) / n**2 / len(runs) ** 2
    inside = values[np.abs(values - probability) <= 1.959964 * np.sqrt(variance)]
    low, high = improvement_interval(probability, runs)
    assert low == pytest.approx(inside.min(), abs=1e-4)
    assert high == pytest.approx(inside.max(), abs=1e-4)


def test_too_few_runs_have_no_interval_of_improvement():
    for runs in ([5, 2], [3]):
        assert all(math.isnan(end) for end in improvement_interval(0.5, runs))


@pytest.mark.parametrize(
    ("shift", "runs"),
    [(0.0, [4]), (0.0, [6]), (1.0, [6]), (2.0, [10]), (0.5, [24]), (0.0, [3, 3]), (1.0, [3] * 4)],
)
def test_the_interval_of_an_improvement_holds_the_truth(shift, runs):
    """Of two methods with normal scores, the truth is known: Phi(shift / sqrt(2))."""
    rng = np.random.default_rng(3)
    truth = stats.norm.cdf(shift / math.sqrt(2))
    repeats = 2000
    held = 0
    for _ in range(repeats):
        found = [improvement(rng.normal(shift, 1, n), rng.normal(0, 1, n)) for n in runs]
        low, high = improvement_interval(float(np.mean(found)), runs)
        held += low <= truth <= high
    assert held / repeats >= 0.93
