"""The figures of a search show its trials, and find the field that matters."""

import math

import numpy as np
import pytest
import torch

from analysis.figures import searches
from analysis.tables import best
from pld_ray.api import session
from pld_ray.config.experiment import load_experiment
from pld_ray.store.store import Store
from pld_ray.sweep import search

TEXT = """
base: {data: digits, student: resnet8, teacher: resnet20, epochs: 2}
grid: {loss: [ce, {name: kd, temperature: 2}]}
search:
  space:
    optimizer.lr: {loguniform: [1e-4, 1e-1]}
    optimizer.weight_decay: {uniform: [0, 1]}
    kd.temperature: {int: [1, 8]}
    batch_size: {choice: [32, 64, 128]}
  num_trials: 60
seeds: [1, 2]
"""


def score(trial):
    return 90 - 4 * math.log10(trial.optimizer.lr / 3e-3) ** 2 + 0.1 * trial.optimizer.weight_decay


@pytest.fixture
def sought(tmp_path):
    """An experiment whose search has 60 trials for each of two losses: 57 done, 2 stopped."""
    (tmp_path / "sought.yaml").write_text(TEXT)
    experiment, store = load_experiment(tmp_path / "sought.yaml"), Store(tmp_path / "results")
    for each in search.look(experiment, store):
        for number, drawn in enumerate(each.drawn):
            history = [{"epoch": 1, "top1": 50.0}]
            if number < 57:
                record = {"metrics": {"top1": score(drawn.trial)}, "seconds": {"seconds": 1.0}}
                store.finish(drawn.trial, record, {"w": torch.zeros(1)})
            elif number < 59:
                store.log(drawn.trial, history)
                store.stop(drawn.trial, "asha")
    return experiment, store


def drawn(experiment, store):
    progress = search.look(experiment, store)
    space = {field: found for each in progress for field, found in each.group.space.items()}
    return best.drawn(progress), space


def test_the_table_of_drawn_trials(sought):
    table, space = drawn(*sought)
    assert len(table) == 120 and list(table["number"]) == [*range(1, 61)] * 2
    assert list(space) == [
        "optimizer.lr",
        "optimizer.weight_decay",
        "batch_size",
        "loss.temperature",
    ]
    assert set(table.columns) >= {"method", "state", "score", *space}
    ce = table[table["method"] == "CE"]
    assert ce["loss.temperature"].isna().all() and table["score"].notna().sum() == 118
    first = search.look(*sought)[0].drawn[0]
    assert ce["score"].iloc[0] == score(first.trial)


def test_history_and_best_so_far(sought):
    table, space = drawn(*sought)
    pictures, told = searches.draw(table, space, "top1", "max")
    assert list(pictures) == ["search-history", "search-parallel", "search-importance"] and not told
    axes = pictures["search-history"].axes
    assert len(axes) == 2
    for axis, (_, cell) in zip(axes, table.groupby("method", sort=False), strict=True):
        finished, stopped, best_so_far = axis.lines
        values = cell["score"].to_numpy()[:57]
        assert list(finished.get_ydata()) == list(values)
        assert list(stopped.get_ydata())[:2] == [50, 50]
        assert list(best_so_far.get_ydata()) == list(np.maximum.accumulate(values))


def test_the_field_that_matters_is_the_most_important(sought):
    table, space = drawn(*sought)
    for method, cell in table.groupby("method"):
        found = searches.importances(cell, space)
        assert sum(found.values()) == pytest.approx(1)
        assert max(found, key=found.get) == "optimizer.lr" and found["optimizer.lr"] > 0.7
        assert ("loss.temperature" in found) == (method == "KD")
    few = table[table["number"] < 8]
    assert searches.importances(few[few["method"] == "CE"], space) == {}
    equal = table.assign(score=1.0)
    assert searches.importances(equal[equal["method"] == "CE"], space) == {}


def test_parallel_coordinates_by_hand(sought):
    table, space = drawn(*sought)
    one = table[(table["method"] == "CE") & (table["number"] == 1)]
    picture = searches.parallel([(("s", "t", "", "CE"), one)], space, "top1")
    (line,) = [each for each in picture.axes[0].lines if len(each.get_xdata()) == 3]
    row = one.iloc[0]
    expected = [
        math.log(row["optimizer.lr"] / 1e-4) / math.log(1e3),
        row["optimizer.weight_decay"],
        [32, 64, 128].index(row["batch_size"]) / 2,
    ]
    assert list(line.get_ydata()) == pytest.approx(expected)


def test_figures_of_a_search_that_is_not_finished(sought, tmp_path, capsys):
    experiment, store = sought
    paths = session.draw_figures(session.planned(experiment, store), store, tmp_path / "out")
    names = [path.name for path in paths]
    assert names == ["search-history.png", "search-parallel.png", "search-importance.png"]
    empty = Store(tmp_path / "none")
    assert session.draw_figures(session.planned(experiment, empty), empty, tmp_path / "no") == []
