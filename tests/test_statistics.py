import itertools
import math

import numpy as np
import pytest

from analysis.statistics import paired
from analysis.statistics.paired import compare, corrected, interval


def test_the_interval_of_a_large_sample_is_the_normal_one():
    scores = np.random.default_rng(0).normal(70, 2, 400)
    half = 1.96 * scores.std(ddof=1) / 20
    assert interval(scores) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.05)
    assert all(math.isnan(x) for x in interval(scores[:1]))
    assert interval(np.array([3.0, 3.0])) == (3, 3)


def test_the_interval_of_three_is_that_of_all_27_resamples():
    scores = np.array([1.0, 2.0, 6.0])
    means = sorted(np.mean(x) for x in itertools.product(scores, repeat=3))
    assert interval(scores) == (means[0], means[-1])  # each is 1 of 27: more than 2.5 %


def test_a_comparison_by_hand():
    ours = {"a": np.array([3.0, 5.0, 4.0]), "b": np.array([10.0, 12.0])}
    theirs = {"a": np.array([2.0, 3.0, 4.0]), "b": np.array([11.0, 9.0]), "c": np.array([1.0])}
    found = compare(ours, theirs)
    differences = np.array([1, 2, 0, -1, 3])
    assert found.n == 5
    assert found.mean == pytest.approx((1 + 1) / 2)  # each pair of networks counts alike
    assert found.effect == pytest.approx(differences.mean() / differences.std(ddof=1))
    flips = [np.dot(s, differences) for s in itertools.product((-1, 1), repeat=5)]
    assert found.p == pytest.approx(2 * np.mean([f >= differences.sum() for f in flips]))
    beats = np.mean([(x > y) + (x == y) / 2 for x in ours["a"] for y in theirs["a"]])
    other = np.mean([x > y for x in ours["b"] for y in theirs["b"]])
    assert found.probability == pytest.approx((beats + other) / 2)
    assert found.low >= (0 - 1) / 2 and found.high <= (2 + 3) / 2
    assert not found.decided


def test_nothing_is_decided_by_few_runs_or_by_none():
    better = {"a": np.array([2.0, 3, 4, 5, 6])}, {"a": np.array([1.0, 2, 2, 4, 4])}
    assert compare(*better).low > 0 and not compare(*better).decided
    more = [{"a": np.append(x["a"], [7.0 - i])} for i, x in enumerate(better)]
    assert compare(*more).decided
    one = compare({"a": np.array([2.0])}, {"a": np.array([1.0])})
    assert one.mean == 1 and math.isnan(one.p) and not one.decided and one.probability == 1
    assert compare({"a": np.array([])}, {"a": np.array([])}) is None


def test_single_runs_are_resampled_over_pairs():
    ours = {str(i): np.array([float(i)]) for i in range(8)}
    theirs = {str(i): np.array([i - 1.0 - (i % 2)]) for i in range(8)}
    found = compare(ours, theirs)
    assert found.mean == 1.5 and 1 < found.low < 1.5 < found.high < 2 and found.decided
    assert found.p == pytest.approx(2 / 2**8)


def test_correction_for_many_is_that_of_benjamini_and_hochberg():
    p = [0.01, 0.04, math.nan, 0.03, 0.5]
    got = corrected(p)
    assert math.isnan(got[2])
    assert got[:2] == pytest.approx([0.04, 4 / 3 * 0.04]) and got[4] == pytest.approx(0.5)
    assert got[3] == pytest.approx(min(0.03 * 4 / 2, got[1]))


def test_intervals_hold_what_they_say():
    rng = np.random.default_rng(1)
    before, paired.RESAMPLES = paired.RESAMPLES, 499
    hits = [low <= 0 <= high for low, high in (interval(rng.normal(size=30)) for _ in range(200))]
    paired.RESAMPLES = before
    assert 0.89 < np.mean(hits) < 0.99
