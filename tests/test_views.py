"""Losses that take two views of each image: what is shown, kept, planned and refused."""

import json

import numpy as np
import pytest
import test_workers
import torch
from small import CPU, chunks, live, run, train, weights
from test_data import random_images
from test_gang import together

from pld_ray.api import plan_table
from pld_ray.config import gangs
from pld_ray.config.parts import Data, Model
from pld_ray.config.planning import plan
from pld_ray.data.datasets import check_augmentation, load, size
from pld_ray.data.drawn import DrawnImages
from pld_ray.data.mixing import MixedLabels
from pld_ray.data.sampling import batches, order
from pld_ray.data.stream import Stream
from pld_ray.data.workers import GREY, cutout
from pld_ray.distill import bank_plan, loop
from pld_ray.distill.distiller import Distiller
from pld_ray.distill.fit import fit
from pld_ray.errors import InputError
from pld_ray.losses import MLKDLoss
from pld_ray.models.factory import create_model
from pld_ray.store.store import Store

TEXT = """
base:
  data: {name: digits, pad: 1, flip: true, limit: 70}
  student: resnet8
  teacher: {name: resnet8, logits: float32, train: {epochs: 1}}
  epochs: 2
  batch_size: 32
grid: {loss: [{name: mlkd, strong: [random_erasing, cutout]}]}
"""
STRONG = ("random_erasing", "cutout")


def trials(experiment, *overrides):
    return [cell.trial for cell in plan(experiment(TEXT, *overrides)).cells]


# ---------------------------------------------------------------- what is shown


def test_batches_hold_the_views_of_two_streams(experiment, tmp_path, monkeypatch):
    (trial,) = trials(experiment)
    store, images, seen = Store(tmp_path / "results"), load(trial.data), []
    forward = Distiller.forward

    def noted(self, images, labels, logits=None, *more):
        if self.paired:
            seen.append((images.clone(), labels.clone(), logits.clone()))
        return forward(self, images, labels, logits, *more)

    monkeypatch.setattr(Distiller, "forward", noted)
    record = run(trial, store)
    network = create_model(Model(name="resnet8"), *images.shape)
    network.load_state_dict(store.load_weights(trial.teacher))
    network.eval()
    both = trial.data, trial.data.model_copy(update={"augment": STRONG})
    number = 0
    for epoch in range(2):
        shares = list(batches(order(0, epoch, 70), 32, False))
        views = [Stream(images, data, 0, CPU).train(shares, epoch) for data in both]
        for (first, labels), (second, _) in zip(*views, strict=True):
            found, ours, logits = seen[number]
            assert torch.equal(found, torch.cat([first, second]))
            assert torch.equal(ours, torch.cat([labels, labels]))
            # a pixel that is neither erased nor grey is that of the first view: one crop for both
            kept = (second != first).flatten(1).any(1)
            assert kept.any() and (second == first).float().mean() > 0.5
            with torch.no_grad():
                expected = torch.cat([network(first), network(second)])
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
            number += 1
    assert number == len(seen) == 6  # the last batch of an epoch has 6 images, 12 rows
    assert [len(x) for x, _, _ in seen] == [64, 64, 12] * 2
    assert record["teacher_images"] == 2 * 2 * 70 + 360


def test_the_training_loss_is_the_mean_over_images(experiment, tmp_path, monkeypatch):
    (trial,) = trials(experiment, "epochs=1")
    steps, losses = [], MLKDLoss.losses

    def noted(self, *given):
        found = losses(self, *given)
        steps.append((found.mean().item(), len(found) / 2))
        return found

    def counted(run):
        counts.append(mean_losses(run)[1])
        return mean_losses(run)

    mean_losses, counts = loop.mean_losses, []
    monkeypatch.setattr(MLKDLoss, "losses", noted)
    monkeypatch.setattr(loop, "mean_losses", counted)
    store = Store(tmp_path / "results")
    run(trial, store)
    expected = sum(loss * count for loss, count in steps) / 70
    assert store.epochs(trial.id)[0]["train_loss"] == pytest.approx(expected, rel=1e-6)
    assert counts[-1] == 70  # of which images_per_second is computed


def test_batch_norm_sees_one_view_after_the_other():
    torch.manual_seed(0)
    student, teacher = (create_model(Model(name="resnet8"), 4, 3, 8) for _ in range(2))
    x, y = torch.randn(12, 3, 8, 8), torch.arange(3).repeat(4)
    loss = Distiller(student, teacher, MLKDLoss()).train()(x, y)
    with torch.no_grad():
        logits = torch.cat([student(x[:6]), student(x[6:])])
        given = torch.cat([teacher(x[:6]), teacher(x[6:])])
    torch.testing.assert_close(loss.detach(), MLKDLoss()(logits, given, y), rtol=1e-5, atol=1e-5)
    assert student.stem[1].num_batches_tracked == 4


# ---------------------------------------------------------------- the same bits


def test_bank_live_resumed_and_gang_have_the_same_bits(experiment, tmp_path):
    """Also with a gang whose other members take one view, or other transforms."""
    losses = "[{name: mlkd, strong: [random_erasing, cutout]}, {name: mlkd, strong: [cutout]}, kd]"
    one, other, kd = trials(experiment, f"grid.loss={losses}")
    stores = [Store(tmp_path / name) for name in ("alone", "gang", "killed")]
    for store in stores:
        run(one.teacher, store)
    every = [one, other, kd, live(one), live(kd)]
    assert len({gangs.stream_key(trial) for trial in every}) == 1
    assert together(every, stores[1]) == {trial.id: None for trial in every}
    for trial in every:
        run(trial, stores[0])
        assert weights(stores[0], trial) == weights(stores[1], trial), trial.label
    assert weights(stores[0], one) == weights(stores[0], live(one))
    assert weights(stores[0], one) != weights(stores[0], other)

    def stop(metrics):
        raise SystemExit

    with pytest.raises(SystemExit):
        train(one, load(one.data), stores[2], stop)
    assert len(stores[2].epochs(one.id)) == 1
    run(one, stores[2])
    assert weights(stores[2], one) == weights(stores[0], one)


def test_a_teacher_runs_once_for_each_view_of_a_gang(experiment, tmp_path):
    losses = "[mlkd, {name: mlkd, ce_weight: 1}, kd]"
    every = trials(experiment, f"grid.loss={losses}", "teacher.logits=live")
    store = Store(tmp_path / "results")
    run(every[0].teacher, store)
    together(every, store)
    seen = sum(store.record(trial.id)["teacher_images"] for trial in every)
    assert seen == 360 + 2 * 2 * 70
    planned = gangs.planned(every)
    # both trials of MLKD share the second view; that of KD has no use for it
    assert [len(gang.trials) for gang in planned] == [2]
    assert (planned[0].apart, planned[0].together) == (2 * 2 * 2, 2 * 2)
    assert (planned[0].taught_apart, planned[0].taught_together) == (2 * 2 * 2, 2 * 2)
    (whole,) = gangs.planned(every, largest=3)
    assert (whole.apart, whole.together) == (2 * 2 * 2 + 2, 2 * 2)


def test_two_workers_share_both_views(experiment, tmp_path, monkeypatch):
    fork = "import multiprocessing\nmultiprocessing.set_start_method('fork', force=True)\n"
    monkeypatch.setattr(test_workers, "WORKER", fork + test_workers.WORKER)
    (trial,) = trials(experiment, "workers=2", "teacher.train.workers=1", "drop_last=true")
    folder = tmp_path / "results"
    run(trial.teacher, Store(folder))
    store = test_workers.on_two_workers([trial], folder)
    record = store.record(trial.id)
    assert record["metrics"]["train_loss"] > 0
    single = trial.model_copy(update={"workers": 1})
    other = Store(tmp_path / "other")
    run(single, other)
    # the terms of a worker compare the images of its own share: close, not equal
    assert record["metrics"]["train_loss"] == pytest.approx(
        other.record(single.id)["metrics"]["train_loss"], rel=0.2
    )


# ---------------------------------------------------------------- how large


def test_banks_of_both_views_are_counted_and_on_the_disk(experiment, tmp_path, capsys):
    every = trials(experiment, "grid.loss=[mlkd, kd]", "teacher.logits=float16")
    store = Store(tmp_path / "results")
    planned = bank_plan.planned(every, size, store)
    view = 70 * (10 * 2 + 4)  # images x (classes x float16 + a float32 maximum)
    # the first view is that of KD; then the second one, and the validation images
    assert [p.bytes for p in planned.values()] == [2 * view, 2 * view, 360 * 10 * 4]
    rows = [plan_table.bank_row(bank) for bank in planned.values()]
    assert [row["augment"] for row in rows] == [[], ["randaugment", "cutout"], []]
    for trial in every:
        run(trial, store)
    on_disk = {b: sum(p.stat().st_size - 12 for p in chunks(store) if b in p.parts)
               for b in store.banks()}  # fmt: skip
    assert sorted(on_disk.values()) == sorted(p.bytes for p in planned.values())
    plan_table.show_banks(store)
    assert "digits +randaugment +cutout" in capsys.readouterr().out
    made = plan(experiment(TEXT, "grid.loss=[mlkd, kd]"))
    plan_table.show(made, store, set())
    assert "2 of these epochs prepare two views of each image, for 1 trials" in (
        capsys.readouterr().out
    )


def test_a_first_view_that_never_changes_is_kept_once(experiment, tmp_path):
    still = "data.pad=0", "data.flip=false"
    (trial,) = trials(experiment, *still, "teacher.views=1")
    assert trial.views == 1
    (trial,) = trials(experiment, *still, "epochs=3", "teacher.views=2")
    first, second = trial.each_view
    assert [first.view(epoch) for epoch in range(3)] == [0, 0, 0]
    assert [second.view(epoch) for epoch in range(3)] == [0, 1, 0]
    store = Store(tmp_path / "results")
    planned = bank_plan.planned([trial], size, store)
    assert [p.views for p in planned.values()] == [1, 2, 1]
    run(trial, store)
    kept = sum(path.stat().st_size - 12 for path in chunks(store))
    assert kept == sum(bank.bytes for bank in planned.values()) == 4 * 10 * (3 * 70 + 360)


# ---------------------------------------------------------------- cutout


def test_cutout_is_a_grey_square_of_up_to_half_the_side():
    torch.manual_seed(0)
    sides, centres = [], []
    image = torch.zeros(2, 40, 40, dtype=torch.uint8)
    for _ in range(4000):
        found = cutout(image)
        assert set(found.unique().tolist()) <= {0, GREY} and torch.equal(found[0], found[1])
        rows, columns = (np.flatnonzero(found[0].any(axis).numpy()) for axis in (1, 0))
        if len(rows) == 0 or len(columns) == 0:
            continue
        assert (found[0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] == GREY).all()
        box = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
        if min(box) > 0 and max(box) < 40:  # not cut at an edge
            assert abs(len(rows) - len(columns)) <= 1
            sides.append(len(rows))
            centres.append((box[0] + box[2]) / 2)
    assert image.sum() == 0  # the given image is as it was
    assert max(sides) == 20
    # a square of side s is whole with the probability (1 - s / 40)^2: its mean side is
    expected = (
        20
        * sum(u * (1 - u / 2) ** 2 for u in np.linspace(0, 1, 1001))
        / sum((1 - u / 2) ** 2 for u in np.linspace(0, 1, 1001))
    )
    assert np.mean(sides) == pytest.approx(expected, abs=0.5)
    assert np.mean(centres) == pytest.approx(20, abs=0.6)


def test_cutout_of_given_draws(monkeypatch):
    image = torch.arange(60, dtype=torch.uint8).reshape(1, 6, 10)
    # side 0.8 * 6 / 2 = 2.4, so 1.2 around the centre (3, 5): rows 2 to 4, columns 4 to 6
    monkeypatch.setattr(torch, "rand", lambda n: torch.tensor([0.8, 0.5, 0.5]))
    expected = image.clone()
    expected[0, 2:4, 4:6] = 127
    assert torch.equal(cutout(image), expected)
    monkeypatch.setattr(torch, "rand", lambda n: torch.tensor([1.0, 0.0, 1.0]))
    expected = image.clone()
    expected[0, 0:2, 8:10] = 127  # 1.5 around the corner (0, 10), rounded to even
    assert torch.equal(cutout(image), expected)


# ---------------------------------------------------------------- what is refused


def test_lists_of_transforms_and_temperatures_are_single_values(experiment):
    (trial,) = trials(
        experiment, "grid.loss=[{name: mlkd, temperatures: [1, 2], strong: [cutout]}]"
    )
    assert (trial.loss.temperatures, trial.loss.strong) == ((1.0, 2.0), ("cutout",))
    text = "grid.loss=[{name: mlkd, temperatures: [[1, 2], [4]], ce_weight: [0.1, 1]}]"
    assert [t.loss.temperatures for t in trials(experiment, text)] == [(1, 2)] * 2 + [(4,)] * 2
    assert len({t.id for t in trials(experiment, text)}) == 4
    json.dumps([t.model_dump(mode="json") for t in trials(experiment, text)])


def test_what_cannot_be_shown_twice_is_refused(experiment):
    for field in ("mixup", "cutmix"):
        with pytest.raises(InputError, match=rf"data.{field}: loss mlkd compares two views of one"):
            trials(experiment, f"data.{field}=0.2")
    with pytest.raises(InputError, match=r"strong.1 is 'cutuot'; did you mean 'cutout'"):
        trials(experiment, "grid.loss=[{name: mlkd, strong: [randaugment, cutuot]}]")
    pixels = np.zeros((4, 8, 8, 5), np.uint8)
    data = Data(name="x", augment=("randaugment", "cutout"))
    with pytest.raises(InputError, match="loss.strong is randaugment: the images of x have 5 chan"):
        check_augmentation(data, pixels, "loss.strong")
    check_augmentation(Data(name="x", augment=("cutout",)), pixels, "loss.strong")
    floats = DrawnImages(None, np.arange(4), np.zeros(4), "own", "own", (8, 8, 3), True)
    with pytest.raises(InputError, match="loss.strong: own gives floating-point images"):
        check_augmentation(data, floats, "loss.strong")


def test_fit_takes_both_views_and_refuses_one():
    torch.manual_seed(0)
    student, teacher = (create_model(Model(name="resnet8"), 4, 3, 8) for _ in range(2))
    images = random_images(24, 8)
    x = torch.from_numpy(images.train).permute(0, 3, 1, 2) / 255
    y = torch.from_numpy(images.train_labels).long() % 4
    distiller = Distiller(student, teacher, MLKDLoss())
    loader = [(torch.cat([a, a.flip(3)]), torch.cat([b, b])) for a, b in zip(x.split(8), y.split(8), strict=True)]  # fmt: skip # noqa: E501
    expected = MLKDLoss()
    with torch.no_grad():
        first, labels = loader[0]
        given = torch.cat([teacher.eval()(part) for part in first.chunk(2)])
        logits = torch.cat([student.train()(part) for part in first.chunk(2)])
    rows = fit(distiller, loader[:1], 1, lr=1e-9, device="cpu", progress=False)
    assert rows.train_loss[0] == pytest.approx(expected(logits, given, labels).item(), rel=1e-4)
    with pytest.raises(InputError, match="train_loader: the loss takes two views of each image"):
        fit(distiller, [(x[:8], y[:8])], 1, device="cpu", progress=False)
    mixed = MixedLabels(labels, labels.flip(0), torch.ones(len(labels)))
    with pytest.raises(ValueError, match="MLKDLoss compares two views of one image"):
        distiller(first, mixed)
