"""Things that go wrong while an experiment runs, done to the real command; nothing may be lost."""

import json
import os
import re
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

TEXT = """
base:
  data: {name: digits, pad: 1, limit: 300}
  student: resnet8
  teacher: {name: resnet8, train: {epochs: 2}}
  epochs: 60
  batch_size: 32
grid: {loss: [ce, pld]}
seeds: [0, 1]
resources: {patience: 4}
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The experiment, and what it comes to when nothing goes wrong."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "small.yaml").write_text(TEXT)
    made, store = plan(load_experiment(folder / "small.yaml")), Store(folder / "results")
    for trial in made.trials.values():
        train(trial, load(trial.data), store, lambda metrics: None)
    return folder / "small.yaml", made, results(made, store)


def results(made, store):
    kept = ("train_loss", "top1", "val_loss", "ece", "kl_teacher_student")
    found = {}
    for key in made.trials:
        record = store.record(key)
        if record is not None:
            metrics = {name: record["metrics"].get(name) for name in kept}
            found[key] = record["weights_sha256"], metrics
    return found


class Driver(subprocess.Popen):
    def __init__(self, path, storage, *arguments, **kwargs):
        command = [sys.executable, "-m", "pld_ray.cli", "run", path, "--storage", storage]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        super().__init__([*command, *arguments], **pipes, **kwargs)

    def trains(self):
        """The process that trains now, once it has come beyond an epoch or two."""
        for process in psutil.Process(self.pid).children(recursive=True):
            try:
                if process.cmdline()[:1] == ["ray::ImplicitFunc.train"]:
                    return process
            except psutil.Error:
                pass
        return None

    def __exit__(self, kind, *error):
        if kind is not None:
            self.kill()
        super().__exit__(kind, *error)

    def end(self):
        output, _ = self.communicate(timeout=200)
        return self.returncode, output


def wait(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def under_way(store, made):
    """Whether a trial is in its midst, with a checkpoint to go on from."""
    found = [key for key in made.trials if len(store.epochs(key)) > 5]
    return any(Path(store.folder(key), "checkpoint.pt").exists() for key in found)


def test_kills_hangs_stops_and_damage_change_no_bit(whole, tmp_path):
    path, made, expected = whole
    store = Store(tmp_path / "results")
    teacher, ce, *_, pld = made.trials
    with Driver(path, store.uri) as driver:
        wait(lambda: under_way(store, made))
        assert listening(driver) == {"127.0.0.1"}
        killed = wait(driver.trains)
        killed.kill()
        hung = wait(lambda: (p := driver.trains()) and p.pid != killed.pid and p)
        time.sleep(4)  # until it has given a sign of life
        hung.suspend()  # it can do nothing, not even end when it is asked to
        wait(lambda: not hung.is_running() or hung.status() == psutil.STATUS_ZOMBIE)
        wait(driver.trains)
        told_to_stop(driver, signal.SIGINT)
    for file in tmp_path.rglob("checkpoint.pt"):
        damage(file)
    with Driver(path, store.uri) as driver:
        wait(driver.trains)
        told_to_stop(driver, signal.SIGTERM)
    with Driver(path, store.uri) as driver:
        wait(lambda: len(store.records(made.trials)) >= 2)
        driver.kill()
        driver.communicate()
    before = store.records(made.trials)
    assert 2 <= len(before) < len(expected)
    output = finish(path, made, store, expected)
    assert f"{len(made.trials) - len(before)} trials to run, {len(before)} done before" in output
    assert re.search(r"^\| PLD +\| +\d\d\.\d\d ± ", output, re.MULTILINE)
    with Driver(path, store.uri) as driver:
        assert f"all {len(made.trials)} trials are done" in driver.end()[1]
    assert before.items() <= store.records(made.trials).items()  # not run again
    kept = store.record(ce)
    damage(Path(store.folder(pld), "record.json"))
    damage(Path(store.folder(teacher), "student.safetensors"))
    damage(sorted(tmp_path.rglob("*.logits"))[3])
    output = finish(path, made, store, expected)
    assert "1 teachers have damaged weights and are trained again" in output
    assert store.record(ce) == kept  # nothing of it was damaged
    assert not list(tmp_path.rglob("claim-*")) and not list(tmp_path.rglob("drivers/*"))


def listening(driver):
    """The addresses on which a driver and what it has started listen."""
    here = psutil.Process(driver.pid)
    found = set()
    for process in (here, *here.children(recursive=True)):
        with suppress(psutil.Error):
            sockets = process.net_connections("inet")
            found |= {s.laddr.ip for s in sockets if s.status == psutil.CONN_LISTEN}
    return {ip.removeprefix("::ffff:") for ip in found}


def told_to_stop(driver, number):
    driver.send_signal(number)
    told = time.monotonic()
    code, output = driver.end()
    assert code == 128 + number and time.monotonic() - told < 20
    assert output.endswith("stopped; run the same command again to resume\n")
    assert "Traceback" not in output


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def finish(path, made, store, expected):
    with Driver(path, store.uri) as driver:
        code, output = driver.end()
    assert code == 0, output
    assert results(made, store) == expected
    return output


def test_two_drivers_share_the_work_and_a_killed_one_leaves_it_to_the_other(whole, tmp_path):
    path, made, expected = whole
    store = Store(tmp_path / "results")
    with Driver(path, store.uri) as one, Driver(path, store.uri) as two:
        wait(lambda: list(tmp_path.rglob("record.json")))
        before = store.records(store.trials())
        one.kill()
        one.communicate()
        code, output = two.end()
    assert code == 0, output
    assert results(made, store) == expected
    assert {key: store.record(key) for key in before} == before


def test_a_full_disk(whole, tmp_path):
    path, made, expected = whole
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can only be mounted as root")
    sets = ("--set", "seeds=[0]")
    try:
        with Driver(path, tmp_path / "results", *sets) as driver:
            code, output = driver.end()
        assert code == 1 and "No space left on device" in output
        assert "Traceback" not in output
        subprocess.run(["mount", "-o", "remount,size=99m", str(tmp_path)], check=True)
        with Driver(path, tmp_path / "results", *sets) as driver:
            code, output = driver.end()
        assert code == 0, output
        found = results(made, Store(tmp_path / "results"))
        assert len(found) == 3 and found.items() <= expected.items()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=False)


def test_one_trial_runs_out_of_memory_and_the_others_go_on(whole, tmp_path):
    path = whole[0]
    args = "{img_size: 8, patch_size: 8, depth: 1, embed_dim: 9000000}"
    huge = f"{{name: vit_tiny_patch16_224, args: {args}}}"
    sets = ["--set", f"grid.student=[{huge}, resnet8]", "--set", "grid.loss=[ce]"]
    sets += ["--set", "seeds=[0]", "--set", "epochs=2"]
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
