"""Some of the paper's experiments in miniature, from the YAML file to the table and the figure."""

import pytest
from rich.console import Console

from analysis import figures, paper, records, weight_space
from pld_ray import sweep
from pld_ray.experiment import load_experiment, plan
from pld_ray.store import Store
from pld_ray.view import View


def run(name, store):
    made = plan(load_experiment(name, smoke=True))
    images = sweep.check(made.trials)
    with View(made, dict(made.trials), Console(quiet=True)) as view:
        assert sweep.run(made, images, store, view) == {}
    return made, images


@pytest.mark.parametrize("name", ["divergences", "logit_standardization", "longer_training"])
def test_a_miniature_fills_its_table(name, local_ray, tmp_path):
    store = Store(tmp_path / "results")
    made, _ = run(name, store)
    assert store.finished(store.trials()) == set(made.trials)
    frame = records.frame(made, store)
    (table,) = paper.of_experiment(f"{name}-smoke")
    found = paper.entries(table, frame)
    assert found and all(len(entry.scores) == entry.planned for entry in found)
    assert all(0 <= entry.mean <= 100 and entry.reported > 60 for entry in found)
    drawn = figures.draw_paper(frame, made.experiment.name, True, tmp_path)
    assert [path.stem for path in drawn] == (["figure-1b"] if name == "longer_training" else [])


def test_the_landscapes_miniature_ends_with_a_table_of_sharpness(local_ray, tmp_path):
    store = Store(tmp_path / "results")
    made, images = run("landscapes", store)
    trials = weight_space.students(made, store)
    assert list(trials) == ["CE", "KD", "DIST", "PLD"]
    weight_space.compute(trials, images, store, weight_space.Settings(points=3, images=32))
    table = weight_space.numbers(
        trials, {n: store.landscape(t.id) for n, t in trials.items()}, store
    )
    assert (table[["ce_top_eigenvalue", "top1"]] > 0).all().all()
    assert table["own_trace"].notna().tolist() == [False, True, True, True]
