import json

import numpy as np
import pytest
import torch

import pld_ray
from analysis.statistics import power
from analysis.statistics.paired import mean_of
from pld_ray.store.store import Store


@pytest.mark.parametrize(
    ("effect", "seeds"),
    [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10), (1.5, 6)],
)
def test_seeds_of_the_published_tables(effect, seeds):
    """Paired t-test, two-sided 5 %, power 0.8: the sample sizes of G*Power by effect size d."""
    assert power.seeds_needed(effect, np.array([1.0])) == seeds
    assert power.seeds_needed(2 * effect, np.array([2.0])) == seeds  # only the ratio counts


def test_the_level_is_the_power_without_a_gain():
    for level in (0.05, 0.01):
        assert power.power(0.0, np.array([1.0, 3.0]), 6, level) == pytest.approx(level)


@pytest.mark.parametrize(
    ("spread", "effect", "seeds"), [([1.0], 1.2, 8), ([1.0, 1.0, 2.0], 0.8, 6), ([0.5], 2.0, 3)]
)
def test_the_power_is_that_of_simulated_comparisons(spread, effect, seeds):
    rng = np.random.default_rng(0)
    spread = np.array(spread)
    repeats = 3000
    decided = 0
    for _ in range(repeats):
        samples = [rng.normal(effect, each, seeds) for each in spread]
        decided += mean_of(samples).p < 0.05
    expected = power.power(effect, spread, seeds)
    assert decided / repeats == pytest.approx(expected, abs=0.035)


def test_the_detectable_gain_has_the_wanted_power():
    spread = np.array([1.0, 2.0])
    for seeds in (3, 10):
        found = power.detectable(spread, seeds, 0.01, 0.9)
        assert power.power(found, spread, seeds, 0.01) == pytest.approx(0.9, abs=1e-3)
    assert power.detectable(np.zeros(2), 3) == 0


def test_too_many_seeds_are_not_named():
    assert power.seeds_needed(0.001, np.array([5.0])) is None


def test_the_bound_of_the_spread_by_hand():
    """Variance 1 of three runs: 2 / (the 20 % quantile of chi-squared with 2 degrees)."""
    runs = [np.array([-1.0, 0.0, 1.0])]
    assert power.spreads(runs) == pytest.approx([1])
    assert power.spreads(runs, 0.8) == pytest.approx([np.sqrt(2 / (-2 * np.log(0.8)))])


def test_the_command(cli, tmp_path):
    text = "base: {data: digits, student: resnet8, teacher: resnet20, epochs: 1}\n"
    text += "grid: {loss: [ce, kd, pld]}\nseeds: [0, 1, 2, 3]\n"
    file = tmp_path / "small.yaml"
    file.write_text(text)
    wanted = {"ce": [1.0, 2.0, 3.0, 2.0], "kd": [5.0], "pld": [2.0, 4.0, 6.0, 3.0]}
    store = Store(tmp_path / "results")
    arguments = (str(file), "--storage", str(tmp_path / "results"))
    failed = cli("power", *arguments, cwd=tmp_path)
    assert failed.returncode == 2 and "nothing is known about the spread yet" in failed.stderr
    for trial in pld_ray.plan(file, storage=tmp_path / "results").trials.values():
        scores = wanted[trial.loss.name]
        if trial.student.name == "resnet8" and trial.seed < len(scores):
            record = {"metrics": {"top1": scores[trial.seed]}, "seconds": {"seconds": 1.0}}
            store.finish(trial, record, {"w": torch.zeros(1)})
    rows = json.loads(cli("power", *arguments, "--effect", "3", "--json", cwd=tmp_path).stdout)
    ce, kd = rows
    # PLD minus CE: 1, 2, 3, 1: variance 11 / 12
    assert ce["against"] == "CE" and ce["gain"] == 1.75
    assert ce["spread"] == pytest.approx((11 / 12) ** 0.5) and ce["seeds"] == 4
    spread = np.array([ce["spread"]])
    assert ce["seeds_3"] == power.seeds_needed(3, spread, 0.025)
    assert ce["detectable"] == pytest.approx(power.detectable(spread, 4, 0.025), abs=1e-3)
    assert kd["against"] == "KD" and kd["seeds"] == 1 and kd["spread"] is None
    shown = cli("power", *arguments, "--effect", "3", cwd=tmp_path).stdout
    assert "corrected for 2 comparisons" in shown and "| KD" in shown
    wrong = cli("power", *arguments, "--effect", "-1", cwd=tmp_path)
    assert wrong.returncode == 2 and "--effect is -1.0" in wrong.stderr
