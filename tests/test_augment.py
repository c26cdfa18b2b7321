"""Augmentation by torchvision, Mixup and CutMix: pure functions of (seed, view, index)."""

import numpy as np
import pytest
import torch
from scipy import stats
from small import live, run, weights
from test_data import random_images
from torch.nn import functional as F

from pld_ray.config.parts import AUGMENTS, Data, Model
from pld_ray.config.planning import plan
from pld_ray.data.drawn import image_seeds, seed_everything
from pld_ray.data.mixing import MixedLabels, draw_mix, partners
from pld_ray.data.sampling import order
from pld_ray.data.stream import Stream
from pld_ray.data.workers import transform
from pld_ray.distill.distiller import Distiller
from pld_ray.errors import InputError
from pld_ray.losses import (
    CELoss,
    DISTLoss,
    DKDLoss,
    FitNetLoss,
    KDLoss,
    NKDLoss,
    TTMLoss,
    WTTMLoss,
)
from pld_ray.models.factory import create_model
from pld_ray.store.store import Store

CPU = torch.device("cpu")


def shown(data, shares, view=3, images=None, seed=7):
    return list(Stream(images or random_images(), data, seed, CPU).train(shares, view))


# ---------------------------------------------------------------- torchvision


@pytest.mark.parametrize("name", sorted({*AUGMENTS} - {"own"}))
def test_an_image_looks_the_same_in_any_batch_and_is_that_of_torchvision(name):
    images, data = random_images(40, 8), Data(name="x", augment=name)
    index = order(7, 3, 40)
    ((whole, labels),) = shown(data, [index], images=images)
    for rank, (x, y) in enumerate(shown(data, [index[r::3] for r in range(3)], images=images)):
        assert torch.equal(x, whole[rank::3]) and torch.equal(y, labels[rank::3])
    ((other, _),) = shown(data, [index], view=4, images=images)
    assert not torch.equal(other, whole)
    change = transform((name,))
    state = torch.get_rng_state()
    for slot in (0, 17):
        seed_everything(*image_seeds(7, 3, index[slot : slot + 1], "library"))
        expected = change(torch.from_numpy(images.train[index[slot]]).permute(2, 0, 1))
        expected = (expected / 255 - 0.5) / 0.25
        torch.testing.assert_close(whole[slot], expected, rtol=0, atol=1e-5)
    torch.set_rng_state(state)


def test_transforms_follow_crop_and_flip_and_leave_the_generators_alone():
    images, data = random_images(12, 8), Data(name="x", pad=2, flip=True)
    index = np.arange(12)
    ((plain, _),) = shown(data, [index], images=images)
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state()
    erased = data.model_copy(update={"augment": ("random_erasing",)})
    ((found, _),) = shown(erased, [index], images=images)
    assert torch.equal(torch.get_rng_state(), before)
    changed = (found != plain).any(1)  # [B, H, W]
    assert 2 < changed.flatten(1).any(1).sum() < 12  # half of the images have a hole
    black = (0 - 0.5) / 0.25
    assert (found.permute(0, 2, 3, 1)[changed] == black).all()
    val = next(Stream(images, erased, 7, CPU).val([np.arange(9)]))
    torch.testing.assert_close(
        val[0].permute(1, 2, 0), torch.from_numpy(images.val[0] / 255 - 0.5).float() * 4
    )


# ---------------------------------------------------------------- mixing


def test_partners_are_pairs_that_follow_each_other():
    found, samples = partners(3, 5, 11), order(3, 5, 11)
    assert (found[found] == np.arange(11)).all()
    for first in range(0, 10, 2):
        assert found[samples[first]] == samples[first + 1]
    assert found[samples[10]] == samples[10]
    assert (partners(3, 6, 11) != found).any()


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_are_drawn_from_a_beta_distribution(alpha):
    mix = draw_mix(Data(name="x", mixup=alpha), 1, 2, np.arange(5000), 32)
    assert not mix.cut.any() and (mix.box == 0).all()
    assert stats.kstest(mix.share, stats.beta(alpha, alpha).cdf).pvalue > 0.001


def test_boxes_of_cutmix_have_the_area_that_the_share_leaves():
    side = 32
    mix = draw_mix(Data(name="x", cutmix=1.0), 1, 2, np.arange(5000), side)
    left, top, right, bottom = mix.box.T
    assert mix.cut.all() and mix.box.min() >= 0 and mix.box.max() <= side
    assert (mix.share == 1 - (right - left) * (bottom - top) / side**2).all()
    inner = (left > 0) & (top > 0) & (right < side) & (bottom < side)  # not cut at an edge
    assert abs((right - left) - (bottom - top))[inner].max() <= 1  # squares
    # by symmetry, the centres of all boxes are in the middle on average
    assert ((left + right) / 2).mean() == pytest.approx(side / 2, abs=0.5)
    both = draw_mix(Data(name="x", mixup=0.2, cutmix=1.0), 1, 2, np.arange(5000), side)
    assert both.cut.mean() == pytest.approx(0.5, abs=0.03)
    assert (both.share[both.cut] == mix.share[both.cut]).all()


@pytest.mark.parametrize(
    "settings", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}]
)
def test_mixed_images_against_a_loop(settings):
    images = random_images(21, 8)
    data = Data(name="x", pad=1, flip=True, **settings)
    index = order(7, 3, 21)
    ((mixed, found),) = shown(data, [index], images=images)
    plain = data.model_copy(update={"mixup": None, "cutmix": None})
    ((alone, _),) = shown(plain, [np.arange(21)], images=images)
    partner, mix = partners(7, 3, 21), draw_mix(data, 7, 3, index, 8)
    for slot, i in enumerate(index):
        one, other = alone[i].numpy(), alone[partner[i]].numpy()
        if mix.cut[slot]:
            expected = one.copy()
            left, top, right, bottom = mix.box[slot]
            expected[:, top:bottom, left:right] = other[:, top:bottom, left:right]
        else:
            expected = mix.share[slot] * one + (1 - mix.share[slot]) * other
        np.testing.assert_allclose(mixed[slot].numpy(), expected, atol=1e-5)
        assert found.labels[slot] == images.train_labels[i]
        assert found.others[slot] == images.train_labels[partner[i]]
        assert found.share[slot] == pytest.approx(mix.share[slot])
    for rank, (x, y) in enumerate(shown(data, [index[r::3] for r in range(3)], images=images)):
        assert torch.equal(x, mixed[rank::3]) and torch.equal(y.share, found.share[rank::3])
        assert torch.equal(y.others, found.others[rank::3])


def small(seed):
    torch.manual_seed(seed)
    return create_model(Model(name="resnet8"), 4, 3, 16)


@pytest.mark.parametrize(
    "loss",
    [
        CELoss(),
        KDLoss(ce_weight=0.5),
        DISTLoss(),
        DKDLoss(),
        NKDLoss(3.0),
        TTMLoss(),
        WTTMLoss(),
        FitNetLoss(),
    ],
    ids=lambda x: x.name,
)
def test_the_loss_of_mixed_images_is_the_mean_with_both_labels(loss):
    """By the definition, sample by sample; DIST and FitNet compare whole batches."""
    distiller = Distiller(small(0), small(1), loss).eval()
    x = torch.randn(6, 3, 16, 16)
    distiller.connect(x)
    one, other = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([1, 1, 0, 2, 3, 0])
    share = torch.tensor([0.1, 0.5, 0.9, 1.0, 0.0, 0.7])
    got = distiller(x, MixedLabels(one, other, share))
    with torch.no_grad():
        student, teacher = distiller.student(x), distiller.teacher(x)
        if isinstance(loss, FitNetLoss):
            ce = [F.cross_entropy(student, labels, reduction="none") for labels in (one, other)]
            plain = distiller(x, one)
            expected = plain + loss.ce_weight * ((1 - share) * (ce[1] - ce[0])).mean()
        else:
            loss.reduction = "none"
            expected = share * loss(student, teacher, one)
            expected = (expected + (1 - share) * loss(student, teacher, other)).mean()
            loss.reduction = "mean"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)
    got.backward()
    assert all(torch.isfinite(p.grad).all() for p in distiller.student.parameters())


TEXT = """
base:
  data:
    name: digits
    limit: 60
    pad: 1
    augment: [color_jitter, random_erasing]
    mixup: 0.4
    cutmix: 1.0
  student: resnet8
  teacher: {name: resnet8, logits: float32}
  epochs: 2
  batch_size: 16
  loss: kd
"""


def test_a_student_of_the_bank_sees_the_logits_of_its_mixed_images(experiment, tmp_path):
    """To the bit those of a live teacher, which sees the same images."""
    trial, store = plan(experiment(TEXT)).cells[0].trial, Store(tmp_path / "results")
    run(trial, store)
    run(live(trial), store)
    assert weights(store, trial) == weights(store, live(trial))
    assert store.record(trial.id)["teacher_images"] == 2 * 60 + 360  # and each only once
    plain = plan(experiment(TEXT, "data.mixup=null", "data.cutmix=null", "data.augment=[]"))
    assert plain.cells[0].trial.id != trial.id


def test_what_cannot_be_mixed_is_refused(experiment):
    for loss in ("pld", "listmle", "plistmle"):
        with pytest.raises(InputError, match=f"data.mixup: loss {loss} ranks the classes with the"):
            plan(experiment(TEXT, f"loss={loss}"))
    with pytest.raises(InputError, match="data.augment.0 is 'randaug'; did you mean 'randaugment'"):
        plan(experiment(TEXT, "data.augment=randaug"))
    with pytest.raises(InputError, match="data.cutmix is 0: input should be greater than 0"):
        plan(experiment(TEXT, "data.cutmix=0"))
