"""What the tests of faults share: an experiment, what it comes to undisturbed, and how it is run.

Most tests begin with a store in which the teacher has finished, so that a run is short. Where the
fault is not done to the command itself, the command runs in the process of the tests, which has
imported torch already and has a Ray that all tests share.
"""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pld_ray.config.experiment import load_experiment
from pld_ray.config.planning import plan
from pld_ray.data.datasets import load
from pld_ray.distill.loop import train
from pld_ray.store.store import Store

TEXT = """
base:
  data: {name: digits, pad: 1, limit: 200}
  student: resnet8
  teacher: {name: resnet8, train: {epochs: 2}}
  epochs: 24
  batch_size: 32
grid: {loss: [ce, pld]}
resources: {patience: 20, concurrent: 1}  # one process, which imports torch once
"""
LIMIT = 600  # seconds to wait for anything; a machine that is four times slower meets it


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The experiment, its plan, what it comes to when nothing goes wrong, and that store."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "small.yaml").write_text(TEXT)
    made, store = plan(load_experiment(folder / "small.yaml")), Store(folder / "results")
    for trial in made.trials.values():
        train(trial, load(trial.data), store, lambda metrics: None)
    return folder / "small.yaml", made, results(made, store), store


@pytest.fixture
def store(whole, tmp_path):
    """A store in which the teacher has finished and its bank is full; the students are to run."""
    _, made, _, finished = whole
    shutil.copytree(finished.uri, tmp_path / "results")
    for key in made.trials.keys() - made.teacher_ids:
        shutil.rmtree(tmp_path / "results" / "trials" / key)
    return Store(tmp_path / "results")


def results(made, store):
    """The digest of the weights and the metrics of each finished trial."""
    kept = ("train_loss", "top1", "val_loss", "ece", "kl_teacher_student")
    found = {}
    for key in made.trials:
        record = store.record(key)
        if record is not None:
            metrics = {name: record["metrics"].get(name) for name in kept}
            found[key] = record["weights_sha256"], metrics
    return found


@pytest.fixture
def command(local_ray, cli, whole, tmp_path):
    """Run the experiment in this process, beside something that happens to it meanwhile."""

    def run(storage, *arguments, meanwhile=lambda: None):
        with ThreadPoolExecutor(1) as other:
            happened = other.submit(meanwhile)
            done = cli("run", whole[0], "--storage", storage, *arguments, cwd=tmp_path)
            happened.result(timeout=LIMIT)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture
def finishes(command, whole, store):
    """Run the experiment to its end; every trial then has the bits of the undisturbed run."""

    def run(into=store, **kwargs):
        code, output = command(into.uri, **kwargs)
        assert code == 0, output
        assert results(whole[1], into) == whole[2]
        return output

    return run


def wait(condition):
    deadline = time.monotonic() + LIMIT
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def under_way(store, made):
    """Whether a trial has a checkpoint to continue from."""
    found = [key for key in made.trials if 3 < len(store.epochs(key)) < 24]
    return any(Path(store.folder(key), "checkpoint.pt").exists() for key in found)
