"""Some of the paper's experiments in miniature, from the YAML file to the table and the figure."""

import pytest
from rich.console import Console

from analysis.figures import paper_figures
from analysis.landscapes import weights
from analysis.records import frames
from analysis.tables import paper_entries, paper_tables
from pld_ray.config.experiment import load_experiment
from pld_ray.config.parts import Resources
from pld_ray.config.planning import plan
from pld_ray.store.store import Store
from pld_ray.sweep import checks, runner
from pld_ray.sweep.progress import ProgressView

pytestmark = pytest.mark.slow
SMALLER = (
    "data.limit=50",
    "batch_size=25",
    "teacher.train.epochs=1",
    "teacher.train.data.limit=100",
)


def run(name, store, *sets):
    small = load_experiment(name, (*SMALLER, *sets), smoke=True)
    one = Resources(concurrent=1)  # process, which imports torch once
    made = plan(small.model_copy(update={"resources": one}))
    images = checks.check_trials(made.trials).images
    with ProgressView(made, dict(made.trials), Console(quiet=True)) as view:
        assert runner.run(made, images, store, view) == {}
    return made, images


@pytest.mark.parametrize("name", ["divergences", "longer_training"])
def test_a_miniature_fills_its_table(name, local_ray, tmp_path):
    store = Store(tmp_path / "results")
    sets = ["smoke.grid.epochs=[1,2]"] if name == "longer_training" else ["epochs=2"]
    made, _ = run(name, store, *sets)
    assert store.finished(store.trials()) == set(made.trials)
    frame = frames.frame(made, store)
    (table,) = paper_tables.of_experiment(f"{name}-smoke")
    found = paper_entries.of_table(table, frame)
    assert found and all(len(entry.scores) == entry.planned for entry in found)
    assert all(0 <= entry.mean <= 100 and entry.reported > 60 for entry in found)
    drawn = paper_figures.draw_paper(frame, made.experiment.name, True, tmp_path)
    assert [path.stem for path in drawn] == (["figure-1b"] if name == "longer_training" else [])


def test_the_landscapes_miniature_ends_with_a_table_of_sharpness(local_ray, tmp_path):
    store = Store(tmp_path / "results")
    made, images = run("landscapes", store)
    trials = weights.students(made, store)
    assert list(trials) == ["CE", "KD", "DIST", "PLD"]
    weights.compute(trials, images, store, weights.Settings(points=3, images=32))
    table = weights.numbers(trials, {n: store.landscape(t.id) for n, t in trials.items()}, store)
    assert (table[["ce_top_eigenvalue", "top1"]] > 0).all().all()
    assert table["own_trace"].notna().tolist() == [False, True, True, True]
