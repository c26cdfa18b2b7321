import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console

from pld_ray import sweep
from pld_ray.experiment import load_experiment, plan
from pld_ray.store import Store
from pld_ray.view import View

SMALL = """
base:
  data: {name: digits, pad: 1, limit: 101}
  student: resnet8
  teacher: resnet8
  epochs: 2
  batch_size: 32
grid: {loss: [ce, pld]}
"""


def run(made, store):
    pending = {k: t for k, t in made.trials.items() if k not in store.all_finished()}
    images = sweep.check(pending)
    with View(made, pending, Console(quiet=True)) as view:
        failures = sweep.run(made, images, store, view)
    return failures, pending


def test_teachers_first_everything_once_failures_told(local_ray, experiment, tmp_path):
    axes = ["grid.optimizer=[adamw, {name: sgd, lr: 1e30}]", "grid.teacher=[resnet8, wrn_16_2]"]
    made, store = plan(experiment(SMALL, *axes)), Store(tmp_path / "results")
    failures, pending = run(made, store)
    # CE twice, PLD four times, and one teacher: the other is the CE student itself
    assert len(pending) == 2 + 4 + 1
    diverged = {t.id for t in made.trials.values() if t.optimizer.name == "sgd"}
    assert set(failures) == diverged and len(diverged) == 3
    assert all("training loss is" in reason for reason in failures.values())
    assert store.all_finished() == made.trials.keys() - diverged
    for trial in made.trials.values():
        if trial.id not in diverged and trial.teacher:
            student, teacher = (store.record(t.id) for t in (trial, trial.teacher))
            assert teacher["finished"] <= student["finished"]
            assert student["metrics"]["teacher_top1"] == teacher["metrics"]["top1"]
    assert run(made, store)[1].keys() == diverged


def test_students_of_a_failed_teacher_fail_with_it(local_ray, experiment, tmp_path):
    text = SMALL.replace(
        "teacher: resnet8", "teacher: {name: resnet8, train: {optimizer: {name: sgd, lr: 1e30}}}"
    )
    made, store = plan(experiment(text, "loss=pld")), Store(tmp_path / "results")
    failures, _ = run(made, store)
    teacher = next(iter(made.trials))
    assert failures.keys() == made.trials.keys()
    assert failures[made.cells[0].trial.id] == f"its teacher, trial {teacher}, failed"


def test_two_workers_equal_one_where_no_batch_norm_is_involved(local_ray, experiment, tmp_path):
    # 101 images in batches of 66: the last has 35, of which the workers take 18 and 17
    text = """
base:
  data: {name: digits, pad: 1, limit: 101}
  student:
    name: vit_tiny_patch16_224
    args: {img_size: 8, patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}
  teacher: {name: resnet8, train: {workers: 1}}
  epochs: 2
  batch_size: 66
  clip_grad: 1
  optimizer: {name: sgd, lr: 0.1}  # Adam's first steps make much of a gradient's last bits
grid: {loss: [pld, {name: fitnet, weight: 1}], workers: [1, 2]}
"""
    made, store = plan(experiment(text)), Store(tmp_path / "results")
    assert run(made, store)[0] == {}
    trials = [cell.trial for cell in made.cells]
    for one, two in (trials[:2], trials[2:]):  # FitNet has learnt a convolution on both workers
        assert one.loss == two.loss and two.workers == 2
        weights = [store.load_weights(trial) for trial in (one, two)]
        for name in weights[0]:
            torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-5)
        scores = [store.record(trial.id)["metrics"] for trial in (one, two)]
        for name in ("train_loss", "val_loss", "top1", "ece", "kl_teacher_student", "agreement"):
            assert scores[0][name] == pytest.approx(scores[1][name], rel=1e-3), name


def test_the_demos_smallest_trial_on_two_workers(local_ray, tmp_path):
    overrides = ("workers=2", "epochs=3", "seeds=[0]", "grid.loss=[ce]")
    made, store = plan(load_experiment("demo", overrides)), Store(tmp_path)
    assert run(made, store)[0] == {}
    record = store.record(made.cells[0].trial.id)
    assert record["metrics"]["top1"] > 20 and len(store.epochs(record["id"])) == 3


def test_a_trial_that_never_fits_is_told(local_ray, experiment, tmp_path):
    with pytest.raises(
        sweep.InputError,
        match="needs 1 CPUs for each of its 4 workers, and the nodes .* have 2 CPUs: ",
    ):
        run(plan(experiment(SMALL, "workers=4")), Store(tmp_path / "results"))


def cli(*arguments, cwd):
    return subprocess.Popen(
        [sys.executable, "-m", "pld_ray.cli", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_killed_driver_loses_nothing(experiment, tmp_path):
    overrides = ["--set", "epochs=20", "--set", "data.limit=300", "--set", "seeds=[0,1]"]
    experiment(SMALL)
    made = plan(load_experiment(tmp_path / "small.yaml", tuple(overrides[1::2])))
    stores = {name: Store(tmp_path / name) for name in ("whole", "killed")}
    path = str(tmp_path / "small.yaml")

    def start(name):
        return cli("run", path, *overrides, "--storage", str(tmp_path / name), cwd=tmp_path)

    driver = start("killed")
    deadline = time.monotonic() + 120
    while len(stores["killed"].all_finished()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    time.sleep(2)  # Ray's processes end with their driver
    before = {key: stores["killed"].record(key) for key in stores["killed"].all_finished()}
    assert 2 <= len(before) < len(made.trials)
    again = start("killed")
    output, _ = again.communicate(timeout=200)
    assert again.returncode == 0, output
    assert f"{len(made.trials) - len(before)} trials to run, {len(before)} done before" in output
    whole = start("whole")
    assert whole.wait(timeout=200) == 0
    for key in made.trials:
        records = [stores[name].record(key) for name in ("killed", "whole")]
        for record in records:
            record["metrics"].pop("images_per_second")
        assert records[0]["metrics"] == records[1]["metrics"]
        if key in before:
            assert before[key]["finished"] == records[0]["finished"]
    assert re.search(r"^\| PLD +\| +\d\d\.\d\d ± ", output, re.MULTILINE)
    third = start("killed")
    output, _ = third.communicate(timeout=60)
    assert f"all {len(made.trials)} trials are done" in output
