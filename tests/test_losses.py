import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import cells, run
from torch.nn import functional as F

import pld_ray
from pld_ray.losses import (
    REGISTRY,
    CELoss,
    CTKDLoss,
    DISTLoss,
    DKDLoss,
    KDLoss,
    LabelSmoothingLoss,
    ListMLELoss,
    NKDLoss,
    PLDLoss,
    PListMLELoss,
    TTMLoss,
    WTTMLoss,
    create_loss,
)
from pld_ray.store.store import Store


def logits(batch=7, classes=6, seed=0, scale=2.0):
    rng = np.random.default_rng(seed)
    student, teacher = scale * rng.standard_normal((2, batch, classes))
    return student, teacher, rng.integers(0, classes, batch)


def apply(loss, student, teacher, labels):
    tensors = [torch.tensor(x) for x in (student, teacher, labels)]
    return loss(*tensors).item()


@given(st.integers(1, 9), st.integers(2, 12), st.integers(0, 10**6), st.floats(0.2, 8))
@settings(max_examples=60, deadline=None)
def test_pld_is_the_double_loop(batch, classes, seed, tau):
    args = logits(batch, classes, seed)
    assert apply(PLDLoss(tau), *args) == pytest.approx(reference.pld(*args, tau), rel=1e-10)


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_pld_gradient_is_the_papers_closed_form(tau):
    student, teacher, labels = logits()
    x = torch.tensor(student, requires_grad=True)
    PLDLoss(tau)(x, torch.tensor(teacher), torch.tensor(labels)).backward()
    expected = reference.pld_gradient(student, teacher, labels, tau)
    np.testing.assert_allclose(x.grad.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(x.grad.sum(1).numpy(), 0, atol=1e-12)


def rows(loss, student, teacher, labels, dtype=torch.float64):
    """The losses [B] and the gradient of their sum [B, C]."""
    s, t = (torch.tensor(x, dtype=dtype) for x in (student, teacher))
    loss.reduction = "none"
    values = loss(s.requires_grad_(), t, torch.tensor(labels))
    values.sum().backward()
    return values.detach().numpy(), s.grad.numpy()


MASKED = [PLDLoss(), KDLoss(1.0), DISTLoss(), DKDLoss(), NKDLoss(), TTMLoss(), WTTMLoss()]


@pytest.mark.parametrize("loss", MASKED, ids=type)
def test_classes_that_the_teacher_masks_weigh_nothing(loss):
    student, teacher, _ = logits()
    labels = np.zeros(len(student), int)
    teacher[:, 4:] = -np.inf
    expected = {
        PLDLoss: lambda: reference.pld(student, teacher, labels),
        KDLoss: lambda: reference.kd(student, teacher, labels, 1.0, 0.1, "forward_kl"),
        DISTLoss: lambda: reference.dist(student, teacher, labels, 4.0, 1.0, 2.0, 2.0),
        DKDLoss: lambda: reference.dkd(student, teacher, labels, 4.0, 1.0, 1.0, 8.0),
        NKDLoss: lambda: reference.nkd_rows(student, teacher, labels, 1, 1, 1.5)[0].mean(),
        TTMLoss: lambda: reference.ttm_rows(student, teacher, labels, 10, 1, 45, False)[0].mean(),
        WTTMLoss: lambda: reference.ttm_rows(student, teacher, labels, 5, 1, 4, True)[0].mean(),
    }[type(loss)]
    if isinstance(loss, DISTLoss):  # a class of no variance has no correlation, here 0
        with np.errstate(invalid="ignore"):
            assert np.isnan(expected())
        assert math.isfinite(apply(loss, student, teacher, labels))
    else:
        assert apply(loss, student, teacher, labels) == pytest.approx(expected(), rel=1e-6)


ALL = [
    CELoss(),
    LabelSmoothingLoss(0.1),
    *(KDLoss(3.0, 0.2, d) for d in ("forward_kl", "reverse_kl", "jensen_shannon")),
    KDLoss(standardize="both"),
    CTKDLoss(),
    DISTLoss(),
    DISTLoss(standardize="teacher"),
    DKDLoss(),
    NKDLoss(3.0, 0.5, 3.5),
    TTMLoss(),
    WTTMLoss(),
    PLDLoss(2.0),
    PLDLoss(standardize="both"),
    ListMLELoss(),
    PListMLELoss(),
]


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_gradcheck(loss):
    student, teacher, labels = (torch.tensor(x) for x in logits(4, 5))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, labels), student)


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_a_constant_added_to_a_row_changes_nothing(loss):
    student, teacher, labels = logits()
    shift = np.arange(len(student))[:, None] - 3.0
    before = apply(loss, student, teacher, labels)
    assert apply(loss, student + shift, teacher - shift, labels) == pytest.approx(before, rel=1e-9)


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_positions_of_a_sequence_are_samples_and_ignored_ones_are_left_out(loss):
    student, teacher, labels = (torch.tensor(x) for x in logits(6))
    expected = loss(student[:5], teacher[:5], labels[:5])
    x = student.clone().requires_grad_()
    ignored = labels.clone()
    ignored[5] = -100
    value = loss(x.view(2, 3, -1), teacher.view(2, 3, -1), ignored.view(2, 3))
    value.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert x.grad[5].abs().max() == 0 < x.grad[:5].abs().max()
    nothing = loss(student, teacher, torch.full_like(labels, -100))
    assert nothing.item() == 0


@pytest.mark.parametrize("name", [n for n, p in REGISTRY.items() if not p.needs_features])
def test_reductions_and_sample_weights(name):
    student, teacher, labels = (torch.tensor(x) for x in logits(6))
    labels[3:] = labels[:3]  # as of two views of three images
    weight = torch.tensor([0.0, 1, 2, 3, 4, 5], dtype=torch.float64)
    losses, total, mean = (
        create_loss(name, reduction=r)(
            student.view(2, 3, -1), teacher.view(2, 3, -1), labels.view(2, 3), **more
        )
        for r, more in (
            ("none", {}),
            ("sum", {"sample_weight": weight.view(2, 3)}),
            ("mean", {"sample_weight": weight.view(2, 3)}),
        )
    )
    assert losses.shape == (2, 3)
    by_hand = sum(w * x for w, x in zip(weight.tolist(), losses.flatten().tolist(), strict=True))
    assert total.item() == pytest.approx(by_hand)
    assert mean.item() == pytest.approx(by_hand / 15)
    plain = create_loss(name)(student, teacher, labels)
    assert plain.item() == pytest.approx(losses.mean().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_half_precision_logits_are_computed_in_float32(loss, dtype):
    student, teacher, labels = (torch.tensor(x) for x in logits())
    student, teacher = student.to(dtype), teacher.to(dtype)
    expected = loss(student.double(), teacher.double(), labels).item()
    x = student.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(x, teacher, labels)
    value.backward()
    assert value.dtype == torch.float32 and x.grad.dtype == dtype
    assert value.item() == pytest.approx(expected, rel=1e-5)


@given(st.integers(0, 10**6), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_plackett_luce_losses_are_convex_along_segments(seed, where):
    one, teacher, labels = logits(seed=seed)
    other = logits(seed=seed + 1)[0]
    for loss in (PLDLoss(), ListMLELoss(), PListMLELoss()):
        middle = apply(loss, where * one + (1 - where) * other, teacher, labels)
        ends = where * apply(loss, one, teacher, labels)
        ends += (1 - where) * apply(loss, other, teacher, labels)
        assert middle <= ends + 1e-9


@pytest.mark.parametrize("classes", [2, 6, 1500])
def test_listmle_and_plistmle_weights(classes):
    student, teacher, labels = logits(3, classes)
    equal = np.full(classes, 1 / classes)
    # in Python's integers 2^(C-k) - 1 does not overflow at any C
    powers = [2 ** (classes - k) - 1 for k in range(1, classes + 1)]
    decreasing = [w / sum(powers) for w in powers]
    for loss, weights in ((ListMLELoss(), equal), (PListMLELoss(), decreasing)):
        expected = np.mean(
            [
                reference.plackett_luce(s, reference.ranking(t, y), weights)
                for s, t, y in zip(student, teacher, labels, strict=True)
            ]
        )
        assert apply(loss, student, teacher, labels) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_kd(divergence):
    args = logits()
    expected = reference.kd(*args, 4.0, 0.1, divergence)
    assert apply(KDLoss(4.0, 0.1, divergence), *args) == pytest.approx(expected, rel=1e-10)


def test_dist():
    args = logits()
    for squared in (True, False):
        expected = reference.dist(*args, 4.0, 1.0, 2.0, 3.0, squared)
        loss = DISTLoss(4.0, 1.0, 2.0, 3.0, squared)
        assert apply(loss, *args) == pytest.approx(expected, rel=1e-6)  # its eps is 1e-8


def test_dkd_and_its_warmup():
    args = logits()
    expected = reference.dkd(*args, 4.0, 1.0, 1.0, 8.0)
    ce = reference.cross_entropy(args[0], args[2])
    assert apply(DKDLoss(4.0), *args) == pytest.approx(expected, rel=1e-10)
    warming = DKDLoss(4.0, warmup_epochs=20)
    warming.set_epoch(4)
    assert apply(warming, *args) == pytest.approx(ce + (expected - ce) * 5 / 20, rel=1e-10)


MATCHING = {False: TTMLoss, True: WTTMLoss}


@given(
    st.integers(1, 9),
    st.integers(2, 12),
    st.integers(0, 10**6),
    st.floats(0.2, 20),
    st.sampled_from([0.0, 0.3, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_nkd_ttm_and_wttm_are_the_loops(batch, classes, seed, tau, ce_weight):
    args = logits(batch, classes, seed)
    pairs = [(NKDLoss(tau, ce_weight, 3.5), reference.nkd_rows(*args, tau, ce_weight, 3.5))]
    for weighted, kind in MATCHING.items():
        expected = reference.ttm_rows(*args, tau, ce_weight, 4.0, weighted)
        pairs.append((kind(tau, ce_weight, 4.0), expected))
    for loss, (values, gradients) in pairs:
        found = rows(loss, *args)
        np.testing.assert_allclose(found[0], values, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found[1], gradients, rtol=1e-9, atol=1e-11)


def test_nkd_is_dkds_term_of_the_other_classes_plus_its_entropy():
    student, teacher, labels = logits()
    nkd = rows(NKDLoss(3.0, 0.0, 2.0), student, teacher, labels)
    dkd = rows(DKDLoss(3.0, 0.0, 0.0, 2.0), student, teacher, labels)
    p = np.array([reference.softmax(t)[y] for t, y in zip(teacher, labels, strict=True)])
    ce = rows(CELoss(), student, teacher, labels)
    np.testing.assert_allclose(nkd[1], dkd[1] + p[:, None] * ce[1], atol=1e-12)


def test_high_temperatures_compare_centred_logits_or_even_distributions():
    student, teacher, labels = logits()
    tau, gamma = 1e5, 2.0
    _, slope = rows(NKDLoss(tau, 0.0, gamma), student, teacher, labels)
    for i, (s, t, y) in enumerate(zip(student, teacher, labels, strict=True)):
        p, q = reference.softmax(t), reference.softmax(s)
        expected = p[y] * (q - np.eye(6)[y])
        rest = [c for c in range(6) if c != y]
        expected[rest] += gamma / 5 * ((s - s[rest].mean()) - (t - t[rest].mean()))[rest]
        np.testing.assert_allclose(slope[i], expected, atol=1e-3)
    even = np.array([-np.log(6) - np.log(reference.softmax(s)).mean() for s in student])
    for weight, kind in ((1, TTMLoss), (6, WTTMLoss)):
        found, _ = rows(kind(1e9, 0.0, 2.0), student, teacher, labels)
        np.testing.assert_allclose(found, 2 * weight * even, rtol=1e-6)


def test_a_teacher_that_is_sure_of_the_label_leaves_cross_entropy():
    student, teacher, labels = logits()
    teacher[np.arange(7), labels] = 1e4
    ce, slope = rows(CELoss(), student, teacher, labels)
    for loss, factor in ((NKDLoss(gamma=0.0), 2), (TTMLoss(4.0), 46), (WTTMLoss(4.0), 5)):
        found = rows(loss, student, teacher, labels)
        np.testing.assert_allclose(found[0], factor * ce, rtol=1e-12)
        np.testing.assert_allclose(found[1], factor * slope, rtol=1e-12, atol=1e-12)
    for tau in (1.0, 4.0):  # the teacher's other classes still count
        found = rows(NKDLoss(tau), student, teacher, labels)
        for x, expected in zip(
            found, reference.nkd_rows(student, teacher, labels, tau, 1, 1.5), strict=True
        ):
            np.testing.assert_allclose(x, expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("left", ["two classes", "all others masked"])
def test_no_other_class_is_left(left, dtype):
    """The term of the other classes is 0, with two classes and where the teacher masks them."""
    student, teacher, labels = logits(classes=2 if left == "two classes" else 6)
    if left == "all others masked":
        known = teacher[np.arange(7), labels]
        teacher[:] = -np.inf
        teacher[np.arange(7), labels] = known
    p = np.array([reference.softmax(t)[y] for t, y in zip(teacher, labels, strict=True)])
    ce, slope = rows(CELoss(), student, teacher, labels)
    found = rows(NKDLoss(3.0), student, teacher, labels, dtype)
    np.testing.assert_allclose(found[0], (1 + p) * ce, rtol=1e-5)
    np.testing.assert_allclose(found[1], (1 + p)[:, None] * slope, rtol=1e-4, atol=1e-6)
    found = rows(DKDLoss(1.0, 0.0, 1.0, 8.0), student, teacher, labels, dtype)
    forward = [
        reference.kl(reference.softmax(t), reference.softmax(s))
        for s, t in zip(student, teacher, strict=True)
    ]
    np.testing.assert_allclose(found[0], forward, rtol=1e-5, atol=1e-6)
    if left == "all others masked":
        for weighted, kind in MATCHING.items():
            expected = reference.ttm_rows(student, teacher, labels, 2.0, 1.0, 4.0, weighted)
            found = rows(kind(2.0, 1.0, 4.0), student, teacher, labels, dtype)
            np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
            np.testing.assert_allclose(found[0], 5 * ce, rtol=1e-5)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_large_logits_in_float32(tau):
    student, teacher, labels = logits(scale=1e4)
    student, teacher = (x.astype("f4").astype("f8") for x in (student, teacher))
    pairs = [(NKDLoss(tau), reference.nkd_rows(student, teacher, labels, tau, 1.0, 1.5))]
    for weighted, kind in MATCHING.items():
        expected = reference.ttm_rows(student, teacher, labels, tau, 1.0, 4.0, weighted)
        pairs.append((kind(tau, 1.0, 4.0), expected))
    for loss, (values, gradients) in pairs:
        found = rows(loss, student, teacher, labels, torch.float32)
        np.testing.assert_allclose(found[0], values, rtol=1e-5)
        np.testing.assert_allclose(found[1], gradients, rtol=1e-3, atol=1e-4)


def test_two_classes_by_hand():
    # student (0, 0): q = (1/2, 1/2). teacher (ln 3, 0): p = (3/4, 1/4). label 0
    args = np.array([[0.0, 0.0]]), np.array([[math.log(3), 0.0]]), np.array([0])
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert forward == pytest.approx(0.130812, abs=1e-6)
    assert apply(KDLoss(1.0, 0.0), *args) == pytest.approx(forward)
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert apply(KDLoss(1.0, 0.0, "reverse_kl"), *args) == pytest.approx(reverse)
    # m = (5/8, 3/8)
    js = 0.5 * (0.75 * math.log(1.2) + 0.25 * math.log(2 / 3))
    js += 0.5 * (0.5 * math.log(0.8) + 0.5 * math.log(4 / 3))
    assert apply(KDLoss(1.0, 0.0, "jensen_shannon"), *args) == pytest.approx(js)
    # steps: 3/4 (ln 2 - 0) for the label, then 1/4 (0 - 0)
    assert apply(PLDLoss(), *args) == pytest.approx(0.75 * math.log(2))
    assert apply(ListMLELoss(), *args) == pytest.approx(0.5 * math.log(2))
    assert apply(PListMLELoss(), *args) == pytest.approx(math.log(2))
    # target class: KL of (3/4, 1/4) and (1/2, 1/2); one class is left over, whose KL is 0
    assert apply(DKDLoss(1.0, 0.0, 1.0, 8.0), *args) == pytest.approx(forward)
    assert apply(LabelSmoothingLoss(0.1), *args) == pytest.approx(math.log(2))


def test_label_smoothing():
    student, teacher, labels = logits()
    uniform = np.mean([-np.log(reference.softmax(s)).mean() for s in student])
    expected = 0.9 * reference.cross_entropy(student, labels) + 0.1 * uniform
    assert apply(LabelSmoothingLoss(0.1), student, teacher, labels) == pytest.approx(expected)


def test_standardization_of_both_and_of_the_teacher():
    student, teacher, labels = logits()
    s, t = reference.standardize(student), reference.standardize(teacher)
    for mode, seen in (("both", s), ("teacher", student), ("none", student)):
        against = teacher if mode == "none" else t
        expected = reference.pld(seen, against, labels)
        loss = PLDLoss(standardize=mode)
        assert apply(loss, student, teacher, labels) == pytest.approx(expected, rel=1e-5)
        part = reference.kd(seen, against, labels, 4.0, 0.0, "forward_kl")
        loss = KDLoss(ce_weight=0.0, standardize=mode)
        assert apply(loss, student, teacher, labels) == pytest.approx(part, rel=1e-5)


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: type(loss).__name__)
def test_wrong_arguments_say_what_was_expected(loss):
    s, y = torch.zeros(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"labels: expected classes in \[0, 4\) or -100 .* got 4"):
        loss(s, s, torch.tensor([0, -100, 4]))
    with pytest.raises(ValueError, match=r"got -1"):
        loss(s, s, torch.tensor([0, 1, -1]))
    with pytest.raises(ValueError, match=r"labels: expected int64 of shape \[3\]"):
        loss(s, s, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"expected int64"):
        loss(s, s, y.float())
    with pytest.raises(ValueError, match=r"expected shape \[batch, classes\]"):
        loss(s[0], s[0], y)
    with pytest.raises(ValueError, match=r"sample_weight: expected the labels' shape \[3\]"):
        loss(s, s, y, sample_weight=torch.ones(3, 1))
    if REGISTRY_BY_CLASS[type(loss).__name__].needs_teacher:
        with pytest.raises(ValueError, match=r"must have the same classes"):
            loss(s, torch.zeros(3, 5), y)


REGISTRY_BY_CLASS = {params.source.split(":")[1]: params for params in REGISTRY.values()}


def test_a_class_that_is_ignored_is_as_in_pytorch():
    x, y = torch.randn(6, 4), torch.tensor([0, 0, 1, 2, 3, 1])
    expected = F.cross_entropy(x, y, ignore_index=0)
    torch.testing.assert_close(CELoss(ignore_index=0)(x, None, y), expected)
    kept = PLDLoss()(x[2:], x.flip(0)[2:], y[2:])
    torch.testing.assert_close(PLDLoss(ignore_index=0)(x, x.flip(0), y), kept)


def test_parameters_are_checked():
    with pytest.raises(TypeError, match="'temprature'; did you mean 'temperature'"):
        PLDLoss(temprature=4.0)
    with pytest.raises(TypeError, match="KDLoss: unknown argument 'T'; accepted: "):
        KDLoss(T=4)
    with pytest.raises(TypeError, match="unknown argument 'reductoin'; did you mean 'reduction'"):
        create_loss("pld", reductoin="sum")
    with pytest.raises(TypeError, match="ignore_index is 'x': expected an integer or None"):
        CELoss(ignore_index="x")
    with pytest.raises(ValueError, match="reduction is 'avg': expected one of"):
        CELoss(reduction="avg")
    for wrong in ({"top_k": 0}, {"top_k": "some"}, {"tolerance": 0.0}, {"adaptive": "margins"}):
        with pytest.raises(ValueError, match=f"pld: {next(iter(wrong))}"):
            PLDLoss(**wrong)
    with pytest.raises(ValueError, match=r"pld: temperature is -1\.0: Input should be greater"):
        PLDLoss(temperature=-1.0)
    for name in ("nkd", "ttm", "wttm"):
        factor = "gamma" if name == "nkd" else "beta"
        for field, value, said in (
            ("temperature", 0.0, "greater than 0"),
            ("ce_weight", -0.1, "greater than or equal to 0"),
            (factor, -1.0, "greater than or equal to 0"),
            (factor, math.inf, "finite number"),
        ):
            with pytest.raises(ValueError, match=f"{name}: {field} is {value}: .* {said}"):
                create_loss(name, **{field: value})
    with pytest.raises(ValueError, match="divergence"):
        KDLoss(divergence="kl")
    with pytest.raises(ValueError, match="ce_weight"):
        KDLoss(ce_weight=1.5)


def test_losses_are_importable_from_the_package():
    names = ["PLD", "KD", "CTKD", "DIST", "DKD", "NKD", "TTM", "WTTM", "MLKD"]
    names += ["ListMLE", "PListMLE"]
    for name in names:
        assert issubclass(getattr(pld_ray, f"{name}Loss"), torch.nn.Module)


def test_nkd_ttm_and_wttm_train_in_a_trial(tmp_path, experiment):
    store, matching = Store(tmp_path), "temperature: 4, beta: 2"
    methods = f"[nkd, {{name: ttm, {matching}}}, {{name: wttm, {matching}}}]"
    for trial in cells(experiment, f"grid.loss={methods}", "data.limit=600", "epochs=4"):
        assert run(trial, store)["metrics"]["top1"] > 30  # of 10 classes
