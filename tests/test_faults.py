"""Faults while an experiment runs, done to the real command: one fault a test, nothing is lost.

Most tests begin with a store in which the teacher has finished, so that a run is short.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pld_ray.config.experiment import load_experiment
from pld_ray.config.planning import plan
from pld_ray.data.datasets import load
from pld_ray.distill.loop import train
from pld_ray.store.store import Store

pytestmark = pytest.mark.slow
TEXT = """
base:
  data: {name: digits, pad: 1, limit: 300}
  student: resnet8
  teacher: {name: resnet8, train: {epochs: 2}}
  epochs: 60
  batch_size: 32
grid: {loss: [ce, pld]}
resources: {patience: 20}
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


class Driver(subprocess.Popen):
    """`pld-ray run` as a process."""

    def __init__(self, path, storage, *arguments, **kwargs):
        command = [sys.executable, "-m", "pld_ray.cli", "run", path, "--storage", storage]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        super().__init__([*command, *arguments], **pipes, **kwargs)

    def trains(self):
        """The process that trains now, if there is one."""
        for process in psutil.Process(self.pid).children(recursive=True):
            with suppress(psutil.Error):
                if process.cmdline()[:1] == ["ray::ImplicitFunc.train"]:
                    return process
        return None

    def __exit__(self, kind, *error):
        if kind is not None:
            self.kill()
        super().__exit__(kind, *error)

    def end(self):
        output, _ = self.communicate(timeout=LIMIT)
        return self.returncode, output


def wait(condition):
    deadline = time.monotonic() + LIMIT
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def under_way(store, made):
    """Whether a trial has a checkpoint to continue from."""
    found = [key for key in made.trials if len(store.epochs(key)) > 5]
    return any(Path(store.folder(key), "checkpoint.pt").exists() for key in found)


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def finishes(driver, whole, store):
    """The driver ends well, and every trial has the bits of the undisturbed run."""
    _, made, expected, _ = whole
    code, output = driver.end()
    assert code == 0, output
    assert results(made, store) == expected
    return output


# ---------------------------------------------------------------- processes


def test_a_worker_that_is_killed(whole, store):
    path, made, *_ = whole
    with Driver(path, store.uri) as driver:
        wait(lambda: under_way(store, made))
        assert listening(driver) == {"127.0.0.1"}
        wait(driver.trains).kill()
        finishes(driver, whole, store)


def listening(driver):
    """The addresses on which a driver and the processes it has started listen."""
    here = psutil.Process(driver.pid)
    found = set()
    for process in (here, *here.children(recursive=True)):
        with suppress(psutil.Error):
            sockets = process.net_connections("inet")
            found |= {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN}
    return {ip.removeprefix("::ffff:") for ip in found}


def test_a_worker_that_hangs(whole, store):
    path, made, *_ = whole
    with Driver(path, store.uri) as driver:
        wait(lambda: under_way(store, made))
        hung = wait(driver.trains)
        time.sleep(4)  # until it has given a sign of life
        hung.suspend()  # it can do nothing, not even end when it is asked to
        wait(lambda: not hung.is_running() or hung.status() == psutil.STATUS_ZOMBIE)
        finishes(driver, whole, store)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_driver_that_is_told_to_stop(whole, store, number):
    path, made, *_ = whole
    with Driver(path, store.uri) as driver:
        wait(lambda: under_way(store, made))
        driver.send_signal(number)
        told = time.monotonic()
        code, output = driver.end()
    assert code == 128 + number and time.monotonic() - told < 60
    assert output.endswith("stopped; run the same command again to resume\n")
    assert "Traceback" not in output
    with Driver(path, store.uri) as driver:
        finishes(driver, whole, store)


def test_a_driver_that_is_killed(whole, store):
    path, made, *_ = whole
    with Driver(path, store.uri) as driver:
        wait(lambda: len(store.records(made.trials)) >= 2)
        driver.kill()
        driver.communicate()
    before = store.records(made.trials)
    with Driver(path, store.uri) as driver:
        output = finishes(driver, whole, store)
    if len(before) < len(made.trials):
        left = len(made.trials) - len(before)
        assert f"{left} trials to run, {len(before)} done before" in output
    assert re.search(r"^\| PLD +\| +\d\d\.\d\d ", output, re.MULTILINE)
    assert before.items() <= store.records(made.trials).items()  # not run again
    assert not list(Path(store.uri).rglob("claim-*")) and not list(
        Path(store.uri).rglob("drivers/*")
    )


def test_two_drivers_share_the_work_and_a_killed_one_leaves_it_to_the_other(whole, store):
    path, *_ = whole
    teacher = set(results(whole[1], store))
    with Driver(path, store.uri) as one, Driver(path, store.uri) as two:
        wait(lambda: store.finished(store.trials()) - teacher or one.poll() is not None)
        before = store.records(store.trials())
        one.kill()
        one.communicate()
        finishes(two, whole, store)
    assert {key: store.record(key) for key in before} == before


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["checkpoint", "record", "weights of a teacher", "bank"])
def test_a_damaged_file(whole, tmp_path, kind):
    path, made, _, finished = whole
    shutil.copytree(finished.uri, tmp_path / "results")
    store = Store(tmp_path / "results")
    (teacher,) = made.teacher_ids
    *_, ce, pld = made.trials  # the teacher comes first
    kept = store.record(ce)
    if kind == "record":
        damage(Path(store.folder(pld), "record.json"))
    else:
        shutil.rmtree(store.folder(pld))
    if kind == "checkpoint":
        half_done(made.trials[pld], store)
        damage(Path(store.folder(pld), "checkpoint.pt"))
    elif kind == "weights of a teacher":
        damage(Path(store.folder(teacher), "student.safetensors"))
    elif kind == "bank":
        damage(sorted(tmp_path.rglob("*.logits"))[3])
    with Driver(path, store.uri) as driver:
        output = finishes(driver, whole, store)
    assert store.record(ce) == kept  # nothing of it was damaged
    told = "1 teachers have damaged weights and are trained again"
    assert (told in output) == (kind == "weights of a teacher")


def half_done(trial, store):
    """A trial that was killed after 20 epochs, with a checkpoint."""

    def stop(metrics):
        if metrics["epoch"] == 20:
            raise SystemExit  # as Tune stops a trial

    with pytest.raises(SystemExit):
        train(trial, load(trial.data), store, stop)
    assert len(store.load_checkpoint(trial)["history"]) == 20


def test_a_full_disk(whole, tmp_path):
    path = whole[0]
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can only be mounted as root")
    try:
        with Driver(path, tmp_path / "results") as driver:
            code, output = driver.end()
        assert code == 1 and "No space left on device" in output
        assert "Traceback" not in output
        subprocess.run(["mount", "-o", "remount,size=99m", str(tmp_path)], check=True)
        with Driver(path, tmp_path / "results") as driver:
            finishes(driver, whole, Store(tmp_path / "results"))
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=False)


def test_one_trial_runs_out_of_memory_and_the_others_go_on(whole, tmp_path):
    path = whole[0]
    args = "{img_size: 8, patch_size: 8, depth: 1, embed_dim: 9000000}"
    huge = f"{{name: vit_tiny_patch16_224, args: {args}}}"
    sets = ["--set", f"grid.student=[{huge}, resnet8]", "--set", "grid.loss=[ce]"]
    sets += ["--set", "epochs=2"]
    with Driver(path, tmp_path, *sets) as driver:
        code, output = driver.end()
    assert code == 1 and "1 of 1" not in output
    assert "vit_tiny_patch16_224 seed 0: FAILED: RuntimeError: " in output
    store = Store(tmp_path)
    done = store.records(store.trials()).values()
    assert [record["trial"]["student"]["name"] for record in done] == ["resnet8"]
    command = [sys.executable, "-m", "pld_ray.cli", "status", path, *sets, "--storage", tmp_path]
    status = subprocess.run(command, capture_output=True, text=True, check=False)
    assert status.returncode == 1 and "FAILED: RuntimeError: " in status.stdout
    assert str(tmp_path / "trials") in status.stdout
    failure = json.loads(next(tmp_path.rglob("failure.json")).read_text())
    assert "Traceback" in failure["traceback"][0] and os.linesep not in failure["reason"]
