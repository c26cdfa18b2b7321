"""Every shipped experiment loads, validates and plans, whole and in miniature."""

import re
from pathlib import Path

import pytest

from pld_ray.errors import InputError
from pld_ray.experiment import experiments_folder, load_experiment, plan

SHIPPED = sorted(path.stem for path in experiments_folder().glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_experiment_is_planned_as_its_header_says(name):
    text = Path(experiments_folder(), f"{name}.yaml").read_text()
    made = plan(load_experiment(name))
    assert len(made.trials) == int(re.search(r"# Cost: (\d+) trials", text)[1])
    assert f"# Command: pld-ray run {name}" in text and "# Reproduces" in text
    assert "# Expect" in text


@pytest.mark.parametrize("name", SHIPPED)
def test_its_miniature_has_the_same_cells(name):
    whole, small = (plan(load_experiment(name, smoke=smoke)) for smoke in (False, True))
    assert small.experiment.name == f"{name}-smoke"
    assert [cell.trial.id for cell in small.originals] == [cell.trial.id for cell in whole.cells]
    for little, great in zip(small.cells, whole.cells, strict=True):
        assert little.trial.loss == great.trial.loss and little.trial.seed == great.trial.seed
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
