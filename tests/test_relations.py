"""NST, KDSVD and CC against loops in float64: values, gradients, degenerate features."""

import math

import pytest
import torch

from pld_ray import losses
from pld_ray.config.planning import plan
from pld_ray.errors import InputError
from pld_ray.losses import Features
from pld_ray.models.checks import check_features

FORMS = [
    ("nst", {}),
    ("kdsvd", {}),
    ("kdsvd", {"over": "columns"}),
    ("kdsvd", {"vectors": 2}),
    ("cc", {}),
    ("cc", {"form": "rbf"}),
]
GIVEN = torch.zeros(3, 4, dtype=torch.float64), torch.tensor([0, 3, 1])  # logits and labels


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def features(shapes, width=7, batch=3, seed=0):
    """Features that take gradients, double."""
    stages = [draw(batch, *shape, seed=seed + i) for i, shape in enumerate(shapes)]
    found = Features(stages, draw(batch, width, seed=seed))
    for x in leaves(found):
        x.requires_grad_()
    return found


def leaves(found):
    return *found.stages, found.pooled


def separated(rows, columns, seed):
    """A matrix whose singular values are 1, 0.6, 0.36, ... times 5."""
    least = min(rows, columns)
    left, right = (torch.linalg.qr(draw(n, least, seed=seed))[0] for n in (rows, columns))
    return left @ torch.diag(5 * 0.6 ** torch.arange(least).double()) @ right.T


def with_spectrum(shapes, over, seed):
    """Features whose matrices, of one sample, have singular values that differ."""
    found = features(shapes, seed=seed)
    for i, (channels, h, w) in enumerate(shapes):
        for b in range(3):
            if over == "channels":
                x = separated(h * w, channels, seed + 9 * i + b).T
            else:
                x = separated(channels * h, w, seed + 9 * i + b)
            found.stages[i].data[b] = x.reshape(channels, h, w)
    return found


def connected(name, settings, student, teacher):
    torch.manual_seed(0)
    loss = losses.create_loss(name, **settings)
    loss.connect(student, teacher)
    return loss.double()


def block_means(x, size):
    """Averages of blocks: x [channels, h, w] to [channels, size, size]."""
    block = x.shape[1] // size
    rows = [
        x[:, i * block : (i + 1) * block, j * block : (j + 1) * block].mean((1, 2))
        for i in range(size)
        for j in range(size)
    ]
    return torch.stack(rows, 1).reshape(len(x), size, size)


def nst(student, teacher):
    def kernel(x, y):
        values = [((a / a.norm()) @ (b / b.norm())) ** 2 for a in x for b in y]
        return sum(values) / len(values)

    total = 0
    for stage_s, stage_t in zip(student.stages, teacher.stages, strict=True):
        size = min(stage_s.shape[2], stage_t.shape[2])
        for one, other in zip(stage_s, stage_t, strict=True):
            a, b = block_means(one, size).flatten(1), block_means(other, size).flatten(1)
            total += (kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)) / len(stage_s)
    return 50 * total


def compared(loss, student, teacher, expected, rtol=1e-9, gradient_rtol=1e-9):
    """Compare the distance and its gradient in float64, and the loss in float32."""
    distance = loss.distance(student, teacher)
    torch.testing.assert_close(distance, expected, rtol=rtol, atol=0)
    found, reference = (
        torch.autograd.grad(x, leaves(student), allow_unused=True) for x in (distance, expected)
    )
    used = [(a, b) for a, b in zip(found, reference, strict=True) if a is not None]
    assert used and sum(x is not None for x in reference) == len(used)
    for one, other in used:
        assert (one - other).norm() <= gradient_rtol * other.norm()
    value = loss.float()(*GIVEN, student, teacher).item()
    assert value == pytest.approx(math.log(4) + expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    "shapes",
    [
        ([(3, 4, 4), (5, 2, 2)], [(4, 4, 4), (6, 2, 2)]),  # few channels, then few positions
        ([(3, 8, 8), (6, 2, 2)], [(2, 4, 4), (6, 4, 4)]),  # either map is the larger one
    ],
    ids=["same", "pooled"],
)
def test_nst_against_loops(shapes):
    student, teacher = (features(each, seed=i) for i, each in enumerate(shapes))
    compared(losses.NSTLoss(), student, teacher, nst(student, teacher))


def singular_vectors(x, over, size):
    """Singular values and right singular vectors of a map [channels, h, w]."""
    if over == "channels":
        matrix = torch.stack([x[:, i, j] for i in range(x.shape[1]) for j in range(x.shape[2])])
    else:
        matrix = torch.cat([*block_means(x, size)])
    _, values, vectors = torch.linalg.svd(matrix, full_matrices=False)
    return values, vectors


def kdsvd(student, teacher, over="channels", vectors=1):
    total = 0
    for b in range(3):
        before = None
        for one, other in zip(student.stages, teacher.stages, strict=True):
            size = min(one.shape[2], other.shape[2])
            values, rows = singular_vectors(other[b].detach(), over, size)
            share = values[:vectors] / values[:vectors].norm()
            _, candidates = singular_vectors(one[b], over, size)
            pairs = []
            for k in range(vectors):
                t = rows[k] if rows[k][rows[k].abs().argmax()] > 0 else -rows[k]
                cosines = [float(v.detach() @ t) for v in candidates[: vectors + 3]]
                best = max(range(len(cosines)), key=lambda i, c=cosines: abs(c[i]))
                s = candidates[best] * math.copysign(1, cosines[best])
                pairs.append((s * share[k], t * share[k]))
            for (s, t), (s_before, t_before) in zip(pairs, before or [], strict=before is not None):
                for i in range(len(s)):
                    for j in range(len(s_before)):
                        r_s = torch.exp(-((s[i] - s_before[j]) ** 2) / 8)
                        r_t = torch.exp(-((t[i] - t_before[j]) ** 2) / 8)
                        total = total + (r_s - r_t) ** 2
            before = pairs
    return total / 3


KDSVD = {  # maps of student and teacher, and the settings
    "tall, wide": ([(4, 3, 3), (9, 2, 2)], [(4, 2, 2), (9, 3, 3)], {}),
    "two vectors": ([(6, 3, 3), (7, 3, 3), (5, 2, 2)], [(6, 3, 3), (7, 3, 3), (5, 2, 2)],
                    {"vectors": 2}),
    "columns": ([(4, 4, 4), (5, 2, 2)], [(3, 4, 4), (6, 2, 2)], {"over": "columns"}),
}  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs", "settings"), KDSVD.values(), ids=KDSVD)
def test_kdsvd_against_loops_over_svds(ours, theirs, settings):
    over = settings.get("over", "channels")
    student, teacher = with_spectrum(ours, over, 0), with_spectrum(theirs, over, 50)
    expected = kdsvd(student, teacher, **settings)
    # The gradient of near singular values is bounded: here the nearest ones have the ratio 0.6.
    loss = losses.KDSVDLoss(**settings)
    compared(loss, student, teacher, expected, gradient_rtol=1e-4)


def test_kdsvd_pools_the_larger_map_over_columns():
    student = features([(4, 8, 8), (5, 2, 2)])
    teacher = features([(3, 4, 4), (6, 4, 4)], seed=1)
    loss = losses.KDSVDLoss(over="columns")
    expected = kdsvd(student, teacher, over="columns").item()
    assert loss.distance(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_kdsvd_chooses_the_sign_of_the_teachers_vectors():
    shapes = [(6, 4, 4), (5, 3, 3)]
    student, teacher = features(shapes), features(shapes, seed=1)
    negative = Features([-teacher.stages[0], teacher.stages[1]], teacher.pooled)
    loss = losses.KDSVDLoss()
    expected = loss.distance(student, teacher)
    torch.testing.assert_close(loss.distance(student, negative), expected)
    other = Features([-student.stages[0], student.stages[1]], student.pooled)
    torch.testing.assert_close(loss.distance(other, teacher), expected)


def test_kdsvd_in_float32_with_a_leading_vector_as_after_a_relu():
    """The leading singular value of a map after a ReLU is far above the others."""
    student, teacher = (features([(16, 8, 8), (32, 4, 4)], seed=i) for i in (0, 1))
    for x in (*student.stages, *teacher.stages):
        x.data = (x.data + 3).relu()
    loss = losses.KDSVDLoss(vectors=2, weight=100.0, ce_weight=0.0)
    value = loss(*GIVEN, student, teacher).item()
    assert value == pytest.approx(100 * kdsvd(student, teacher, vectors=2).item(), rel=1e-4)


def cc(loss, student, teacher):
    x, y = (
        [one @ linear.weight.T + linear.bias for one in pooled]
        for linear, pooled in (
            (loss.student_map, student.pooled),
            (loss.teacher_map, teacher.pooled.detach()),
        )
    )
    if loss.form == "differences":
        pairs = range(len(x) - 1)
        total = sum(((x[i] - y[i]).abs() * (x[i + 1] - y[i + 1]).abs()).sum() for i in pairs)
        return 0.02 * total / len(pairs)

    def kernel(a, b):
        cosine = (a / a.norm()) @ (b / b.norm())
        return math.exp(-0.8) * (1 + 0.8 * cosine + 0.8**2 / 2 * cosine**2)

    n = len(x)
    errors = [(kernel(x[i], x[j]) - kernel(y[i], y[j])) ** 2 for i in range(n) for j in range(n)]
    return 100 * sum(errors) / n**2


@pytest.mark.parametrize("form", ["differences", "rbf"])
def test_cc_against_loops(form):
    student, teacher = features([(2, 2, 2)]), features([(3, 2, 2)], width=9, seed=1)
    loss = connected("cc", {"form": form}, student, teacher)
    assert [tuple(p.shape) for p in loss.parameters()] == [(128, 7), (128,), (128, 9), (128,)]
    compared(loss, student, teacher, cc(loss, student, teacher))


def test_the_series_of_cc_approaches_the_gaussian_kernel():
    x, y = draw(4, 5), draw(4, 5, seed=1)
    a, b = (each / each.norm(dim=1, keepdim=True) for each in (x, y))
    gaussian = [torch.exp(-0.7 * torch.cdist(each, each) ** 2) for each in (a, b)]
    loss = losses.CCLoss("rbf", weight=1.0, gamma=0.7, order=20)
    found = loss.distance(Features([], x), Features([], y))  # not connected: x and y as they are
    torch.testing.assert_close(found, (gaussian[0] - gaussian[1]).square().mean())


@pytest.mark.parametrize("gamma", [0.4, 80.0])  # exp(-160) is no float32
def test_the_series_of_cc_may_have_any_order(gamma):
    x, y = (1 + draw(4, 5, seed=seed) / 10 for seed in (0, 1))  # near each other
    a, b = (each / each.norm(dim=1, keepdim=True) for each in (x, y))
    gaussian = [torch.exp(-gamma * torch.cdist(each, each) ** 2) for each in (a, b)]
    loss = losses.CCLoss("rbf", weight=1.0, gamma=gamma, order=500)  # 500! is no float64
    found = loss.distance(Features([], x.float()), Features([], y.float()))
    expected = (gaussian[0] - gaussian[1]).square().mean().float()
    assert expected > 1e-5
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("name", "settings"), FORMS, ids=str)
def test_gradients_against_differences(name, settings):
    shapes = [(3, 3, 3), (5, 2, 2)]
    student = with_spectrum(shapes, settings.get("over", "channels"), 0)
    teacher = with_spectrum(shapes, settings.get("over", "channels"), 50)
    loss = connected(name, settings, student, teacher)

    def distance(*given):
        return loss.distance(Features(list(given[:-1]), given[-1]), teacher)

    torch.autograd.gradcheck(distance, leaves(student), rtol=1e-3, atol=1e-6, fast_mode=True)


def degenerate(kind):
    """Student and teacher features for which a careless gradient is not finite."""
    shapes = [(4, 4, 4), (4, 2, 2)]
    student, teacher = features(shapes), features(shapes, seed=1)
    for x in leaves(student):
        if kind == "zeros":
            x.data.zero_()
        elif kind == "a sample of zeros":
            x.data[1] = 0
        elif kind == "constant":  # rank one
            x.data.fill_(2.5)
        elif kind == "as the teacher":
            x.data = dict(zip(leaves(student), leaves(teacher), strict=True))[x].data.clone()
        elif kind == "large":
            x.data *= 1e12
        elif kind == "small":
            x.data *= 1e-12
    if kind == "equal singular values":
        student.stages[0].data[:] = torch.eye(16, 4).T.reshape(4, 4, 4).double()
        student.stages[1].data[:] = 2 * torch.eye(4).reshape(4, 2, 2).double()
    elif kind == "a stage of zeros":
        student.stages[0].data[1] = 0
    elif kind == "zeros":
        for x in leaves(teacher):
            x.data.zero_()
    elif kind == "one image":
        student, teacher = (
            Features([x[:1] for x in each.stages], each.pooled[:1]) for each in (student, teacher)
        )
    return student, teacher


@pytest.mark.parametrize("kind", [
    "zeros", "a sample of zeros", "a stage of zeros", "constant", "as the teacher", "large",
    "small", "equal singular values", "one image",
])  # fmt: skip
@pytest.mark.parametrize(("name", "settings"), FORMS, ids=str)
def test_values_and_gradients_are_finite(name, settings, kind):
    student, teacher = degenerate(kind)
    heavy = {"weight": 1e6} if "zeros" in kind else {}  # to divide by the least number overflows
    loss = connected(name, settings | heavy, student, teacher).float()
    logits = GIVEN[0][: len(student.pooled)].clone().requires_grad_()
    value = loss(logits, GIVEN[1][: len(logits)], student, teacher)
    wanted = [x for x in (logits, *leaves(student), *loss.parameters())]
    found = torch.autograd.grad(value, wanted, allow_unused=True)
    found = [x for x in found if x is not None]
    assert value.isfinite() and len(found) > 1 and all(x.isfinite().all() for x in found)
    if kind == "as the teacher" and name != "cc":  # CC has two maps of the same features
        assert value.item() == pytest.approx(math.log(4), rel=1e-6)
    if kind == "one image" and settings == {} and name == "cc":
        assert value.item() == pytest.approx(math.log(4), rel=1e-6)


@pytest.mark.parametrize(("name", "settings"), FORMS[:4], ids=str)
def test_a_batch_is_the_mean_of_its_samples(name, settings):
    """A last batch that is smaller than the others has the same weight for each sample."""
    shapes = [(4, 4, 4), (6, 2, 2)]
    student, teacher = features(shapes), features(shapes, seed=1)
    loss = losses.create_loss(name, **settings)
    alone = [
        loss.distance(*(Features([x[i, None] for x in f.stages], f.pooled[i, None]) for f in both))
        for i, both in enumerate([(student, teacher)] * 3)
    ]
    torch.testing.assert_close(loss.distance(student, teacher), torch.stack(alone).mean())


@pytest.mark.parametrize(("name", "settings"), FORMS, ids=str)
def test_no_step_depends_on_a_value(name, settings):
    """On the meta device, whatever reads a number of a tensor is an error: no wait for a GPU."""
    shapes = [(4, 4, 4), (6, 2, 2)]
    student, teacher = (features(shapes, seed=i) for i in (0, 1))
    loss = connected(name, settings, student, teacher).to("meta")
    for each in (student, teacher):
        each.stages[:] = [x.detach().to("meta").requires_grad_() for x in each.stages]
    student, teacher = (
        Features(f.stages, f.pooled.detach().to("meta").requires_grad_())
        for f in (student, teacher)
    )
    loss.distance(student, teacher).backward()
    assert any(x.grad is not None for x in leaves(student))


@pytest.mark.parametrize(
    ("ours", "theirs", "settings", "said"),
    [
        (
            [(4, 4, 4), (8, 2, 2)],
            [(4, 4, 4), (9, 2, 2)],
            {},
            "stage 2 has 8 channels in the student and 9 in the teacher; expected the same number",
        ),
        ([(4, 4, 4)], [(4, 4, 4)], {}, "the networks have 1 stage; expected two or more"),
        ([(4, 4, 4)], [(4, 4, 4)] * 2, {}, "the student has 1 stages and the teacher has 2"),
        (
            [(4, 4, 4), (8, 1, 2)],
            [(4, 4, 4), (8, 4, 4)],
            {"vectors": 3},
            "vectors is 3, but a map of stage 2 has only 2",
        ),
    ],
    ids=["channels", "one stage", "stages", "vectors"],
)
def test_pairs_that_kdsvd_cannot_compare(ours, theirs, settings, said):
    with pytest.raises(ValueError, match=f"kdsvd: {said}"):
        losses.KDSVDLoss(**settings).distance(features(ours), features(theirs))


def test_pairs_that_cannot_be_compared_are_told_before_the_run(experiment):
    text = """
base:
  data: {name: digits, pad: 1, limit: 120}
  student: wrn_16_1
  teacher: {name: wrn_16_2, train: {epochs: 1}}
  epochs: 1
"""

    def check(*overrides):
        check_features(plan(experiment(text, *overrides)).cells[0].trial, 10, 1, 8)

    with pytest.raises(InputError, match="wrn_16_2 → wrn_16_1: kdsvd: stage 1 has 16 channels"):
        check("loss=kdsvd")
    check("loss={name: kdsvd, over: columns}")
    check("loss=nst")
    check("loss=cc", "student=mobilenetv2_cifar")
