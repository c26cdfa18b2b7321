"""OFD, ReviewKD and SRRL against loops in float64, and the networks that they accept."""

import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

from pld_ray import losses
from pld_ray.config.planning import plan
from pld_ray.distill.distiller import Distiller
from pld_ray.errors import InputError
from pld_ray.losses import Features, TeacherLayers
from pld_ray.losses.overhaul import batch_norm_margins, partial_squares
from pld_ray.losses.review import hierarchical_context
from pld_ray.models.checks import check_features
from pld_ray.models.features import WithFeatures
from pld_ray.models.reused import reuse_classifier


def drawn(seed, shapes, width, preact=True):
    """Features of five images, double."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    further = {"preact": [draw(5, *shape) for shape in shapes]} if preact else {}
    return Features([draw(5, *shape) for shape in shapes], draw(5, width), further)


def teacher_norms(widths):
    """Batch norms with weights and biases that give margins of both kinds."""
    torch.manual_seed(1)
    norms = [nn.BatchNorm2d(width).double() for width in widths]
    for norm in norms:
        nn.init.uniform_(norm.weight, -1, 1)
        nn.init.normal_(norm.bias)
        norm.bias.data[0] = 4 * norm.weight.data[0].abs()  # seldom negative
    return norms


def arrays(module):
    return [parameter.detach().numpy() for parameter in module.parameters()]


def batch_norm(x, gain, shift):
    axes = tuple(i for i in range(x.ndim) if i != 1)
    mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    shape = [1, -1] + [1] * (x.ndim - 2)
    return (x - mean) / np.sqrt(variance + 1e-5) * gain.reshape(shape) + shift.reshape(shape)


def convolved(x, weight, bias=None):
    """A convolution of stride 1 that keeps the size."""
    pad = weight.shape[2] // 2
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    size = weight.shape[2]
    out = np.zeros((len(x), len(weight), x.shape[2] - 2 * pad, x.shape[3] - 2 * pad))
    for b, c, i, j in np.ndindex(*out.shape):
        out[b, c, i, j] = (weight[c] * x[b, :, i : i + size, j : j + size]).sum()
    return out if bias is None else out + bias[:, None, None]


def averaged(x, size):
    """Averages of blocks of maps [B, channels, n, n]."""
    block = x.shape[2] // size
    out = np.zeros((*x.shape[:2], size, size))
    for i, j in np.ndindex(size, size):
        part = x[:, :, i * block : (i + 1) * block, j * block : (j + 1) * block]
        out[:, :, i, j] = part.mean((2, 3))
    return out


# ---------------------------------------------------------------- OFD


def test_margins_are_the_means_of_the_negative_values():
    weight = torch.tensor([1.0, -0.5, 2.0, 0.3, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    bias = torch.tensor([0.0, 0.3, -1.0, 2.0, 3.05, 3.12, -4.0, 1.0, -1.0, 0.0])
    expected = []
    for s, b in zip(weight.abs().tolist(), bias.tolist(), strict=True):
        if s == 0:  # a constant: it is never negative, or always
            expected.append(min(b, 0.0))
            continue
        x = np.linspace(min(b, 0) - 12 * s, 0, 2_000_001)
        density = np.exp(-(((x - b) / s) ** 2) / 2) / (s * math.sqrt(2 * math.pi))
        mass = np.trapezoid(density, x)
        expected.append(np.trapezoid(x * density, x) / mass if mass > 0.001 else -3 * s)
    found = batch_norm_margins(weight, bias)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-12)
    rare = [margin == -3 * s for margin, s in zip(expected, weight.abs().tolist(), strict=True)]
    assert rare[:7] == [False, False, False, True, False, True, False]  # both sides of 0.1%


def partial(r, t, m):
    """The distance of one element, case by case."""
    if t > 0:
        return (r - t) ** 2
    if t > m:
        return (r - t) ** 2 if r > t else 0.0
    return (r - m) ** 2 if r > m else 0.0


def test_partial_distance_of_one_element():
    values = [-2.0, -1.0, -0.5, 0.0, 0.5, 2.0]
    for r in values:
        for t in values:
            for m in (-1.0, -0.7, 0.0):
                found = partial_squares(*(torch.tensor([x]) for x in (r, t, m)))
                assert found.item() == pytest.approx(partial(r, t, m)), (r, t, m)


@pytest.mark.parametrize("side", [8, 16, 4])
def test_ofd_against_loops(side):
    student = drawn(0, [(4, 8, 8), (6, 4, 4), (3, 4, 4)], 7)
    teacher = drawn(1, [(8, side, side), (6, 4, 4), (5, 8, 8)], 9)
    norms = teacher_norms([8, 6, 5])
    loss = losses.OFDLoss(weight=0.5)
    loss.borrow(TeacherLayers("wrn", nn.Linear(9, 10), norms))
    loss.connect(student, teacher)
    weights = [connector[0].weight for connector in loss.connectors]
    assert [list(weight.shape) for weight in weights] == [[8, 4, 1, 1], [6, 6, 1, 1], [5, 3, 1, 1]]
    loss = loss.double()
    total = 0.0
    for i, norm in enumerate(norms):
        s, t = (features.further["preact"][i].numpy() for features in (student, teacher))
        r = batch_norm(convolved(s, arrays(loss.connectors[i])[0]), np.ones(1), np.zeros(1))
        size = s.shape[2]
        t = t.repeat(2, 2).repeat(2, 3) if t.shape[2] < size else averaged(t, size)
        margins = batch_norm_margins(norm.weight, norm.bias).float().tolist()
        for b, c, y, x in np.ndindex(*r.shape):
            total += partial(r[b, c, y, x], t[b, c, y, x], margins[c]) / 5 / [4, 2, 1][i]
    assert loss.distance(student, teacher).item() == pytest.approx(0.5 * total, rel=1e-9)
    assert not any(name.startswith("margin") for name in loss.state_dict())


def test_connectors_start_with_the_spread_of_the_authors():
    torch.manual_seed(0)
    loss = losses.OFDLoss()
    maps = [Features([torch.zeros(1, width, 2, 2)], torch.zeros(1, 1)) for width in (300, 200)]
    loss.connect(*maps)
    weight = loss.connectors[0][0].weight
    assert weight.std().item() == pytest.approx((2 / 200) ** 0.5, rel=0.01)
    assert weight.abs().max() > 3 * weight.std()  # normal, not uniform


# ---------------------------------------------------------------- ReviewKD


def nearest(x, size):
    rows = [i * x.shape[2] // size for i in range(size)]
    return x[:, :, rows][:, :, :, rows]


def context(s, t):
    total, weights = ((s - t) ** 2).mean(), 1.0
    share = 0.5
    for side in (4, 2, 1):
        if s.shape[2] > side:
            total += share * ((averaged(s, side) - averaged(t, side)) ** 2).mean()
            weights += share
            share /= 2
    return total / weights


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_hierarchical_context_against_loops(size):
    s, t = torch.randn(2, 3, 5, size, size, dtype=torch.float64)
    expected = context(s.numpy(), t.numpy())
    assert hierarchical_context(s, t).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("student_preact", [False, True])
@pytest.mark.parametrize("sides", [(16, 8), (8, 4), (4, 8)])
def test_reviewkd_against_loops(sides, student_preact):
    student = drawn(0, [(4, 8, 8), (6, 4, 4)], 7, preact=student_preact)
    teacher = drawn(1, [(8, sides[0], sides[0]), (5, sides[1], sides[1])], 9)
    loss = losses.ReviewKDLoss(weight=3.0, warmup_epochs=4, student_preact=student_preact)
    assert loss.student_further == ({"preact"} if student_preact else set())
    loss.connect(student, teacher)
    loss = loss.double()
    ours = student.further["preact"] if student_preact else student.stages
    ours = [x.numpy() for x in (*ours, student.pooled[:, :, None, None])]
    theirs = [x.numpy() for x in (*teacher.further["preact"], teacher.pooled[:, :, None, None])]
    total, y = 0.0, None
    for s, t, fusion in reversed(list(zip(ours, theirs, loss.fusions, strict=True))):
        weight, gain, shift = arrays(fusion.first)
        assert weight.shape == (7, s.shape[1], 1, 1)  # as many channels as the pooled features
        assert np.abs(weight).max() <= math.sqrt(3 / s.shape[1]) <= 1.3 * np.abs(weight).max()
        x = batch_norm(convolved(s, weight), gain, shift)
        assert (fusion.attention is None) == (y is None)
        if y is not None:
            y = nearest(y, x.shape[2])
            z = convolved(np.concatenate([x, y], 1), *arrays(fusion.attention))
            z = 1 / (1 + np.exp(-z))
            x = x * z[:, :1] + y * z[:, 1:]
        y = nearest(x, t.shape[2])
        weight, gain, shift = arrays(fusion.last)
        total += context(batch_norm(convolved(y, weight), gain, shift), t)
    for epoch, share in ((0, 0.25), (2, 0.75), (3, 1.0), (9, 1.0)):
        loss.set_epoch(epoch)
        found = loss.distance(student, teacher).item()
        assert found == pytest.approx(3 * share * total, rel=1e-9)


def test_the_warm_up_begins_with_a_new_loss():
    assert losses.ReviewKDLoss().warmup == 1 / 20
    assert losses.ReviewKDLoss(warmup_epochs=0).warmup == 1


def test_fused_maps_have_at_most_512_channels():
    loss = losses.ReviewKDLoss()
    features = Features([torch.zeros(2, 3, 2, 2)], torch.zeros(2, 1280))
    loss.connect(features, features)
    assert [fusion.first[0].out_channels for fusion in loss.fusions] == [512, 512]


# ---------------------------------------------------------------- SRRL


def log_softmax(z):
    return z - np.logaddexp.reduce(z)


@pytest.mark.parametrize("bias", [True, False])
def test_srrl_against_loops(bias):
    student, teacher = drawn(0, [], 7), drawn(1, [], 9)
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 10).double(), torch.tensor([3, 0, 9, 1, 1])
    classifier = nn.Linear(9, 10, bias=bias)
    loss = losses.SRRLLoss(weight=2.0, ce_weight=0.5, kd_weight=3.0, temperature=1.5)
    loss.borrow(TeacherLayers("wrn", classifier, []))
    loss.connect(student, teacher)
    w = classifier.weight.detach().double().numpy()
    b = classifier.bias.detach().double().numpy() if bias else np.zeros(10)
    weight, gain, shift = (array.astype(np.float64) for array in arrays(loss.transfer))
    g = np.maximum(batch_norm(student.pooled.numpy() @ weight.T, gain, shift), 0)
    e, rows = teacher.pooled.numpy(), []
    for i, y in enumerate(labels):
        moved, target = g[i] @ w.T + b, e[i] @ w.T + b
        z = logits[i].numpy()
        log_p, log_q = log_softmax(target / 1.5), log_softmax(z / 1.5)
        divergence = sum(np.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
        distances = ((g[i] - e[i]) ** 2).mean() + ((moved - target) ** 2).mean()
        rows.append(2 * distances + 3 * 1.5**2 * divergence - 0.5 * log_softmax(z)[y])
    found = loss(logits, labels, student, teacher).item()
    assert found == pytest.approx(np.mean(rows), rel=1e-5)
    assert not any(name.startswith("classifier") for name in loss.state_dict())
    assert len(list(loss.parameters())) == 3


def test_srrl_uses_the_logits_of_the_teacher():
    torch.manual_seed(0)
    student, teacher = (timm.create_model("resnet8", num_classes=10) for _ in range(2))
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    distiller = Distiller(student, teacher, losses.SRRLLoss(weight=0, temperature=2.0)).eval()
    distiller.connect(x)
    logits = student(x)
    expected = nn.functional.cross_entropy(logits, y) + losses.KDLoss(2.0, ce_weight=0.0)(
        logits, teacher(x), y
    )
    assert distiller(x, y).item() == pytest.approx(expected.item(), rel=1e-5)


# ---------------------------------------------------------------- networks


EXPERIMENT = """
base: {data: {name: digits, pad: 1, limit: 120}, student: resnet8, epochs: 1}
"""


def test_networks_that_are_accepted(experiment):
    def check(student, teacher, loss):
        of = f"teacher={{name: {teacher}, train: {{epochs: 1}}}}"
        trial = plan(experiment(EXPERIMENT, f"student={student}", of, f"loss={loss}"))
        check_features(trial.cells[0].trial, 10, 3, 64)

    preact = "{name: reviewkd, student_preact: true}"
    for student, teacher in (
        ("resnet20", "resnet56"), ("wrn_40_1", "wrn_40_2"), ("vgg8_cifar", "vgg13_cifar"),
        ("shufflenetv2", "resnet32x4"), ("resnet18", "resnet34"), ("vgg8_cifar", "resnet50_cifar"),
    ):  # fmt: skip
        check(student, teacher, "ofd")
        check(student, teacher, preact)
    for loss in ("ofd", "reviewkd", "srrl"):
        check("resnet8x4", "resnet32x4", loss)
    check("mobilenetv2_cifar", "vgg13_cifar", "ofd")
    for loss in ("reviewkd", "srrl"):
        check("mobilenetv2_cifar", "vgg13_cifar", loss)
        check("mobilenetv1_100", "resnet50", loss)
        check("resnet8x4", "shufflenetv1", loss)
    for student, teacher, loss, said in (
        ("mobilenetv1_100", "resnet50", "ofd", "ofd compares the student's .* mobilenetv1_100"),
        (
            "vgg8_cifar",
            "mobilenetv2_cifar",
            "reviewkd",
            "reviewkd compares the teacher's .* mobile",
        ),
        ("mobilenetv1_100", "resnet50", preact, "reviewkd compares the student's .* mobilene"),
        ("resnet8", "shufflenetv1", "ofd", "ofd: shufflenetv1 has no batch norm before .*expected"),
        ("resnet8", "vgg8_cifar", "reviewkd", "reviewkd: the student has 3 stages and the teacher"),
    ):
        with pytest.raises(InputError, match=said):
            check(student, teacher, loss)
    other = TeacherLayers("own", nn.Conv2d(3, 10, 1), [])
    with pytest.raises(ValueError, match=r"srrl: the last layer of own is a Conv2d: expected a te"):
        losses.SRRLLoss().borrow(other)


@pytest.mark.parametrize("name", ["resnetv2_50", "resnet10t", "test_vit4"])
def test_the_logits_are_those_of_the_network(name):
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=5, in_chans=1).eval()
    size = network.default_cfg["input_size"][1] if "vit" in name else 32
    images = torch.randn(2, 1, size, size)
    with torch.no_grad():
        logits, features = WithFeatures(network)(images)
        assert torch.equal(logits, network(images))
    assert features.pooled.ndim == 2


def test_a_network_with_several_classifiers_is_told():
    network = timm.create_model("deit_tiny_distilled_patch16_224", img_size=8, patch_size=4)
    with pytest.raises(InputError, match="deit_tiny_distilled_.* has several classifiers, .*: exp"):
        Distiller(network, timm.create_model("resnet10t"), losses.CCLoss())


@pytest.mark.parametrize("factor", [0, -1, 1.5, True])
def test_a_factor_of_simkd_is_a_whole_number_from_1(factor):
    networks = (timm.create_model("resnet8", num_classes=3, in_chans=1) for _ in range(2))
    with pytest.raises(InputError, match="simkd: factor is .*: expected a whole number from 1"):
        reuse_classifier(*networks, torch.zeros(1, 1, 8, 8), factor=factor)
