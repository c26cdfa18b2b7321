"""Several workers of one trial, here as two processes with gloo."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import warm
from small import CPU, cells, run, weights

from pld_ray.data.datasets import load
from pld_ray.data.stream import Stream
from pld_ray.errors import InputError
from pld_ray.models.export import load_student
from pld_ray.store.store import Store
from pld_ray.sweep import worker

WORKER = """
import json, sys
import torch, torch.distributed as dist
from pld_ray.config.trial import Trial
from pld_ray.data.datasets import load
from pld_ray.distill.loop import train_gang
from pld_ray.distill.running import TrainingError
from pld_ray.store.store import Store
torch.set_num_threads(1)
folder, rank, specs, last = sys.argv[1:]
dist.init_process_group(
    "gloo", init_method=f"file://{folder}/rendezvous{last}", rank=int(rank), world_size=2
)
def report(epochs):
    if epochs[0]["epoch"] == int(last):
        raise SystemExit
def ended(trial, error):
    assert error is None or isinstance(error, TrainingError), error
trials = [Trial.model_validate(spec) for spec in json.loads(specs)]
train_gang(trials, load(trials[0].data), Store(folder), report, ended)
"""


def on_two_workers(trials, folder, last=0):
    """Train a gang, up to an epoch if `last` is given, and return the store."""
    folder.mkdir(exist_ok=True)
    specs = json.dumps([trial.model_dump(mode="json") for trial in trials])
    started = [warm.start(WORKER, folder, rank, specs, last) for rank in (0, 1)]
    for process in started:
        process.join(600)
    assert [process.exitcode for process in started] == [0, 0]
    return Store(folder)


@pytest.mark.parametrize("ema", [None, 0.5])
def test_what_two_workers_evaluate_is_what_they_keep_and_resume(experiment, tmp_path, ema):
    (trial,) = cells(experiment, "workers=2", "grid.loss=[ce]", f"ema={ema or 'null'}")
    whole = on_two_workers([trial], tmp_path / "whole")
    images = load(trial.data)
    stream = Stream(images, trial.data, trial.seed, CPU)
    student = load_student(trial, whole)
    (shown,) = stream.val([np.arange(len(images.val))])
    with torch.no_grad():
        right = student(shown).argmax(1) == torch.as_tensor(np.array(images.val_labels))
    metrics = whole.record(trial.id)["metrics"]
    assert metrics["top1"] == pytest.approx(100 * right.double().mean().item(), abs=1e-9)

    parts = on_two_workers([trial], tmp_path / "parts", last=2)
    assert not parts.finished([trial.id]) and len(parts.epochs(trial.id)) == 2
    on_two_workers([trial], tmp_path / "parts")
    assert weights(parts, trial) == weights(whole, trial)
    again = parts.record(trial.id)["metrics"]
    timed = {"images_per_second"}
    assert {k: again[k] for k in again.keys() - timed} == {
        k: metrics[k] for k in metrics.keys() - timed
    }


def test_a_gang_on_two_workers_has_the_bits_of_trials_alone(experiment, tmp_path):
    text = "grid.loss=[pld, at, rkd]", "workers=2", "teacher.train.workers=1"
    trials = cells(experiment, *text)
    bad = trials[0].model_copy(
        update={"optimizer": trials[0].optimizer.model_copy(update={"lr": 1e30})}
    )
    for folder in ("alone", "gang"):
        run(trials[0].teacher, Store(tmp_path / folder))
    gang = on_two_workers([trials[0], bad, *trials[1:]], tmp_path / "gang")
    assert gang.record(bad.id) is None
    for number, trial in enumerate(trials, 1):
        alone = on_two_workers([trial], tmp_path / "alone", last=-number)
        assert weights(alone, trial) == weights(gang, trial)


@pytest.mark.parametrize(
    ("gpus", "has", "kind", "share"),
    [([0], {"GPU": 1.0}, "cuda", 1.0), ([0], {"GPU": 0.25}, "cuda", 0.1875), ([], {}, "cpu", None)],
)
def test_a_trial_uses_what_ray_gave_it_of_a_gpu(monkeypatch, gpus, has, kind, share):
    context, shares = SimpleNamespace(get_assigned_resources=lambda: has), []
    fake = SimpleNamespace(get_gpu_ids=lambda: gpus, get_runtime_context=lambda: context)
    monkeypatch.setattr(worker, "ray", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 2**33))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    assert worker._device(SimpleNamespace(workers=1)).type == kind
    assert shares == ([] if share is None else [share])


def wrapped(error):
    """An error that another one was raised from, as in a plug-in."""
    outer = InputError("loss own: it failed")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "memory"),
        (torch.AcceleratorError("CUDA error: out of memory"), "memory"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
            "memory",
        ),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), "device"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "device"),
        (wrapped(RuntimeError("CUDA error: an illegal memory access was encountered")), "device"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("no CUDA error of torch"), None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_faults_of_a_gpu_are_told_from_those_of_the_trial(error, fault):
    assert worker._fault(error) == fault


def test_the_reason_of_the_worker_that_failed_is_not_replaced(experiment, tmp_path):
    (trial,) = cells(experiment, "workers=2", "grid.loss=[ce]")
    store = Store(tmp_path)
    assert not worker._explained(trial, store)
    store.fail(trial.id, "RuntimeError: Connection closed by peer")
    assert not worker._explained(trial, store)
    store.fail(trial.id, "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")
    assert worker._explained(trial, store)
    store.fail(trial.id, "TrainingError: the training loss is nan", final=True)
    assert worker._explained(trial, store)
