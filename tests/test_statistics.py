import itertools
import math

import numpy as np
import pytest
from scipy import stats

from analysis.statistics.paired import compare, corrected, interval, mean_of


def test_one_sample_has_the_interval_and_the_p_of_the_t_test():
    scores = np.random.default_rng(0).normal(1, 2, 6)
    expected = stats.ttest_1samp(scores, 0)
    found = mean_of([scores])
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert interval(scores) == (found.low, found.high)


def test_three_runs_by_hand():
    # mean 3, standard deviation sqrt(7), t(0.975, 2) = 4.302653
    half = 4.302653 * math.sqrt(7 / 3)
    assert interval(np.array([1.0, 2.0, 6.0])) == pytest.approx((3 - half, 3 + half), rel=1e-6)


def test_two_samples_by_hand():
    found = mean_of([np.array([1.0, 2.0, 3.0]), np.array([1.0, 1.0, 1.0, 9.0])])
    error = math.sqrt(1 / 3 + 4) / 2  # the variances of the two means are 1 / 3 and 16 / 4
    freedom = (1 / 3 + 4) ** 2 / (1 / 27 + 16 / 4) - 1
    assert found.mean == 2.5 and freedom == pytest.approx(3.65, abs=0.01)
    assert found.high - found.mean == pytest.approx(error * stats.t.ppf(0.975, freedom))
    assert found.p == pytest.approx(2 * stats.t.sf(2.5 / error, freedom))


def test_nothing_is_said_about_two_runs_or_equal_ones():
    for samples in ([[1.0, 2]], [[1.0]], [[1.0, 2], [3.0, 5]], [[0.1] * 9], [[0.1] * 3, [0.3] * 3]):
        found = mean_of([np.array(sample) for sample in samples])
        assert found.mean == pytest.approx(np.mean([np.mean(sample) for sample in samples]))
        assert all(math.isnan(x) for x in found[1:])
    assert all(math.isnan(x) for x in interval(np.array([])))


def test_few_runs_on_many_pairs_are_compared_by_pair():
    found = mean_of([np.array([1.0, 2.0]), np.array([0.5]), np.array([3.0, 4.0, 5.0, 6.0])])
    expected = stats.ttest_1samp([1.5, 0.5, 4.5], 0)
    assert found.p == pytest.approx(expected.pvalue)


def test_a_comparison_by_hand():
    ours = {"a": np.array([3.0, 5.0, 4.0]), "b": np.array([10.0, 12.0, 12.0])}
    theirs = {"a": np.array([2.0, 3.0, 4.0]), "b": np.array([11.0, 9.0, 9.0]), "c": np.ones(1)}
    found = compare(ours, theirs)
    differences = np.array([1, 2, 0, -1, 3, 3])
    assert found.n == 6
    assert found.mean == pytest.approx((1 + 5 / 3) / 2)  # each pair of networks counts alike
    assert found.effect == pytest.approx(differences.mean() / differences.std(ddof=1))
    expected = mean_of([differences[:3], differences[3:]])
    assert found[2:4] == expected[1:3] and found.p == expected.p
    beats = np.mean([(x > y) + (x == y) / 2 for x in ours["a"] for y in theirs["a"]])
    other = np.mean([x > y for x in ours["b"] for y in theirs["b"]])
    assert found.probability == pytest.approx((beats + other) / 2)
    assert compare({"a": np.array([])}, {"a": np.array([])}) is None
    one = compare({"a": np.array([2.0])}, {"a": np.array([1.0])})
    assert one.mean == 1 and math.isnan(one.p) and one.probability == 1


def test_the_correction_is_that_of_holm():
    p = [0.01, 0.04, math.nan, 0.03, 0.5, 0.011]
    got = corrected(p)
    assert math.isnan(got[2])
    # sorted: 0.01 x 5, 0.011 x 4 (not below the one before), 0.03 x 3, 0.04 x 2 (likewise), 0.5
    assert [got[i] for i in (0, 5, 3, 1, 4)] == pytest.approx([0.05, 0.05, 0.09, 0.09, 0.5])
    assert corrected([]) == [] and corrected([0.7, 0.9]) == pytest.approx([1, 1])


REPEATED, TABLES = 4000, 1000
KINDS = {
    "normal": lambda rng, size: rng.normal(size=size),
    "skewed": lambda rng, size: -rng.gamma(2, size=size),
    "tied": lambda rng, size: rng.binomial(100, 0.85, size=size).astype(float),  # of 100 images
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spreads", [[1], [1, 2], [1, 1, 1, 1], [1, 2, 1, 2, 1, 2]], ids=str)
@pytest.mark.parametrize("seeds", [3, 6, 24])
def test_an_interval_holds_the_truth_in_95_of_100_cases(kind, spreads, seeds):
    rng = np.random.default_rng(0)
    size = (REPEATED, len(spreads), seeds)
    ours, theirs = (KINDS[kind](rng, size) * np.array(spreads)[:, None] for _ in range(2))
    found = [mean_of(list(differences)) for differences in ours - theirs]
    left_out = np.mean([each.p < 0.05 for each in found])
    assert 0.03 < left_out < 0.065  # the error of this simulation is 0.0034


@pytest.mark.parametrize("seeds", [3, 10])
def test_a_table_has_a_false_winner_in_at_most_5_of_100_cases(seeds):
    rng = np.random.default_rng(0)
    false = 0
    for _ in range(TABLES):
        scores = rng.normal(size=(8, 2, seeds))
        pairs = itertools.combinations(scores, 2)
        p = [mean_of(list(one - other)).p for one, other in pairs]
        false += min(corrected(p)) < 0.05
    assert false / TABLES < 0.06  # the error of this simulation is 0.007
