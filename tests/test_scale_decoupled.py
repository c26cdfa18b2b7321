"""SDD against loops in float64, the cells of networks, and training with it."""

import itertools
import math

import numpy as np
import pytest
import timm
import torch
from small import run, weights
from torch.nn import functional as F

from pld_ray.config.planning import plan
from pld_ray.config.trial import Trial
from pld_ray.data.datasets import load
from pld_ray.data.mixing import MixedLabels
from pld_ray.distill.distiller import Distiller
from pld_ray.distill.loop import train, train_gang
from pld_ray.errors import InputError
from pld_ray.losses import Features, KDLoss, SDDLoss
from pld_ray.models.checks import check_features
from pld_ray.models.features import WithFeatures
from pld_ray.store.store import Store

LABELS = torch.tensor([3, 0, 2, 1, 1])


@pytest.fixture
def cells():
    """Logits, and the cells of student and teacher: five images, scales 1, 2 and 4, 4 classes."""
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        return torch.randn(5, count, 4, generator=generator, dtype=torch.float64)

    student, teacher = (
        Features([], torch.zeros(5, 1), {f"cells{m}": [2 * draw(m * m)] for m in (1, 2, 4)})
        for _ in range(2)
    )
    return draw(1)[:, 0], student, teacher


def softmax(z):
    return [math.exp(x) / sum(math.exp(y) for y in z) for x in z]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def without(z, label):
    return softmax([x for i, x in enumerate(z) if i != label])


def kd(s, t, label):
    tau = 4
    p, q = (softmax([x / tau for x in z]) for z in (t, s))
    return 0.9 * tau**2 * kl(p, q)


def dkd(s, t, label):
    tau = 4
    s, t = ([x / tau for x in z] for z in (s, t))
    p, q = (softmax(z)[label] for z in (t, s))
    return tau**2 * (kl([p, 1 - p], [q, 1 - q]) + 8 * kl(without(t, label), without(s, label)))


def nkd(s, t, label):
    tau = 4
    others = zip(*(without([x / tau for x in z], label) for z in (t, s)), strict=True)
    first = -softmax(t)[label] * math.log(softmax(s)[label])
    return first - 8 * tau**2 * sum(a * math.log(b) for a, b in others)


def by_loops(base, student, teacher, labels, scales):
    """The mean over images and cells, and how many cells have the weight 2."""
    terms, doubled = [], 0
    for i, label in enumerate(labels.tolist()):
        whole = teacher.further["cells1"][0][i, 0].argmax().item() == label
        for m in scales:
            pairs = (of.further[f"cells{m}"][0][i].tolist() for of in (student, teacher))
            for s, t in zip(*pairs, strict=True):
                part = max(range(len(t)), key=t.__getitem__) == label
                doubled += part != whole
                terms.append((2 if part != whole else 1) * base(s, t, label))
    return sum(terms) / len(terms), doubled


def cross_entropy(logits, labels):
    rows = zip(logits.tolist(), labels.tolist(), strict=True)
    return np.mean([-math.log(softmax(z)[y]) for z, y in rows])


@pytest.mark.parametrize(("base", "weight"), [(kd, 0.1), (dkd, 1.0), (nkd, 1.0)])
@pytest.mark.parametrize("scales", [1, 2, 3])
def test_sdd_against_loops(cells, base, weight, scales):
    logits, student, teacher = cells
    loss = SDDLoss(base=base.__name__, scales=scales)
    sizes = (1, 2, 4)[:scales]
    expected, doubled = by_loops(base, student, teacher, LABELS, sizes)
    assert (doubled > 2) == (scales > 1)
    expected += weight * cross_entropy(logits, LABELS)
    assert loss(logits, LABELS, student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert loss.student_further == loss.teacher_further == {f"cells{m}" for m in sizes}


def test_weights_and_warm_up_are_those_that_are_given(cells):
    logits, student, teacher = cells

    def value(epoch=0, **settings):
        loss = SDDLoss(base="dkd", ce_weight=0, **settings)
        loss.set_epoch(epoch)
        return loss(logits, LABELS, student, teacher).item()

    whole = value()
    assert value(weight=0.5) == pytest.approx(whole / 2)
    assert value(warmup_epochs=4) == pytest.approx(whole / 4)
    assert value(epoch=2, warmup_epochs=4) == pytest.approx(whole * 3 / 4)
    assert value(epoch=9, warmup_epochs=4) == whole
    slope = value(beta=1) - value(beta=0)
    assert value(beta=8) == pytest.approx(value(beta=0) + 8 * slope) == pytest.approx(whole)
    with pytest.raises(InputError, match=r"sdd: beta is 2\.0, and the base kd has no such term"):
        SDDLoss(beta=2)


@pytest.mark.parametrize("base", ["kd", "dkd", "nkd"])
def test_a_mixed_image_has_the_weighted_mean_of_both_losses(cells, base):
    logits, student, teacher = cells
    others, share = torch.tensor([3, 1, 0, 1, 2]), torch.tensor([0.2, 0.9, 0.5, 0.4, 1.0])
    loss = SDDLoss(base=base)
    soft = torch.zeros(5, 4)
    expected = 0.0
    for i, (label, other, first) in enumerate(zip(LABELS, others, share, strict=True)):
        soft[i, label] += first
        soft[i, other] += 1 - first
        one = [
            Features([], x.pooled[:1], {n: [m[0][i : i + 1]] for n, m in x.further.items()})
            for x in (student, teacher)
        ]
        for each, part in ((label, first), (other, 1 - first)):
            expected += part * loss(logits[i : i + 1], each[None], *one) / 5
    found = loss(logits, soft, student, teacher)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="soft labels with more than two classes for an image"):
        loss(logits, torch.full((5, 4), 0.25), student, teacher)


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("resnet20", 4),
        ("wrn_16_2", 2),
        ("vgg8_cifar", 4),
        ("shufflenetv2", 2),
        ("mobilenetv2_cifar", 2),
        ("resnet18", 2),
        ("mobilenetv1_100", 2),
    ],
)
def test_cells_are_what_the_last_layer_makes_of_the_means_of_blocks(name, scale):
    torch.manual_seed(0)
    size = 64 if name in ("resnet18", "mobilenetv1_100") else 32
    network = timm.create_model(name, num_classes=7).eval().double()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        logits, features = WithFeatures(network, frozenset(["cells1", f"cells{scale}"]))(x)
        last = network.forward_features(x)
    side = last.shape[2] // scale
    assert last.shape[2] == side * scale
    layer = network.get_classifier()
    for number, (i, j) in enumerate(itertools.product(range(scale), repeat=2)):
        block = last[:, :, i * side : (i + 1) * side, j * side : (j + 1) * side]
        expected = F.linear(block.mean((2, 3)), layer.weight, layer.bias)
        torch.testing.assert_close(features.further[f"cells{scale}"][0][:, number], expected)
    torch.testing.assert_close(features.further[f"cells{scale}"][0].mean(1), logits)
    torch.testing.assert_close(features.further["cells1"][0][:, 0], logits)


def test_a_map_that_is_smaller_than_the_cells_repeats_them():
    network = timm.create_model("mobilenetv2_cifar", num_classes=7).eval()
    _, features = WithFeatures(network, frozenset(["cells2", "cells4"]))(torch.randn(2, 3, 32, 32))
    two, four = (features.further[name][0] for name in ("cells2", "cells4"))
    grid = two.unflatten(1, (2, 2)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(four, grid.flatten(1, 2))


def test_one_scale_is_the_base_itself():
    torch.manual_seed(0)
    student, teacher = (timm.create_model("resnet8", num_classes=10).eval() for _ in range(2))
    x, y = torch.randn(4, 3, 16, 16), torch.arange(4)
    values, gradients = [], []
    for loss in (SDDLoss(scales=1), KDLoss()):
        student.zero_grad()
        distiller = Distiller(student, teacher, loss)
        distiller.connect(x)
        value = distiller(x, y)
        value.backward()
        values.append(value.detach())
        gradients.append(student.stem[0].weight.grad.clone())
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_mixed_labels_reach_the_loss():
    torch.manual_seed(0)
    student, teacher = (timm.create_model("resnet8", num_classes=10).eval() for _ in range(2))
    distiller = Distiller(student, teacher, SDDLoss(base="dkd"))
    x, labels, others = torch.randn(4, 3, 16, 16), torch.arange(4), torch.arange(5, 9)
    distiller.connect(x)
    mixed = distiller(x, MixedLabels(labels, others, torch.full((4,), 0.25)))
    first, second = (distiller(x, each) for each in (labels, others))
    torch.testing.assert_close(mixed, 0.25 * first + 0.75 * second)


SMALL = """
base:
  data: {name: digits, pad: 1, limit: 96}
  student: resnet8
  teacher: {name: wrn_16_2, train: {epochs: 1}}
  optimizer: {name: sgd, lr: 0.05, momentum: 0.9}
  epochs: 2
  batch_size: 32
grid: {loss: [{name: sdd, base: [kd, dkd], scales: [2, 3]}, at]}
"""


def test_settings_are_a_grid_and_a_gang_has_the_bits_of_trials_alone(experiment, tmp_path):
    trials = [cell.trial for cell in plan(experiment(SMALL)).cells]
    assert [t.loss.model_dump(exclude_defaults=True) for t in trials[:4]] == [
        {"name": "sdd"} | settings
        for settings in ({"scales": 2}, {}, {"base": "dkd", "scales": 2}, {"base": "dkd"})
    ]
    stores = [Store(tmp_path / name) for name in ("alone", "together")]
    for store in stores:
        run(trials[0].teacher, store)
    for trial in trials:
        run(trial, stores[0])
    ended = {}
    train_gang(
        trials,
        load(trials[0].data),
        stores[1],
        lambda epochs: None,
        lambda trial, error: ended.update({trial.id: error}),
        device=torch.device("cpu"),
    )
    assert ended == {trial.id: None for trial in trials}
    assert len({weights(stores[1], trial) for trial in trials}) == 5
    for trial in trials:
        assert weights(stores[0], trial) == weights(stores[1], trial), trial.label


def test_networks_that_do_not_end_with_a_mean_and_a_linear_layer_are_told(experiment):
    def check(*overrides):
        trial = plan(experiment(SMALL, "loss=sdd", *overrides)).cells[0].trial
        assert isinstance(trial, Trial)
        check_features(trial, 10, 1, 32)

    check()
    said = "sdd needs networks that end with average pooling and a linear layer, as {} does not"
    vit = "{name: vit_tiny_patch16_224, args: {img_size: 32}}"
    with pytest.raises(InputError, match=said.format("vit_tiny_patch16_224")):
        check(f"student={vit}")
    pooled = "{name: resnet18, args: {global_pool: max}, train: {epochs: 1}}"
    with pytest.raises(InputError, match=said.format("resnet18")):
        check(f"teacher={pooled}")
    with pytest.raises(InputError, match="sdd: beta is 1"):
        check("loss={name: sdd, beta: 1}")


def test_a_trial_resumes_to_the_bit(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr("pld_ray.distill.keeping.CHECKPOINT_SECONDS", 0)
    trial = plan(experiment(SMALL, "loss=sdd")).cells[0].trial
    stores = [Store(tmp_path / name) for name in ("whole", "broken")]
    run(trial, stores[0])
    run(trial.teacher, stores[1])

    def stop(metrics):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(trial, load(trial.data), stores[1], stop)
    run(trial, stores[1])
    assert weights(stores[0], trial) == weights(stores[1], trial)
