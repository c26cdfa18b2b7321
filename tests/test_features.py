"""Losses on features against loops in float64, the taps, and training with them."""

import math

import numpy as np
import pytest
import timm
import torch
from small import run

from pld_ray import losses
from pld_ray.config.planning import plan
from pld_ray.config.trial import Trial
from pld_ray.data.datasets import load
from pld_ray.distill.loop import train
from pld_ray.errors import InputError
from pld_ray.losses import Features
from pld_ray.models.checks import check_features
from pld_ray.models.features import WithFeatures
from pld_ray.store.store import Store

SHAPES = [(4, 8, 8), (6, 4, 4)], [(8, 4, 4), (6, 4, 4)]  # of student and teacher: channels, h, w


@pytest.fixture
def batch():
    """Logits, labels and the features of five images, double."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student, teacher = (
        Features([draw(5, *shape) for shape in shapes], draw(5, width))
        for shapes, width in zip(SHAPES, (7, 9), strict=True)
    )
    return draw(5, 10), torch.tensor([3, 0, 9, 1, 1]), student, teacher


def cross_entropy(logits, labels):
    z = logits.numpy()
    return np.mean([np.log(np.exp(r).sum()) - r[y] for r, y in zip(z, labels, strict=True)])


def pooled_to(x, size):
    """Averages of blocks: x [B, channels, h, w] to [B, channels, size, size]."""
    x = x.numpy()
    block = x.shape[2] // size
    return np.array(
        [
            [
                [
                    [
                        c[i * block : (i + 1) * block, j * block : (j + 1) * block].mean()
                        for j in range(size)
                    ]
                    for i in range(size)
                ]
                for c in sample
            ]
            for sample in x
        ]
    )


def unit(v):
    return v / np.linalg.norm(v)


def at(student, teacher):
    total = 0
    for s, t in zip(student.stages, teacher.stages, strict=True):
        s, t = pooled_to(s, 4), pooled_to(t, 4)
        errors = []
        for one, other in zip(s, t, strict=True):
            maps = [unit((x**2).mean(0).ravel()) for x in (one, other)]
            errors.append(((maps[0] - maps[1]) ** 2).mean())
        total += np.mean(errors)
    return 1000 * total


def pkt(student, teacher):
    def rows(x):
        x = x.numpy()
        similar = np.array([[(unit(a) @ unit(b) + 1) / 2 for b in x] for a in x])
        return np.array([row / row.sum() for row in similar])

    p, q = rows(teacher.pooled), rows(student.pooled)
    terms = [a * math.log((a + 1e-7) / (b + 1e-7)) for a, b in zip(p.flat, q.flat, strict=True)]
    return 30000 * np.mean(terms)


def huber(a, b):
    d = np.abs(a - b)
    return np.where(d < 1, 0.5 * d**2, d - 0.5).mean()


def rkd(student, teacher):
    def distances(x):
        d = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        return d / d[d > 0].mean()

    def angles(x):
        n = len(x)
        cosines = np.zeros((n, n, n))
        for j in range(n):
            for i in range(n):
                for k in range(n):
                    if i != j and k != j:
                        cosines[j, i, k] = unit(x[i] - x[j]) @ unit(x[k] - x[j])
        return cosines

    s, t = student.pooled.numpy(), teacher.pooled.numpy()
    return 25 * huber(distances(s), distances(t)) + 50 * huber(angles(s), angles(t))


def sp(student, teacher):
    def gram(features):
        x = features.numpy().reshape(len(features), -1)
        return np.array([unit(row) for row in x @ x.T])

    g = gram(student.stages[-1]) - gram(teacher.stages[-1])
    return 3000 * (g**2).sum() / len(g) ** 2


@pytest.mark.parametrize("reference", [at, pkt, rkd, sp], ids=lambda f: f.__name__)
def test_losses_against_loops(batch, reference):
    logits, labels, student, teacher = batch
    loss = losses.create_loss(reference.__name__)
    expected = cross_entropy(logits, labels) + reference(student, teacher)
    assert loss(*batch).item() == pytest.approx(expected, rel=1e-4)
    assert not list(loss.parameters())


def test_fitnet_with_a_given_regressor(batch):
    logits, labels, student, teacher = batch
    loss = losses.FitNetLoss(stage=1)
    loss.connect(student, teacher)  # 8x8 to 4x4: a convolution of 2x2 with stride 2
    weight, bias = (p.detach().double().numpy() for p in loss.regressor.parameters())
    assert weight.shape == (8, 4, 2, 2)
    s, t = student.stages[0].numpy(), teacher.stages[0].numpy()
    errors = [
        (weight[c] * s[b, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]).sum() + bias[c] - t[b, c, i, j]
        for b in range(5)
        for c in range(8)
        for i in range(4)
        for j in range(4)
    ]
    expected = cross_entropy(logits, labels) + 100 * np.mean(np.square(errors))
    assert loss(*batch).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("student", "teacher"), [(8, 4), (4, 8), (4, 4), (7, 4), (4, 7)])
def test_fitnet_takes_maps_of_any_size(student, teacher):
    features = [Features([torch.randn(2, 3, n, n)], torch.zeros(2, 1)) for n in (student, teacher)]
    loss = losses.FitNetLoss(stage=1)
    loss.connect(*features)
    assert loss.distance(*features).isfinite()


def test_vid_starts_with_the_variance_it_says_and_is_a_gaussian_likelihood(batch):
    logits, labels, student, teacher = batch
    loss = losses.VIDLoss()
    loss.connect(student, teacher)
    total = 0
    for i, (s, t) in enumerate(zip(student.stages, teacher.stages, strict=True)):
        variance = np.log1p(np.exp(loss.rho[i].detach().numpy())) + 1e-5
        assert variance == pytest.approx(5.0, rel=1e-5)
        s, t = pooled_to(s, 4), pooled_to(t, 4)
        for j, layer in enumerate(loss.means[i][::2]):
            s = np.einsum("oc,bchw->bohw", layer.weight.detach().double().numpy()[..., 0, 0], s)
            s = np.maximum(s, 0) if j < 2 else s
        total += (0.5 * (s - t) ** 2 / 5 + 0.5 * math.log(5)).mean()
    assert loss(*batch).item() == pytest.approx(cross_entropy(logits, labels) + total, rel=1e-4)


@pytest.mark.parametrize("name", ["at", "fitnet", "pkt", "rkd", "sp", "vid"])
def test_gradients_go_to_the_student_alone_and_are_finite_for_equal_images(batch, name):
    logits, labels, student, teacher = batch
    leaves = [
        x[:1].expand_as(x).clone().requires_grad_() for x in (*student.stages, student.pooled)
    ]
    constant = [x.clone().requires_grad_() for x in (*teacher.stages, teacher.pooled)]
    loss = losses.create_loss(name)
    loss.connect(student, teacher)
    value = loss(
        logits.requires_grad_(),
        labels,
        Features(leaves[:-1], leaves[-1]),
        Features(constant[:-1], constant[-1]),
    )
    value.backward()
    gradients = [x.grad for x in (logits, *leaves) if x.grad is not None]
    assert len(gradients) > 1 and all(g.isfinite().all() for g in gradients)
    assert all(x.grad is None for x in constant)


@pytest.mark.parametrize(
    ("name", "sizes"),
    {
        "resnet20": [(16, 32), (32, 16), (64, 8)],
        "wrn_16_2": [(32, 32), (64, 16), (128, 8)],
        "mobilenetv2_cifar": [(12, 16), (16, 8), (48, 4), (160, 2)],
        "resnet50_cifar": [(256, 32), (512, 16), (1024, 8), (2048, 4)],
        "resnet18": [(64, 8), (128, 4), (256, 2), (512, 1)],
        "mobilenetv4_conv_small": [(32, 8), (64, 4), (96, 2), (960, 1)],
        "convnext_atto": [(40, 8), (80, 4), (160, 2), (320, 1)],
        "vit_tiny_patch16_224": [(192, 2)] * 4,
    }.items(),
    ids=str,
)
def test_taps(name, sizes):
    extra = {"img_size": 32} if name.startswith("vit") else {}
    network = timm.create_model(name, num_classes=7, **extra).eval()
    x = torch.randn(2, 3, 32, 32)
    logits, features = WithFeatures(network)(x)
    torch.testing.assert_close(logits, network(x))
    assert [(f.shape[1], f.shape[2]) for f in features.stages] == sizes
    torch.testing.assert_close(network.get_classifier()(features.pooled), logits)


SMALL = """
base:
  data: {name: digits, pad: 1, limit: 120}
  student: resnet8
  teacher: {name: wrn_16_2, train: {epochs: 1}}
  optimizer: {name: lamb, lr: 0.01, weight_decay: 0.02}
  clip_grad: 1
  epochs: 3
  batch_size: 64
"""


def test_a_learnt_part_is_trained_kept_on_resume_and_not_saved(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr("pld_ray.distill.loop.CHECKPOINT_SECONDS", 0)
    trial = plan(experiment(SMALL, "loss=vid")).cells[0].trial
    stores = [Store(tmp_path / name) for name in ("whole", "broken")]
    run(trial, stores[0])
    run(trial.teacher, stores[1])

    def stop(metrics):
        kept = stores[1].load_checkpoint(trial)["loss"]
        assert len(kept) == 3 * 4 and any((v != v.flatten()[0]).any() for v in kept.values())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(trial, load(trial.data), stores[1], stop)
    run(trial, stores[1])
    whole, broken = (store.load_weights(trial) for store in stores)
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    network = timm.create_model("resnet8", num_classes=10, in_chans=1)
    assert whole.keys() == network.state_dict().keys()
    record = stores[0].record(trial.id)
    assert record["teacher_images"] == 3 * 120 + 360  # no logits are kept of it, nor needed


def test_kept_logits_make_no_difference_to_a_loss_on_features(experiment):
    trials = [
        plan(experiment(SMALL, "loss=at", f"teacher.logits={kind}")).cells[0].trial
        for kind in ("float16", "float32", "live")
    ]
    assert len({trial.id for trial in trials}) == 1


def test_networks_that_cannot_be_compared_are_told_before_the_run(experiment):
    def check(text, *overrides):
        trial = plan(experiment(text, *overrides)).cells[0].trial
        assert isinstance(trial, Trial)
        check_features(trial, 10, 1, 8)

    check(SMALL, "loss=at")
    with pytest.raises(InputError, match="wrn_16_2 → mobilenetv2_cifar: at: the student has 4 st"):
        check(SMALL, "loss=at", "student=mobilenetv2_cifar")
    with pytest.raises(InputError, match="fitnet: stage is 4, but a network has only 3 stages"):
        check(SMALL, "loss={name: fitnet, stage: 4}")
    check(SMALL, "loss=rkd", "student=mobilenetv2_cifar")  # pooled features have no stages
