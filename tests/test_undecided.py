"""Seeds that are added until the order of the methods is decided."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import pld_ray
from analysis.records import frames
from analysis.statistics import paired, sequential
from analysis.tables import comparison, comparison_printing, undecided
from pld_ray.api import added_seeds, session
from pld_ray.config.experiment import load_experiment
from pld_ray.config.parts import Seeds
from pld_ray.errors import InputError
from pld_ray.store.store import Store

LOOKS = (3, 4, 6, 9, 14, 20)
RULE = Seeds(min=3, max=20, until="decided", effect=0.2)
TEXT = """
base:
  data: {name: digits, limit: 100}
  student: resnet8
  teacher: {name: resnet8, train: {epochs: 1}}
  epochs: 1
  batch_size: 50
grid: {loss: [ce, kd, pld]}
seeds: {min: 3, max: 9, until: decided, effect: 0.5}
"""


@pytest.mark.parametrize(
    ("spent", "expected"),
    [  # 5 equal looks, two-sided 5 %: the published bounds of both spending functions
        (
            lambda t: 4 * stats.norm.sf(stats.norm.isf(0.05 / 4) / np.sqrt(t)),  # O'Brien, Fleming
            [4.877, 3.357, 2.680, 2.290, 2.031],
        ),
        (lambda t: 0.05 * np.log(1 + (np.e - 1) * t), [2.438, 2.427, 2.410, 2.397, 2.386]),
    ],
)
def test_the_published_bounds(spent, expected):
    fractions = np.arange(1, 6) / 5
    assert sequential.bounds(fractions, spent(fractions)) == pytest.approx(expected, abs=6e-4)


def test_the_p_value_is_the_level_at_which_a_look_rejects():
    for level in (0.2, 0.05, 0.01, 1e-4):
        for look, at in enumerate(sequential.levels(LOOKS, level)):
            p = [0.9] * look + [at]
            assert sequential.adjusted(p, LOOKS) == pytest.approx(level, rel=2e-3)
    assert sequential.adjusted([np.nan], LOOKS) == 1
    assert sequential.adjusted([0.0005, np.nan], LOOKS) < 0.05  # it stays decided


@pytest.mark.parametrize("draw", ["normal", "skewed", "two pairs"])
def test_looking_again_and_again_keeps_the_error(draw):
    rng, repeats = np.random.default_rng(0), 4000
    naive = found = 0
    for _ in range(repeats):
        if draw == "skewed":
            samples = [rng.gamma(2, size=20) - rng.gamma(2, size=20)]
        elif draw == "normal":
            samples = [rng.normal(size=20)]
        else:
            samples = [rng.normal(size=20), rng.normal(size=20) * 2]
        p = [paired.mean_of([each[:n] for each in samples]).p for n in LOOKS]
        naive += min(p) < 0.05
        found += sequential.adjusted(p, LOOKS) < 0.05
    assert naive / repeats > 0.12  # what it is good for
    assert 0.035 < found / repeats < 0.057  # 5 % and two standard errors


def test_intervals_and_p_values_agree_at_each_look():
    rng, decided = np.random.default_rng(0), 0
    for _ in range(200):
        samples = [rng.normal(0.6, 1, 20), rng.normal(0.3, 2, 20)]
        looks = [paired.mean_at_looks([each[:n] for each in samples], LOOKS) for n in LOOKS]
        outside = [each.low > 0 or each.high < 0 for each in looks]
        assert [each.p < 0.05 for each in looks] == list(itertools.accumulate(outside, max))
        decided += outside[-1]
    assert 20 < decided < 180


def records_of(scores, looks=LOOKS):
    """Make records of one pair of networks: the scores of each method, seed by seed."""
    rows = [
        {"id": f"{method}{seed}", "seed": seed, "student": "s", "teacher": "t", "setting": ""}
        | {"method": method, "loss": method.lower(), "reference": method == "PLD", "looks": looks}
        | {"finished": not np.isnan(value), "top1": value}
        for method, values in scores.items()
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def states(found):
    return {each.method: (each.state, each.seeds) for each in found}


def test_the_order_of_the_looks():
    """A clear loss is decided early, equal methods when the interval is narrow, others never."""
    wave = np.array([(-1) ** n * (1 + n % 3) for n in range(20)]) / 10
    scores = {
        "PLD": np.full(20, 80.0),
        "CE": 70 + wave,
        "KD": 80 + wave / 100,
        "DIST": 80 + 5 * wave,
    }
    found = undecided.progress(records_of(scores), RULE)
    assert states(found) == {"CE": ("decided", 3), "KD": ("small", 3), "DIST": ("max", 20)}
    wanted = undecided.seeds_wanted(records_of(scores), RULE, found)
    assert wanted[("s", "t", "", "PLD")] == 20 and wanted[("s", "t", "", "CE")] == 3
    ce = next(each for each in found if each.method == "CE")
    differences = 80 - scores["CE"][:3]
    half = stats.t.isf(sequential.levels(LOOKS)[0] / 2, 2) * differences.std(ddof=1) / 3**0.5
    assert ce.gain.high - ce.gain.mean == pytest.approx(half)
    without = RULE.model_copy(update={"effect": None})
    assert states(undecided.progress(records_of(scores), without))["KD"] == ("max", 20)


def test_a_look_waits_for_all_of_its_trials():
    scores = {"PLD": [80.0] * 4, "CE": [70.0, 71, 72, np.nan], "KD": [80.0, 81, 79, 80]}
    found = undecided.progress(records_of(scores), RULE)
    assert states(found) == {"CE": ("open", 4), "KD": ("open", 4)}
    assert found[1].gain.mean == 0  # at 3 seeds: the look at 4 has not come
    scores["CE"][1] = np.nan
    found = undecided.progress(records_of(scores), RULE)
    assert states(found) == {"CE": ("open", 3), "KD": ("open", 3)} and found[1].gain is None
    found = undecided.progress(records_of(scores), RULE, {"CE1"})
    assert states(found) == {"CE": ("failed", 3), "KD": ("open", 6)}


def test_runs_after_the_last_look_do_not_count_yet():
    differences = {0: np.array([1.0, 1.2, 0.9, 1.1, 30.0])}
    zero = {0: np.zeros(5)}
    found = paired.compare(differences, zero, LOOKS)
    assert found.n == 4 and found.mean == pytest.approx(1.05) and found.wins == 4
    few = paired.compare({0: np.array([1.0, 2.0])}, {0: np.zeros(2)}, LOOKS)
    assert few.n == 2 and np.isnan([few.low, few.high, few.p]).all()


def finish(plan, store, score):
    """Finish the trials of a plan, without running them, as `score(loss, seed)` says."""
    for trial in plan.trials.values():
        record = {"metrics": {"top1": score(trial.loss.name, trial.seed)}}
        store.finish(trial, record | {"seconds": {"seconds": 1.0}}, {"w": torch.zeros(1)})


def score(loss, seed):
    noise = (-1) ** seed * (1 + seed % 3) / 10
    return {"ce": 60 + noise, "kd": 79 + 20 * noise, "pld": 80.0}[loss]


def test_a_plan_grows_where_it_is_not_decided(experiment, tmp_path):
    store, made, sizes = Store(tmp_path / "results"), experiment(TEXT), []
    for _ in range(5):
        plan = session.planned(made, store)
        frame = frames.frame(plan, store)
        sizes.append(frame.groupby("loss").size().to_dict())
        assert len(plan.originals) == len(plan.cells)
        finish(plan, store, score)
    assert sizes[0] == {"ce": 3, "kd": 3, "pld": 3}
    assert sizes[1] == {"ce": 3, "kd": 4, "pld": 4}
    assert sizes[2] == {"ce": 3, "kd": 6, "pld": 6}
    assert sizes[3] == sizes[4] == {"ce": 3, "kd": 9, "pld": 9}
    table = comparison.against(frame).set_index("against")
    assert table["n"].to_dict() == {"CE": 3, "KD": 9}
    assert table["decided"].to_dict() == {"CE": True, "KD": False}
    differences = np.array([80 - score("kd", seed) for seed in range(9)])
    at = made.looks, [stats.ttest_1samp(differences[:n], 0).pvalue for n in made.looks]
    assert table.loc["KD", "p"] == pytest.approx(sequential.adjusted(at[1], at[0]))
    printed = comparison_printing.text(comparison.tables(frame), made)
    assert "at 3, 4, 6, 9\nseeds" in printed or "at 3, 4, 6, 9 seeds" in printed.replace("\n", " ")


def test_a_miniature_grows_beside_its_original(experiment, tmp_path):
    store = Store(tmp_path / "results")
    experiment(TEXT)
    made = load_experiment(experiment.folder / "small.yaml", smoke=True)
    finish(session.planned(made, store), store, score)
    plan = session.planned(made, store)
    assert [c.trial.seed for c in plan.originals] == [c.trial.seed for c in plan.cells]
    assert len(plan.cells) == 3 + 4 + 4


def test_the_best_settings_of_a_search_grow_too(experiment, tmp_path):
    text = TEXT + "search: {space: {optimizer.lr: {choice: [0.1, 0.2]}}, algorithm: grid}\n"
    with pytest.raises(InputError, match=r"search\.seed is 0, which is also one of seeds"):
        experiment(text)
    store = Store(tmp_path / "results")
    made = experiment(text.replace("min: 3", "first: 1, min: 3"))
    plan = session.planned(made, store)
    assert not plan.cells and len(plan.searched) == 6
    for expected in ({"ce": 3, "kd": 3, "pld": 3}, {"ce": 3, "kd": 4, "pld": 4}):
        finish(plan, store, score)
        plan = session.planned(made, store)
        counted = pd.Series([cell.trial.loss.name for cell in plan.cells]).value_counts()
        assert counted.to_dict() == expected and len(plan.points) == len(plan.cells)


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        ("{min: 2, max: 9, until: decided}", r"seeds\.min is 2: input should be greater than"),
        ("{min: 5, max: 5, until: decided}", r"seeds: max is 5: expected more seeds than min, 5"),
        ("{max: 9}", r"seeds\.until: the field is missing"),
        ("{max: 9, until: bored}", r"seeds\.until is 'bored'; accepted: decided"),
        ("{max: 9, untl: decided}", r"seeds\.untl: unknown field; did you mean 'until'\?"),
        ("{max: 9, until: decided, effect: 0}", r"seeds\.effect is 0: "),
        ("{max: 9, until: decided, first: 9223372036854775807}", r"seeds\.first is 92233"),
        ("7", r"seeds is 7: expected a list, such as \[0, 1, 2\], or a rule"),
        ("[0, x]", r"seeds\.1 is 'x': "),
    ],
)
def test_wrong_rules(experiment, seeds, said):
    line = "seeds: {min: 3, max: 9, until: decided, effect: 0.5}"
    with pytest.raises(InputError, match=said):
        experiment(TEXT.replace(line, f"seeds: {seeds}"))


@pytest.mark.parametrize(
    "search",
    ["", "search: {space: {optimizer.lr: {choice: [0.1, 0.2]}}, algorithm: grid, seed: 99}"],
)
def test_a_rule_needs_a_comparison(experiment, tmp_path, search):
    made = experiment(TEXT.replace("[ce, kd, pld]", "[pld]") + search)
    with pytest.raises(InputError, match=r"seeds\.until is 'decided': expected at least two"):
        pld_ray.plan(made, storage=tmp_path / "results")


def test_table_and_rule_correct_for_the_same_comparisons():
    """KD never differs from PLD, so it says nothing; it counts for the correction of CE."""
    differences = np.array([0.4, 3.9, 1, 0.8, -1.5, 2.5, -0.9, 2.2, 0.1]) + 0.54
    rule = Seeds(min=3, max=9, until="decided")
    scores = {"PLD": np.full(9, 80.0), "CE": 80 - differences, "KD": np.full(9, 80.0)}
    records = records_of(scores, rule.looks)
    found = undecided.progress(records, rule)
    assert states(found) == {"CE": ("max", 9), "KD": ("max", 9)}
    assert ("PLD against KD", "not decided with all 9 seeds; gain +0.00, the same in all runs") in (
        undecided.described(found, "PLD", None)
    )
    for rows in (records, records[(records["method"] != "KD") | (records["seed"] == 99)]):
        table = comparison.against(rows).set_index("against")
        p = table.loc["CE", "p"]
        assert p < 0.05 and table.loc["CE", "corrected"] == pytest.approx(
            2 * p if "KD" in table.index else p
        )
    assert not comparison.against(records)["decided"].any()


def test_trials_that_failed_for_good(experiment, tmp_path):
    """All trials of KD on one pair; then the teacher of KD and PLD."""
    store = Store(tmp_path / "results")
    text = TEXT.replace("[ce, kd, pld]", "[ce, kd, pld], student: [resnet8, resnet14]")
    made = experiment(text)
    plan = session.planned(made, store)
    for trial in plan.trials.values():
        if trial.loss.name == "kd" and trial.student.name == "resnet14":
            store.fail(trial.id, "NaN", "", final=True)
        else:
            record = {"metrics": {"top1": score(trial.loss.name, trial.seed)}}
            store.finish(trial, record | {"seconds": {"seconds": 1.0}}, {"w": torch.zeros(1)})
    plan = session.planned(made, store)
    found = added_seeds.progress(plan, frames.frame(plan, store), store)
    assert states(found) == {"CE": ("decided", 3), "KD": ("failed", 3)}
    assert len(plan.cells) == 2 * 3 * 3

    other = Store(tmp_path / "other")
    for trial in plan.trials.values():
        if trial.id in plan.teacher_ids:
            other.fail(trial.id, "NaN", "", final=True)
        elif trial.teacher is None:
            record = {"metrics": {"top1": 60.0}, "seconds": {"seconds": 1.0}}
            other.finish(trial, record, {"w": torch.zeros(1)})
    again = session.planned(made, other)
    found = added_seeds.progress(again, frames.frame(again, other), other)
    assert states(found) == {"CE": ("failed", 3), "KD": ("failed", 3)}


@pytest.mark.slow
def test_a_run_adds_seeds_until_the_rule_is_met(tmp_path, monkeypatch, capsys, local_ray):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grown.yaml").write_text(TEXT.replace("max: 9", "max: 4"))
    found = pld_ray.run("grown.yaml")
    said = capsys.readouterr().out
    assert found.failures == {} and said.count("seeds (at 3, 4)") in (1, 2)
    frame = frames.frame(found.plan, found.store)
    states = undecided.progress(frame, found.plan.experiment.seeds)
    assert all(each.state in ("decided", "small", "max") for each in states)
    assert frame.groupby("method").size()[[each.method for each in states]].tolist() == [
        each.seeds for each in states
    ]
    trials = found.trials.keys()
    assert pld_ray.run("grown.yaml").trials.keys() == trials
    assert "trials are done" in capsys.readouterr().out
