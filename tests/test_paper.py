"""Every shipped experiment is planned, whole and in miniature, and fills its tables."""

import csv
import dataclasses
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from analysis.figures import paper_figures
from analysis.records import frames
from analysis.tables import (
    comparison,
    comparison_printing,
    paper_entries,
    paper_printing,
    paper_tables,
    rendering,
)
from analysis.tables.paper_entries import Entry
from pld_ray.config.experiment import experiments_folder, load_experiment
from pld_ray.config.parts import Model
from pld_ray.config.planning import plan
from pld_ray.errors import InputError
from pld_ray.models.factory import create_model
from pld_ray.store.store import Store
from pld_ray.sweep import search

SHIPPED = sorted(path.stem for path in experiments_folder().glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_experiment_is_planned_as_its_header_says(name, tmp_path):
    text = Path(experiments_folder(), f"{name}.yaml").read_text()
    loaded = load_experiment(name)
    made = search.plan(loaded, Store(tmp_path)) if loaded.search else plan(loaded)
    assert len(made.trials) == int(re.search(r"# Cost: (\d+) trials", text)[1])
    assert f"# Command: pld-ray run {name}" in text and "# Reproduces" in text
    assert "# Expect" in text


@pytest.mark.parametrize("name", SHIPPED)
def test_its_miniature_has_the_same_cells(name):
    whole, small = (plan(load_experiment(name, smoke=smoke)) for smoke in (False, True))
    assert small.experiment.name == f"{name}-smoke"
    if not small.experiment.search:  # what a search will choose is not known
        assert [c.trial.id for c in small.originals] == [c.trial.id for c in whole.cells]
    for little, great in zip(small.cells, whole.cells, strict=True):
        # the networks of a miniature are others, to which rules may not apply
        assert little.shown.loss == great.shown.loss and little.trial.seed == great.trial.seed
        assert little.trial.data.name == "digits" and little.trial.workers == 1
        assert little.trial.epochs * 10 < max(great.trial.epochs, 601)
    assert len({c.trial.id for c in small.cells}) == len({c.trial.id for c in whole.cells})


def test_miniatures_keep_pairs_apart_and_train_their_teachers(experiment):
    text = """
base: {data: cifar10, epochs: 99, workers: 2, loss: pld}
grid:
  teacher, student: [[resnet50.a1_in1k, resnet18], [{name: wrn_40_2, train: {epochs: 7}}, resnet8]]
  batch_size: [10, 20]
smoke:
  base: {data: digits, epochs: 3, workers: 1}
  grid: {batch_size: [2, 4]}
  models: {resnet50: {name: resnet20, args: {num_classes: 10}}, resnet18: resnet8}
"""
    experiment(text)
    made = plan(load_experiment(experiment.folder / "small.yaml", ("epochs=5",), True))
    trials = [cell.trial for cell in made.cells]
    assert [t.student.name for t in trials] == ["resnet8"] * 4
    assert [t.teacher_name for t in trials] == ["resnet20"] * 2 + ["wrn_40_2"] * 2
    assert [t.batch_size for t in trials] == [2, 4] * 2
    assert [t.epochs for t in trials] == [5] * 4
    assert trials[2].teacher.epochs == 7 and trials[0].teacher.student.args == {"num_classes": 10}


def test_a_grid_of_another_length_is_told(experiment):
    text = "base: {data: digits, student: resnet8, loss: ce}\ngrid: {epochs: [1, 2]}\n"
    experiment(text + "smoke: {grid: {epochs: [1]}}")
    with pytest.raises(InputError, match=r"smoke.grid.epochs has 1 values: expected as many"):
        load_experiment(experiment.folder / "small.yaml", smoke=True)


def test_trials_shared_by_experiments_are_planned_once():
    plans = [plan(load_experiment(name)) for name in ("cifar100_methods", "runtime", "landscapes")]
    assert plans[1].trials.keys() < plans[0].trials.keys()
    assert plans[2].trials.keys() < plans[0].trials.keys()


# ---------------------------------------------------------------- tables


def empty(table, tmp_path, smoke=False):
    made = plan(load_experiment(table.experiment, smoke=smoke))
    return paper_entries.of_table(table, frames.frame(made, Store(tmp_path / "none")))


def test_every_reported_number_is_in_its_table_and_none_is_in_two_places(tmp_path):
    with open(Path(paper_tables.__file__).parent / "reported.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 278
    for table in paper_tables.TABLES:
        own = [row for row in rows if row["table"] == str(table.number)]
        expected = Counter(f"{float(row['mean'])} {row['metric']}" for row in own)
        if table.numbers == "2":  # one teacher of three pairs, and it stands at each
            assert expected["80.83 top1"] == 3
        found = empty(table, tmp_path)
        got = Counter(f"{e.reported} {e.metric}" for e in found if not math.isnan(e.reported))
        extra = got - expected
        assert not expected - got, table
        # PLD in Table 8 is in the paper's text and figure, its number in Table 6
        assert extra == (Counter(["77.3 top1", "93.28 top5"]) if table.number == 8 else Counter())
        assert all(e.mean != e.mean and not e.scores for e in found)


@pytest.mark.parametrize(
    ("number", "over_dist", "over_kd"), [("2", "+0.42", "+1.04"), ("3", "+0.49", "+1.09")]
)
def test_averages_come_out_as_in_the_paper(tmp_path, number, over_dist, over_kd):
    (table,) = (t for t in paper_tables.TABLES if t.numbers == number)
    text = paper_printing.text(table, empty(table, tmp_path), miniature=False)
    assert re.search(rf"\| average +\| +\{over_dist} \| +\{over_kd} \|", text)
    assert "no trial of" in text and "±" not in text


def test_reported_deviations_and_settings_find_their_cells(tmp_path):
    def value(number, row, column):
        (table,) = (t for t in paper_tables.TABLES if t.numbers == number)
        (found,) = (e for e in empty(table, tmp_path) if (e.row, e.column) == (row, column))
        return found.reported, found.reported_std

    assert value("1", "PLD", "resnet32x4 → resnet8x4") == (73.97, 0.05)
    assert value("5 and 8", "KD (CE = 0.3)", "top-5 %")[0] == 93.02
    assert value("9", "adan", "DIST")[0] == 70.07
    assert value("10", "PLD (standardize = teacher)", "top-1 %")[0] == 70.81
    assert value("11", "KD (divergence = jensen_shannon)", "top-1 %")[0] == 69.83
    assert value("12", "vit_base_patch16_224 → resnet50", "PLD")[0] == 0.66
    assert value("13", "VID", "resnet50 → mobilenetv2")[0] == 132.06


TOP1 = {"kd": 70.0, "dist": 71.0, "pld": 72.0}


@pytest.fixture
def finished(tmp_path):
    """A store with made-up records of cifar100_methods: three methods, two pairs, not all seeds."""
    made, store = plan(load_experiment("cifar100_methods")), Store(tmp_path / "results")
    for cell in made.cells:
        trial = cell.trial
        if trial.loss.name not in TOP1 or trial.student.name not in ("wrn_40_1", "resnet20"):
            continue
        if trial.loss.name == "kd" and trial.seed == 2:
            continue
        top1 = TOP1[trial.loss.name] + trial.seed + (5 if trial.student.name == "resnet20" else 0)
        record = {"metrics": {"top1": top1}, "parameters": 1}
        record["seconds"] = {"seconds": 60.0, "teacher_avoided_seconds": 30.0}
        store.finish(trial, record, {"w": torch.zeros(1)})
    return made, store


def test_ours_stand_beside_what_is_reported(finished, tmp_path):
    table = paper_tables.TABLES[0]
    found = paper_entries.of_table(table, frames.frame(*finished))
    cells = paper_printing.printed(table, found, miniature=False).set_index("Method")
    pair = "wrn_40_2 → wrn_40_1"
    assert cells.loc["PLD", pair] == "73.00±1.00 [73.50±0.30, −0.50]"
    assert cells.loc["KD", pair] == "70.50±0.71 (n=2) [72.44±0.36, −1.94]"
    assert cells.loc["CE", pair] == "– [70.26±0.24]"
    small = paper_printing.printed(table, found, miniature=True).set_index("Method")
    assert small.loc["PLD", pair] == "73.00±1.00 [73.50±0.30]"
    gains = paper_printing.printed_gains(table, found, miniature=False).set_index("PLD's gain")
    assert gains.loc[pair, "over KD"] == "+2.00 [+1.06]"  # over the two seeds of both
    assert gains.loc["resnet32x4 → resnet8x4", "over KD"] == "– [+1.86]"
    assert gains.loc["average", "over KD"] == "– [+1.32]"
    paths = {p.suffix: p for p in paper_printing.write(table, found, False, tmp_path)}
    assert paths[".md"].name == "table-1.md"
    with open(paths[".csv"], newline="") as file:
        rows = {(row["row"], row["column"]): row for row in csv.DictReader(file)}
    row = rows["PLD", pair]
    assert (float(row["mean"]), float(row["std"]), row["n"]) == (73, 1, "3")
    assert float(row["difference"]) == pytest.approx(-0.5) and float(row["low"]) == pytest.approx(
        73 - 4.302653 / 3**0.5
    )
    assert r"\toprule" in paths[".tex"].read_text() and paths[".tex"].read_text().isascii()


def test_minutes_count_what_the_bank_spared(finished):
    (table,) = (t for t in paper_tables.TABLES if t.numbers == "13")
    made = plan(load_experiment(table.experiment))
    found = paper_entries.of_table(table, frames.frame(made, finished[1]))
    (ours,) = (e for e in found if (e.row, e.column) == ("PLD", "resnet56 → resnet20"))
    assert ours.mean == 1.5 and len(ours.scores) == 1


def test_a_winner_needs_runs_enough(finished):
    frame = frames.frame(*finished)
    found = paper_entries.of_table(paper_tables.TABLES[0], frame)
    assert not any(entry.best for entry in found)
    table = comparison.against(frame).set_index("against")
    assert list(table.index) == ["KD", "DIST"]
    assert table.loc["DIST", "n"] == 6 and table.loc["DIST", "mean"] == 1
    assert table["p"].isna().all() and not table["decided"].any()  # equal differences say nothing
    printed = comparison_printing.printed_against(table.reset_index()).set_index("PLD against")
    assert printed.loc["DIST", ["Gain [95 %]", "p"]].tolist() == ["+1.00", "–"]


def test_a_gain_is_decided_by_three_runs_that_agree(finished):
    made, store = finished
    for cell in made.cells:
        loss, seed = cell.trial.loss.name, cell.trial.seed
        if loss in ("dist", "pld") and cell.trial.student.name == "wrn_40_1":
            gain = (0.9, 1.0, 1.1)[seed] if loss == "pld" else 0.0
            record = {"metrics": {"top1": 70 + gain}, "seconds": {"seconds": 1.0}}
            store.finish(cell.trial, record, {"w": torch.zeros(1)})
    frame = frames.frame(made, store)
    frame = frame[(frame["student"] == "wrn_40_1") & frame["loss"].isin(["dist", "pld"])]
    printed = comparison_printing.printed_against(comparison.against(frame)).set_index(
        "PLD against"
    )
    assert (
        printed.loc["DIST", "Gain [95 %]"] == "**+1.00 [+0.75, +1.25]**"
    )  # 4.3027 x 0.1 / sqrt(3)


def test_the_best_of_a_table_is_decided_over_all_its_cells():
    def entry(place, loss, scores, metric="top1"):
        return Entry("", place, metric, loss, place, dict(enumerate(scores)), 8, 0, 0)

    gains = [0.5, 0.6, 0.7, 0.5, 0.6, 0.8]
    p = stats.ttest_1samp(gains, 0).pvalue
    base = np.array([1.0, 2, 3, 4, 5, 6])
    better = base + np.array(gains)
    many = [entry("a", "kd", base), entry("a", "pld", better), entry("a", "teacher", base + 9)]
    assert paper_entries.best(many) == [False, True, False] and 2 * p < 0.05
    lower = [dataclasses.replace(e, metric="kl_teacher_student") for e in many]
    assert paper_entries.best(lower) == [True, False, False]
    few = int(0.05 / p) // 2
    for places, decided in ((few, True), (few + 1, False)):  # two cells more at each further place
        others = [entry(f"{n}", loss, base) for n in range(places - 1) for loss in ("kd", "pld")]
        assert paper_entries.best([*many, *others])[1] is decided


def test_tables_as_text_latex_and_html():
    cells = pd.DataFrame([{"Method": "KD (τ = 1)", "top-1": "**1.00±0.10** [−]"}])
    assert rendering.markdown(cells, 1).splitlines()[1] == "| ---------- | ----------------: |"
    assert r"KD ($\tau$ = 1) & \textbf{1.00$\pm$0.10} [$-$]" in rendering.latex(cells, 1)
    html = rendering.html(pd.DataFrame([{"<a>": "**b**", "n": "1"}]), 1)
    assert "<th>&lt;a&gt;</th><th class=n>n</th>" in html
    assert "<td><strong>b</strong></td><td class=n>1</td>" in html


# ---------------------------------------------------------------- figures


def test_figure_sizes_are_those_of_the_networks():
    for name, millions in paper_figures.MILLIONS.items():
        with torch.device("meta"):
            network = create_model(Model(name=name), 1000, 3, 224)
        parameters = sum(x.numel() for x in network.parameters())
        assert round(parameters / 1e6, 2) == millions


def test_reported_marks_are_hollow_and_ours_filled(tmp_path):
    def points(loss):
        found = empty(paper_tables.TABLES[1], tmp_path)
        shown = [e for e in found if e.trial and e.loss == loss]
        return shown, [dataclasses.replace(e, scores={0: 70.0 + i}) for i, e in enumerate(shown)]

    reported, both = points("pld")
    (line,) = paper_figures.sizes(reported, of_teacher=False).axes[0].lines
    assert line.get_markerfacecolor() == "white"
    assert list(line.get_xdata()) == [3.77, 9.72, 11.07, 22.05, 25.56]
    assert list(line.get_ydata()) == [70.07, 75.72, 76.33, 75.63, 77.30]
    ours, *_, known = paper_figures.sizes(both, of_teacher=False).axes[0].lines
    assert list(ours.get_ydata()) == [74, 73, 72, 70, 71] and ours.get_markerfacecolor() != "white"
    assert known.get_markerfacecolor() == "white"


@pytest.mark.parametrize(
    ("experiment", "figure"),
    [
        ("ce_weight", "figure-1a"),
        ("longer_training", "figure-1b"),
        ("homogeneous_pairs", "figure-2a"),
        ("heterogeneous_teachers", "figure-2b"),
    ],
)
def test_the_papers_figures_are_drawn_without_results(tmp_path, experiment, figure):
    frame = frames.frame(plan(load_experiment(experiment)), Store(tmp_path / "none"))
    paths = paper_figures.draw_paper(frame, experiment, miniature=False, folder=tmp_path)
    assert [path.name for path in paths] == [f"{figure}.png"]
    assert paper_figures.draw_paper(frame, f"{experiment}-smoke", True, tmp_path / "x") == []
    assert not (tmp_path / "x").exists()
