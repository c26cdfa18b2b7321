"""Losses on features against loops in float64, the taps, and training with them."""

import math

import numpy as np
import pytest
import timm
import torch
from small import run
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from pld_ray import losses
from pld_ray.config.planning import plan
from pld_ray.config.trial import Trial
from pld_ray.data.datasets import load
from pld_ray.distill.device import autocast
from pld_ray.distill.distiller import Distiller
from pld_ray.distill.loop import train
from pld_ray.distill.steps import Target
from pld_ray.distill.teacher import _cast_weights
from pld_ray.errors import InputError
from pld_ray.losses import FeatureLoss, Features, TeacherLayers
from pld_ray.losses.feature_loss import same_size
from pld_ray.models.checks import check_features
from pld_ray.models.features import WithFeatures, check_further
from pld_ray.store.store import Store

SHAPES = [(4, 8, 8), (6, 4, 4)], [(8, 4, 4), (6, 4, 4)]  # of student and teacher: channels, h, w


@pytest.fixture
def batch():
    """Logits, labels and the features of five images, double."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student, teacher = (
        Features([draw(5, *shape) for shape in shapes], draw(5, width), {})
        for shapes, width in zip(SHAPES, (7, 9), strict=True)
    )
    for features, shapes in zip((student, teacher), SHAPES, strict=True):
        features.further["preact"] = [draw(5, *shape) for shape in shapes]
        features.further["last"] = [draw(5, 9, 4, 4)]
        for m in (1, 2, 4):
            features.further[f"cells{m}"] = [draw(5, m * m, 10)]
    return draw(5, 10), torch.tensor([3, 0, 9, 1, 1]), student, teacher


NAMES = [  # CRD, which keeps a memory of samples, has tests of its own
    name
    for name, params in losses.REGISTRY.items()
    if params.needs_features and not params.takes_samples
]
OPTIONS = {"kdsvd": {"over": "columns"}}  # the channels of the first stage differ


def connected(name, student, teacher):
    """A loss that has seen such features and the last layers of their teacher."""
    norms = [nn.BatchNorm2d(stage.shape[1]) for stage in teacher.stages]
    loss = losses.create_loss(name, **OPTIONS.get(name, {}))
    loss.borrow(TeacherLayers("teacher", nn.Linear(teacher.pooled.shape[1], 10), norms))
    loss.connect(student, teacher)
    return loss


def leaves(features, make):
    """Features of which each tensor is a new leaf, and the leaves."""
    copied = tree_map(make, features)
    return copied, tree_leaves(copied)


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
    return v / max(np.linalg.norm(v), 1e-12)


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
        return d / (d.sum() / (len(x) * (len(x) - 1)))  # pairs of equal samples count too

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


@pytest.mark.parametrize("size", [(8, 6), (4, 2), (5, 6), (3, 4), (7, 1)])
def test_pooling_is_that_of_torch(size):
    x = torch.randn(2, 3, 8, 6, dtype=torch.float64, requires_grad=True)
    small = torch.zeros(2, 1, *size, dtype=torch.float64)
    found, expected = same_size(x, small)[0], F.adaptive_avg_pool2d(x, size)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected))
    torch.testing.assert_close(*gradients)


def padded(x, pad):
    return np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))


def by_convolution(x, weight, bias):
    """A 3x3 convolution of stride 2 that pads by 1: [B, c, 2h, 2w] to [B, o, h, w]."""
    x, size = padded(x, 1), x.shape[2] // 2
    out = np.zeros((len(x), len(weight), size, size))
    for b, c, i, j in np.ndindex(*out.shape):
        out[b, c, i, j] = (weight[c] * x[b, :, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]).sum()
    return out + bias[:, None, None]


def by_transposed_convolution(x, weight, bias):
    """A 4x4 transposed convolution of stride 2 that cuts 1: [B, c, h, w] to [B, o, 2h, 2w]."""
    size = 2 * x.shape[2]
    out = np.zeros((len(x), weight.shape[1], size + 2, size + 2))
    for b, c, i, j in np.ndindex(*x.shape):
        out[b, :, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += x[b, c, i, j] * weight[c]
    return out[:, :, 1:-1, 1:-1] + bias[:, None, None]


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_fitnet_regresses_by_convolution_batch_norm_and_relu(batch, larger):
    logits, labels, student, teacher = batch
    if larger == "teacher":
        student, teacher = teacher, student
    loss = losses.FitNetLoss(stage=1)
    loss.connect(student, teacher)
    weight, bias, gain, shift = (p.detach().double().numpy() for p in loss.parameters())
    assert weight.shape == ((8, 4, 3, 3) if larger == "student" else (8, 4, 4, 4))
    assert (gain == 1).all() and (shift == 0).all()
    resampled = by_convolution if larger == "student" else by_transposed_convolution
    s = resampled(student.stages[0].numpy(), weight, bias)
    mean, variance = (f(s, (0, 2, 3), keepdims=True) for f in (np.mean, np.var))
    regressed = np.maximum((s - mean) / np.sqrt(variance + 1e-5), 0)
    errors = regressed - teacher.stages[0].numpy()
    expected = cross_entropy(logits, labels) + 100 * (errors**2).mean()
    assert loss(logits, labels, student, teacher).item() == pytest.approx(expected, rel=1e-4)


def test_rkd_counts_pairs_of_equal_samples_in_its_mean(batch):
    logits, labels, student, teacher = batch
    student.pooled[1] = student.pooled[0]
    expected = cross_entropy(logits, labels) + rkd(student, teacher)
    loss = losses.create_loss("rkd")
    assert loss(logits, labels, student, teacher).item() == pytest.approx(expected, rel=1e-4)


def test_rkd_in_pieces_has_the_same_value_and_gradient(batch, monkeypatch):
    def value_and_gradient():
        pooled = batch[2].pooled.clone().requires_grad_()
        value = losses.RKDLoss()(*batch[:2], Features([], pooled), batch[3])
        value.backward()
        return value.detach(), pooled.grad

    whole = value_and_gradient()
    monkeypatch.setattr("pld_ray.losses.features.ANGLES", 2 * 5 * 9)  # two anchors of five samples
    torch.testing.assert_close(value_and_gradient(), whole)


@pytest.mark.parametrize("name", NAMES)
def test_an_autocast_of_the_caller_does_not_lower_the_precision(batch, name):
    loss = connected(name, *batch[2:])

    def value_and_gradients(lowered):
        student, given = leaves(batch[2], lambda x: x.clone().requires_grad_())
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            value = loss(*batch[:2], student, batch[3])
        value.backward()
        return [value.detach(), *(x.grad for x in given)]

    expected, under = value_and_gradients(False), value_and_gradients(True)
    assert all(a is b or torch.equal(a, b) for a, b in zip(under, expected, strict=True))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [(8, 4), (4, 8), (4, 4), (7, 4), (4, 7), (12, 4), (4, 12), (16, 4), (4, 16)],
)
def test_fitnet_takes_maps_of_any_size(student, teacher):
    features = [Features([torch.randn(2, 3, n, n)], torch.zeros(2, 1)) for n in (student, teacher)]
    loss = losses.FitNetLoss(stage=1)
    loss.connect(*features)
    size = loss.regressor(features[0].stages[0]).shape[2]
    assert size == (teacher if max(student, teacher) % min(student, teacher) == 0 else student)
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


@pytest.mark.parametrize("name", NAMES)
def test_gradients_go_to_the_student_alone_and_are_finite_for_equal_images(batch, name):
    logits, labels, student, teacher = batch
    loss = connected(name, student, teacher)
    ours, given = leaves(student, lambda x: x[:1].expand_as(x).clone().requires_grad_())
    theirs, constant = leaves(teacher, lambda x: x.clone().requires_grad_())
    loss(logits.requires_grad_(), labels, ours, theirs).backward()
    gradients = [x.grad for x in (logits, *given) if x.grad is not None]
    assert len(gradients) > 1 and all(g.isfinite().all() for g in gradients)
    assert all(x.grad is None for x in constant)


@pytest.mark.parametrize(
    ("name", "sizes"),
    {
        "resnet20": [(16, 32), (32, 16), (64, 8)],
        "wrn_16_2": [(32, 32), (64, 16), (128, 8)],
        "mobilenetv2_cifar": [(12, 16), (16, 8), (48, 4), (160, 2)],
        "resnet50_cifar": [(256, 32), (512, 16), (1024, 8), (2048, 4)],
        "resnet18_cifar": [(64, 32), (128, 16), (256, 8), (512, 4)],
        "wrn_16_1": [(16, 32), (32, 16), (64, 8)],
        "vgg8_cifar": [(128, 16), (256, 8), (512, 4), (512, 4)],
        "vgg19_cifar": [(128, 16), (256, 8), (512, 4), (512, 4)],
        "shufflenetv1": [(240, 16), (480, 8), (960, 4)],
        "shufflenetv2": [(116, 16), (232, 8), (464, 4)],
        "shufflenetv2_x1_5": [(176, 16), (352, 8), (704, 4)],
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


class Further(FeatureLoss):
    """The distance between the maps before a ReLU, and the logits by the teacher's classifier."""

    name = "own"
    student_further = teacher_further = frozenset(["preact"])

    def __init__(self):
        super().__init__(ce_weight=0.0)
        self.scale = nn.Parameter(torch.ones(()))

    def borrow(self, teacher):
        self.norms = len(teacher.norms)
        self.constant("weight", teacher.classifier.weight)
        self.constant("bias", teacher.classifier.bias)

    def distance(self, student, teacher):
        pairs = self._pairs(*(Features(x.further["preact"], x.pooled) for x in (student, teacher)))
        self.seen = [x.dtype for x in (*pairs[0], student.pooled)], teacher.pooled.requires_grad
        logits = F.linear(teacher.pooled, self.weight, self.bias)
        return self.scale * sum(F.mse_loss(*pair) for pair in pairs) + logits.mean()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_loss_gets_further_features_and_borrows_constants_of_the_teacher(precision):
    torch.manual_seed(0)
    student, teacher = (timm.create_model("resnet8", num_classes=10) for _ in range(2))
    if precision == "bfloat16":
        _cast_weights(teacher)
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    loss = Further()
    distiller = Distiller(student.eval(), teacher, loss, precision=precision)
    distiller.connect(x)
    assert loss.norms == 3 and loss.weight.dtype == loss.bias.dtype == torch.float32
    assert loss.weight.data_ptr() != teacher.fc.weight.data_ptr()
    assert list(loss.state_dict()) == ["scale"]  # nothing borrowed is saved or trained
    assert distiller.learnt_by_loss() == [loss.scale]
    assert {name for name in distiller.state_dict() if name.startswith("loss")} == {"loss.scale"}
    value = distiller(x, y)
    value.backward()
    assert loss.seen == ([torch.float32] * 3, False)
    with torch.no_grad(), autocast(x.device, precision):
        maps = [[] for _ in range(2)]
        for network, found in ((student, maps[0]), (teacher, maps[1])):
            stage = network.stem(x)
            for blocks in network.stages:
                (block,) = blocks
                found.append(block.main(stage) + block.shortcut(stage))
                stage = found[-1].relu()
        pooled = stage.mean((2, 3))
    expected = sum((a.double() - b.double()).square().mean() for a, b in zip(*maps, strict=True))
    classifier = teacher.fc.weight.double(), teacher.fc.bias.double()
    expected += F.linear(pooled.double(), *classifier).mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-4)
    assert student.stem[0].weight.grad.any() and teacher.fc.weight.grad is None
    assert loss.to("meta").weight.is_meta


def test_networks_without_a_last_relu_are_told():
    def make(student, teacher):
        networks = (timm.create_model(name, num_classes=10) for name in (student, teacher))
        return Distiller(*networks, Further())

    said = "own compares the {}'s feature maps before a ReLU, which {} does not have: expected a CI"
    for name in ("mobilenetv2_cifar", "mobilenetv1_100", "convnext_atto"):
        for side, pair in (("student", (name, "resnet8")), ("teacher", ("resnet8", name))):
            if pair[0] != "mobilenetv2_cifar":  # a student whose stages are linear will do
                with pytest.raises(InputError, match=said.format(side, name)):
                    make(*pair)
    linear = make("mobilenetv2_cifar", "resnet50_cifar").student.eval()
    images = torch.randn(2, 3, 32, 32)
    features = WithFeatures(linear, Further.student_further)(images)[1]
    plain = WithFeatures(linear)(images)[1].stages
    assert all(map(torch.equal, features.further["preact"], plain)) and len(plain) == 4
    silu = timm.create_model("resnet18", num_classes=10, act_layer="silu")
    with pytest.raises(InputError, match=said.format("student", "resnet18")):
        check_further(Further(), silu, silu)
    wrong = Further()
    wrong.teacher_further = frozenset(["logit"])
    network = timm.create_model("resnet8", num_classes=10)
    with pytest.raises(InputError, match="own: teacher_further has 'logit': expected 'preact'"):
        check_further(wrong, network, silu)


@pytest.mark.parametrize("logits", [None, torch.arange(6.0).reshape(2, 3)])
def test_all_tensors_of_a_target_go_through_a_graph(logits):
    maps = [torch.full((2, 1, n, n), float(n)) for n in (4, 2, 1)]
    further = {"preact": maps[:2], "other": [-maps[0]]}
    target = Target(logits, None, Features(maps[1:], maps[0].flatten(1), further))
    tensors = target.tensors()
    assert sum(x is not None for x in tensors) == 6 + (logits is not None)
    again = target.with_tensors(tuple(None if x is None else x + 1 for x in tensors))
    assert again.order is None and (again.logits is None) == (logits is None)
    assert again.features.further.keys() == further.keys()
    torch.testing.assert_close(again.features.further["other"][0], 1 - maps[0])
    torch.testing.assert_close(again.features.stages, [x + 1 for x in maps[1:]])
    copied = target.copy()
    copied.features.further["preact"][0].zero_()
    assert maps[0].all()
    assert Target().tensors() == (None, None, None) and Target().copy() == Target()


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


@pytest.mark.parametrize(
    ("name", "learnt"),
    {"vid": 3 * 4, "ofd": 3 * 6, "reviewkd": 4 * 12 + 3 * 2, "srrl": 6, "cc": 4}.items(),
)
def test_a_learnt_part_is_trained_kept_on_resume_and_not_saved(
    name, learnt, experiment, tmp_path, monkeypatch
):
    monkeypatch.setattr("pld_ray.distill.keeping.CHECKPOINT_SECONDS", 0)
    trial = plan(experiment(SMALL, f"loss={name}")).cells[0].trial
    stores = [Store(tmp_path / name) for name in ("whole", "broken")]
    run(trial, stores[0])
    run(trial.teacher, stores[1])

    def stop(metrics):
        kept = stores[1].load_checkpoint(trial)["loss"]
        assert len(kept) == learnt and any((v != v.flatten()[0]).any() for v in kept.values())
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


def test_a_regressor_on_one_pixel_needs_batches_of_two_images(experiment):
    loss = "loss={name: fitnet, stage: 4}"
    overrides = loss, "student=resnet18", "teacher={name: resnet34, train: {epochs: 1}}"
    trial = plan(experiment(SMALL, *overrides)).cells[0].trial
    check_features(trial, 10, 1, 16)
    with pytest.raises(InputError, match="loss fitnet cannot train on a batch of one image of 16x"):
        check_features(trial, 10, 1, 16, batch=1)
