"""Faults of workers and of files while an experiment runs: one fault a test, nothing is lost."""

import json
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import warm
from faults import LIMIT, command, finishes, results, store, under_way, wait, whole

from pld_ray.data.datasets import load
from pld_ray.distill.loop import train
from pld_ray.store.store import Store

pytestmark = pytest.mark.slow


def training():
    """The process that trains, of those that the Ray of the tests has started."""
    for process in warm.workers():
        with suppress(psutil.Error):
            if process.cmdline()[:1] == ["ray::ImplicitFunc.train"]:
                return process
    return None


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
    assert [store.trial(record["id"]).student.name for record in done] == ["resnet8"]
    status = cli("status", whole[0], *sets, "--storage", store.uri, cwd=tmp_path)
    assert status.returncode == 1 and "FAILED: RuntimeError: " in status.stdout
    assert str(tmp_path / "new" / "trials") in status.stdout
    failure = json.loads(next(Path(store.uri).rglob("failure.json")).read_text())
    assert "Traceback" in failure["traceback"][0] and os.linesep not in failure["reason"]
