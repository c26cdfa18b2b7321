import math
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import warm
from timm.utils import ModelEmaV3

from pld_ray.config.planning import plan
from pld_ray.data.datasets import load
from pld_ray.distill import metrics
from pld_ray.distill.loop import train
from pld_ray.distill.optimization import MovingAverage, update
from pld_ray.distill.running import TrainingError
from pld_ray.store.store import Store

SMALL = """
base:
  data: {name: digits, pad: 1, flip: true, limit: 150}
  student: {name: resnet8}
  teacher: {name: resnet8, train: {epochs: 1, ema: null}}
  optimizer: {name: lamb, lr: 0.01, weight_decay: 0.02}
  schedule: {warmup_epochs: 1}
  clip_grad: 1
  ema: 0.9
  epochs: 4
  batch_size: 64
  loss: pld
"""

CHILD = """
import os, signal, sys, torch
torch.set_num_threads(1)
from pld_ray.data.datasets import load
from pld_ray.config.experiment import load_experiment
from pld_ray.config.planning import plan
from pld_ray.store.store import Store
from pld_ray.distill import keeping
from pld_ray.distill.loop import train
keeping.CHECKPOINT_SECONDS = 0

def die(metrics):
    if metrics["epoch"] == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

store = Store(sys.argv[2])
trial = plan(load_experiment(sys.argv[1])).cells[0].trial
train(trial, load(trial.data), store, die)
"""


def run(trial, store, report=lambda metrics: None):
    train(trial, load(trial.data), store, report)
    return store.record(trial.id)


def test_a_killed_trial_resumes_and_ends_with_the_same_bits(experiment, tmp_path):
    made = plan(experiment(SMALL))
    student = made.cells[0].trial
    stores = [Store(tmp_path / name) for name in ("whole", "killed")]
    for store in stores:
        run(student.teacher, store)
    seen = []
    whole = run(student, stores[0], lambda metrics: seen.append(metrics["epoch"]))
    assert seen == [1, 2, 3, 4]
    for epoch in (1, 3):
        child = warm.start(CHILD, tmp_path / "small.yaml", stores[1].uri, epoch)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert stores[1].record(student.id) is None
    seen.clear()
    resumed = run(student, stores[1], lambda metrics: seen.append(metrics["epoch"]))
    assert seen == [4]
    timed = ("images_per_second",)
    same = [{k: v for k, v in r["metrics"].items() if k not in timed} for r in (whole, resumed)]
    assert same[0] == same[1]
    files = [Path(s.folder(student.id), "student.safetensors").read_bytes() for s in stores]
    assert files[0] == files[1]


def test_training_learns_and_leaves_a_record(experiment, tmp_path):
    trial = (
        plan(experiment(SMALL, "loss=ce", "data.limit=null", "ema=null", "optimizer=adamw"))
        .cells[0]
        .trial
    )
    record = run(trial, Store(tmp_path))
    assert record["metrics"]["top1"] > 85  # chance is 10
    epochs = Store(tmp_path).epochs(trial.id)
    assert [e["epoch"] for e in epochs] == [1, 2, 3, 4]
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]
    assert epochs[-1]["top1"] == record["metrics"]["top1"]
    assert record["parameters"] == sum(
        v.numel() for k, v in Store(tmp_path).load_weights(trial).items()
        if "running" not in k and "num_batches" not in k
    )  # fmt: skip
    assert Store(tmp_path).trial(trial.id).id == trial.id and record["id"] == trial.id
    assert record["seconds"]["seconds"] >= record["seconds"]["student_seconds"] > 0


def test_a_teacher_close_to_uniform_is_noted_in_the_record(experiment, tmp_path):
    store = Store(tmp_path)
    for temperature, noted in ((1000, 1), (0.001, 0)):
        text = SMALL.replace("loss: pld", f"loss: {{name: pld, temperature: {temperature}}}")
        trial = plan(experiment(text, "epochs=1")).cells[0].trial
        if store.record(trial.teacher.id) is None:
            run(trial.teacher, store)
        notes = run(trial, store)["notes"]
        assert len(notes) == noted
        assert all(n.startswith("pld: the teacher is close to uniform at temp") for n in notes)


def test_the_saved_student_has_the_recorded_accuracy(experiment, tmp_path):
    from pld_ray.models.factory import create_model

    made, store = plan(experiment(SMALL, "epochs=2")), Store(tmp_path)
    trial = made.cells[0].trial
    run(trial.teacher, store)
    record = run(trial, store)
    images = load(trial.data)
    x = ((images.val / 255 - images.mean) / images.std).transpose(0, 3, 1, 2)
    outputs = []
    for t in (trial, trial.teacher):
        model = create_model(t.student, *images.shape).eval()
        model.load_state_dict(store.load_weights(t))
        with torch.no_grad():
            outputs.append(model(torch.tensor(x, dtype=torch.float32)).double().numpy())
    student, teacher = outputs
    assert record["metrics"]["top1"] == pytest.approx(
        100 * (student.argmax(1) == images.val_labels).mean()
    )
    assert record["metrics"]["agreement"] == pytest.approx(
        100 * (student.argmax(1) == teacher.argmax(1)).mean()
    )
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (teacher, student))
    kl = (p * np.log(p / q)).sum(1).mean()
    assert record["metrics"]["kl_teacher_student"] == pytest.approx(kl, rel=1e-4)
    assert record["metrics"]["teacher_top1"] == store.record(trial.teacher.id)["metrics"]["top1"]


def test_metrics_against_loops():
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 200, 8)) * 3
    labels = rng.integers(0, 8, 200)
    parts = [
        metrics.sums(*(torch.tensor(x[i : i + 70]) for x in (student, labels, teacher)))
        for i in (0, 70, 140)
    ]
    got = metrics.averages(sum(parts), has_teacher=True)
    q = np.exp(student) / np.exp(student).sum(1, keepdims=True)
    p = np.exp(teacher) / np.exp(teacher).sum(1, keepdims=True)
    rank = [(student[i] > student[i, labels[i]]).sum() for i in range(200)]
    assert got["top1"] == pytest.approx(100 * np.mean(np.array(rank) == 0))
    assert got["top5"] == pytest.approx(100 * np.mean(np.array(rank) < 5))
    assert got["val_loss"] == pytest.approx(-np.log(q[np.arange(200), labels]).mean(), rel=1e-5)
    assert got["kl_teacher_student"] == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-5)
    assert got["agreement"] == pytest.approx(100 * (p.argmax(1) == q.argmax(1)).mean())
    ece = 0.0
    confidence, right = q.max(1), q.argmax(1) == labels
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            ece += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert got["ece"] == pytest.approx(ece, rel=1e-5)


@pytest.mark.parametrize(
    ("limit", "lr", "said"),
    [
        (32, "1e30", "the validation loss is (nan|inf) after epoch 1: "),  # one step per epoch
        (150, "1e30", "the training loss is (nan|inf) in step [23] of epoch 1: "),
    ],
)
def test_what_is_not_finite_first_ends_the_trial(experiment, tmp_path, limit, lr, said):
    text = SMALL.replace("clip_grad: 1", "clip_grad: null")
    sets = (
        "loss=ce",
        f"optimizer={{name: sgd, lr: {lr}}}",
        "ema=null",
        "schedule={name: constant, warmup_epochs: 0}",
    )
    trial = plan(experiment(text, *sets, f"data.limit={limit}")).cells[0].trial
    with pytest.raises(TrainingError, match=said):
        run(trial, Store(tmp_path))
    assert Store(tmp_path).record(trial.id) is None
    for file in tmp_path.rglob("*.json*"):
        assert "NaN" not in file.read_text() and "Infinity" not in file.read_text()


def test_a_weight_that_is_not_finite_after_the_last_step_ends_the_trial(
    experiment, tmp_path, monkeypatch
):
    def broken(loss, distiller, *rest):
        update(loss, distiller, *rest)
        next(distiller.student.parameters()).data[0] = float("inf")

    monkeypatch.setattr("pld_ray.distill.steps.update", broken)
    trial = plan(experiment(SMALL, "loss=ce", "data.limit=32", "ema=null")).cells[0].trial
    with pytest.raises(TrainingError, match="not finite after step 1, the last of epoch 1: "):
        run(trial, Store(tmp_path))


@pytest.mark.parametrize("name", ["adamw", "lamb", "adan", "adabelief", "sgd"])
def test_the_papers_optimizers_run(experiment, tmp_path, name):
    overrides = ["loss=ce", f"optimizer={name}", "epochs=1", "data.limit=64", "drop_last=true"]
    trial = plan(experiment(SMALL, *overrides)).cells[0].trial
    assert math.isfinite(run(trial, Store(tmp_path))["metrics"]["train_loss"])


def test_schedules():
    from pld_ray.config.parts import Schedule
    from pld_ray.distill.optimization import create_schedule

    def rates(spec, epochs, steps):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        scheduler = create_schedule(spec, optimizer, epochs, steps)
        seen = []
        for step in range(epochs * steps):
            scheduler.step_update(step)
            seen.append(optimizer.param_groups[0]["lr"])
        return seen

    cosine = [1 + math.cos(math.pi * t / 40) for t in range(40)]
    assert rates(Schedule(), 10, 4) == pytest.approx(cosine)
    warm = rates(Schedule(warmup_epochs=2), 10, 4)
    assert warm[:8] == pytest.approx([2.0 * t / 8 for t in range(8)])
    assert rates(Schedule(name="constant"), 3, 4) == [2.0] * 12
    steps = rates(Schedule(name="multistep", milestones=(2, 3)), 4, 2)
    # timm counts the update that follows: the rate falls one update before the milestone
    assert steps == pytest.approx([2, 2, 2, 0.2, 0.2, 0.02, 0.02, 0.02])


def test_the_moving_average_is_that_of_timm():
    torch.manual_seed(0)
    network = timm.create_model("resnet8", num_classes=10, in_chans=1)
    ours, timms = MovingAverage(network, 0.9), ModelEmaV3(network, decay=0.9)
    for step in range(5):
        with torch.no_grad():
            for value in (*network.parameters(), *network.buffers()):
                if value.is_floating_point():
                    value.add_(torch.randn_like(value))
                else:
                    value += 1
        network.stem[1].running_mean = network.stem[1].running_mean + 1  # another tensor
        ours.update(network, step=step)
        timms.update(network, step=step)
    assert ours.state_dict().keys() == timms.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), timms.buffers(), strict=True))
    for average, expected in zip(ours.parameters(), timms.parameters(), strict=True):
        assert torch.equal(average, expected)


def test_a_trial_that_resumes_in_another_precision_says_so(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr("pld_ray.distill.keeping.CHECKPOINT_SECONDS", 0)
    trial = plan(experiment(SMALL, "loss=ce")).cells[0].trial
    store = Store(tmp_path / "results")

    def stop(metrics):
        raise SystemExit

    with pytest.raises(SystemExit):
        train(trial, load(trial.data), store, stop)
    monkeypatch.setattr("pld_ray.distill.running.pick_precision", lambda *_: "bfloat16")
    train(trial, load(trial.data), store, lambda metrics: None)
    record = store.record(trial.id)
    said = "resumed in epoch 2 with precision float32 before and bfloat16 from then on"
    assert record["notes"] == [said]
    assert record["environment"]["precision"] == "bfloat16"
    assert record["environment"]["tf32"] is False


def test_validation_in_pieces_has_the_metrics_of_all_images_at_once(experiment, tmp_path):
    trial = plan(experiment(SMALL)).cells[0].trial
    images, found = load(trial.data), []
    for size, pixels in ((512, 2**16), (7, 2**16), (512, 9 * 64)):  # digits have 64 pixels
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pld_ray.distill.evaluation.VAL_BATCH", size)
            patch.setattr("pld_ray.distill.evaluation.PIXELS", pixels)
            store = Store(tmp_path / f"results{size}-{pixels}")
            train(trial.teacher, load(trial.teacher.data), store, lambda metrics: None)
            train(trial, images, store, lambda metrics: None)
        metrics = store.record(trial.id)["metrics"]
        found.append({k: v for k, v in metrics.items() if k != "images_per_second"})
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] == pytest.approx(found[2], rel=1e-5)


WITHOUT_RAY = """
import sys
sys.modules["ray"] = None  # an import of it fails
from pld_ray.config.experiment import load_experiment
from pld_ray.config.planning import plan
from pld_ray.data.datasets import load
from pld_ray.distill.loop import train
from pld_ray.store.store import Store
(trial,) = [cell.trial for cell in plan(load_experiment(sys.argv[1], ["loss=ce"])).cells]
train(trial, load(trial.data), Store(sys.argv[2]), print)
"""


def test_a_trial_trains_without_ray(experiment, tmp_path):
    path = experiment.folder / "small.yaml"
    path.write_text(SMALL)
    child = warm.start(WITHOUT_RAY, path, tmp_path / "results", output=tmp_path / "printed")
    child.join()
    assert child.exitcode == 0 and "top1" in (tmp_path / "printed").read_text()
