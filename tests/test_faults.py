"""Faults while an experiment runs, done to the real command: one fault a test, nothing is lost.

Most tests begin with a store in which the teacher has finished, so that a run is short. Where the
fault is not done to the command itself, the command runs in the process of the tests, which has
imported torch already and has a Ray that all tests share.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import warm

from pld_ray.config.experiment import load_experiment
from pld_ray.config.planning import plan
from pld_ray.data.datasets import load
from pld_ray.distill.loop import train
from pld_ray.store.store import Store

pytestmark = pytest.mark.slow
TEXT = """
base:
  data: {name: digits, pad: 1, limit: 200}
  student: resnet8
  teacher: {name: resnet8, train: {epochs: 2}}
  epochs: 40
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


class Driver(subprocess.Popen):
    """The command as a process, with a Ray of its own."""

    def __init__(self, path, storage):
        command = warm.command("run", path, "--storage", storage)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        super().__init__(command, **pipes)

    def __exit__(self, kind, *error):
        if kind is not None:
            self.kill()
        super().__exit__(kind, *error)

    def wait_for(self, condition):
        """Wait for something that the command brings about."""
        wait(lambda: condition() or self.poll() is not None)
        if self.poll() is not None:
            pytest.fail(f"the command has ended early: {self.communicate()[0]}")


def wait(condition):
    deadline = time.monotonic() + LIMIT
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def training():
    """The process that trains, of those that the Ray of the tests has started."""
    for process in warm.workers():
        with suppress(psutil.Error):
            if process.cmdline()[:1] == ["ray::ImplicitFunc.train"]:
                return process
    return None


def under_way(store, made):
    """Whether a trial has a checkpoint to continue from."""
    found = [key for key in made.trials if 5 < len(store.epochs(key)) < 40]
    return any(Path(store.folder(key), "checkpoint.pt").exists() for key in found)


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# ---------------------------------------------------------------- processes


def test_a_worker_that_is_killed(whole, store, finishes):
    def kill():
        wait(lambda: under_way(store, whole[1]))
        wait(training).kill()

    finishes(meanwhile=kill)


def test_a_worker_that_hangs(whole, store, finishes):
    def suspend():
        wait(lambda: under_way(store, whole[1]))
        hung = wait(training)
        hung.suspend()  # it can do nothing, not even end when it is asked to
        wait(lambda: not hung.is_running() or hung.status() == psutil.STATUS_ZOMBIE)

    finishes(meanwhile=suspend)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_driver_that_is_told_to_stop(whole, store, finishes, number):
    path, made, *_ = whole
    with Driver(path, store.uri) as driver:
        driver.wait_for(lambda: under_way(store, made))
        assert listening(driver) == {"127.0.0.1"}
        driver.send_signal(number)
        output, _ = driver.communicate(timeout=LIMIT)
    assert driver.returncode == 128 + number
    assert output.endswith("stopped; run the same command again to resume\n")
    assert "Traceback" not in output
    assert len(results(made, store)) < len(made.trials)  # it did not wait for them
    finishes()


def listening(driver):
    """The addresses on which a driver and the processes it has started listen."""
    here = psutil.Process(driver.pid)
    found = set()
    for process in (here, *here.children(recursive=True), *warm.workers()):
        with suppress(psutil.Error):
            sockets = process.net_connections("inet")
            found |= {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN}
    return {ip.removeprefix("::ffff:") for ip in found}


def test_a_driver_that_is_killed(whole, store, finishes):
    path, made, *_ = whole
    with Driver(path, store.uri) as driver:
        driver.wait_for(lambda: len(store.records(made.trials)) >= 2)
        driver.kill()
        driver.communicate()
    before = store.records(made.trials)
    output = finishes()
    if len(before) < len(made.trials):
        left = len(made.trials) - len(before)
        assert f"{left} trials to run, {len(before)} done before" in output
    assert re.search(r"^\| PLD +\| +\d\d\.\d\d ", output, re.MULTILINE)
    assert before.items() <= store.records(made.trials).items()  # not run again
    left = [*Path(store.uri).rglob("claim-*"), *Path(store.uri).rglob("drivers/*")]
    assert not left


def test_two_drivers_share_the_work_and_a_killed_one_leaves_it_to_the_other(whole, store, finishes):
    path, made, *_ = whole
    with Driver(path, store.uri) as other:
        other.wait_for(lambda: under_way(store, made))  # the other driver has one of the two trials

        def kill():
            wait(lambda: len(list(Path(store.uri).rglob("claim-*"))) == 2)
            other.kill()
            other.communicate()

        finishes(meanwhile=kill)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["checkpoint", "record", "weights of a teacher", "bank"])
def test_a_damaged_file(whole, tmp_path, finishes, kind):
    _, made, _, finished = whole
    shutil.rmtree(tmp_path / "results")
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
    output = finishes(store)
    assert store.record(ce) == kept  # nothing of it was damaged
    told = "1 teachers have damaged weights and are trained again"
    assert (told in output) == (kind == "weights of a teacher")


def half_done(trial, store):
    """A trial that was killed after 10 epochs, with a checkpoint."""

    def stop(metrics):
        if metrics["epoch"] == 10:
            raise SystemExit  # as Tune stops a trial

    with pytest.raises(SystemExit):
        train(trial, load(trial.data), store, stop)
    assert len(store.load_checkpoint(trial)["history"]) == 10


def test_a_full_disk(tmp_path, command, finishes, monkeypatch):
    monkeypatch.setattr("pld_ray.sweep.runner.RETRIES", 1)  # each imports torch
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can only be mounted as root")
    try:
        code, output = command(disk / "results")
        assert code == 1 and "No space left on device" in output
        assert "Traceback" not in output
        subprocess.run(["mount", "-o", "remount,size=99m", str(disk)], check=True)
        finishes(Store(disk / "results"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_one_trial_runs_out_of_memory_and_the_others_go_on(whole, command, cli, tmp_path):
    args = "{img_size: 8, patch_size: 8, depth: 1, embed_dim: 900000}"  # one layer of 10 TB
    huge = f"{{name: vit_tiny_patch16_224, args: {args}}}"
    sets = ["--set", f"grid.student=[{huge}, resnet8]", "--set", "grid.loss=[ce]"]
    sets += ["--set", "epochs=2"]
    code, output = command(tmp_path / "new", *sets)
    assert code == 1 and "1 of 1" not in output
    assert "vit_tiny_patch16_224 seed 0: FAILED: RuntimeError: " in output
    store = Store(tmp_path / "new")
    done = store.records(store.trials()).values()
    assert [record["trial"]["student"]["name"] for record in done] == ["resnet8"]
    status = cli("status", whole[0], *sets, "--storage", store.uri, cwd=tmp_path)
    assert status.returncode == 1 and "FAILED: RuntimeError: " in status.stdout
    assert str(tmp_path / "new" / "trials") in status.stdout
    failure = json.loads(next(Path(store.uri).rglob("failure.json")).read_text())
    assert "Traceback" in failure["traceback"][0] and os.linesep not in failure["reason"]
