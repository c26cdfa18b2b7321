"""PLD and its kin against float64 brute force: values, gradients, orders, top-K, transforms."""

import itertools
import math
import warnings

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pld_ray.losses import ListMLELoss, PlackettLuceLoss, PLDLoss, PListMLELoss, teacher_order
from pld_ray.losses.likelihood import _safe_probabilities


def draw(batch, classes, seed, student_scale=3.0, teacher_scale=3.0):
    rng = np.random.default_rng(seed)
    student = student_scale * rng.uniform(-1, 1, (batch, classes))
    teacher = teacher_scale * rng.standard_normal((batch, classes))
    return student.astype(np.float32), teacher.astype(np.float32), rng.integers(0, classes, batch)


def value_and_gradient(loss, student, teacher, labels, **more):
    x = torch.tensor(student, requires_grad=True)
    value = loss(x, torch.tensor(teacher), torch.tensor(labels), **more)
    value.sum().backward()
    return value.detach().double().numpy(), x.grad.double().numpy()


def assert_close(found, expected, rel):
    """Losses one by one; gradients by the norm of each row. Below 1e-37 float32 has no digits."""
    (values, gradients), (true_values, true_gradients) = found, expected
    np.testing.assert_allclose(values, true_values, rtol=rel, atol=1e-37)
    error = np.linalg.norm(gradients - true_gradients, axis=1)
    assert (error <= rel * np.linalg.norm(true_gradients, axis=1) + 1e-37).all()


@given(
    st.integers(1, 5),
    st.sampled_from([1, 2, 3, 7, 40]),
    st.integers(0, 10**6),
    st.sampled_from([1e-3, 1.0, 20.0, 60.0, 300.0, 1e4]),
    st.sampled_from([0.3, 1.0, 4.0]),
    st.sampled_from(["plain", "ties", "masked", "last", "agrees"]),
)
@settings(max_examples=300, deadline=None)
def test_float32_is_within_1e_5_of_brute_force(batch, classes, seed, scale, tau, kind):
    student, teacher, labels = draw(batch, classes, seed, scale)
    if kind == "ties":
        student, teacher = student.round(), teacher.round()
    elif kind == "masked":
        teacher[:, classes // 2 + 1 :] = -np.inf
    elif kind == "last":
        labels = teacher.argmin(1)
    elif kind == "agrees":  # the student is as sure of the teacher's ranking as can be
        student = -scale * np.argsort(np.argsort(-teacher)).astype(np.float32)
        labels = teacher.argmax(1)
    expected = reference.pld_rows(student, teacher, labels, tau)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = value_and_gradient(PLDLoss(tau, reduction="none"), student, teacher, labels)
    assert_close(found, expected, 1e-5)


def test_the_three_forms_are_what_these_ranges_reach():
    types = [
        None if p is None else p.dtype
        for p in (_safe_probabilities(torch.tensor([[0.0, -r]])) for r in (20, 60, 300, 1e4))
    ]
    assert types == [torch.float32, torch.float64, torch.float64, None]


@pytest.mark.parametrize("scale", [3.0, 2000.0])
def test_float64_is_exact(scale):
    student, teacher, labels = (
        x.astype(float) if i < 2 else x for i, x in enumerate(draw(5, 9, 0))
    )
    student *= scale
    expected = reference.pld_rows(student, teacher, labels)
    found = value_and_gradient(PLDLoss(reduction="none"), student, teacher, labels)
    assert_close(found, expected, 1e-11)


@pytest.mark.parametrize("classes", [1000, 100_000])
def test_many_classes_by_a_closed_form(classes):
    # all logits equal: step k costs log(C - k + 1), whatever the order
    zeros, label = torch.zeros(1, classes), torch.tensor([3])
    costs = [math.log(classes - k) for k in range(classes)]
    equal = math.lgamma(classes + 1) / classes
    assert ListMLELoss()(zeros, zeros, label).item() == pytest.approx(equal, rel=1e-5)
    # 2^(C-k) - 1 over its sum: 2^-k to float64's last digit
    halves = sum(2.0 ** -(k + 1) * cost for k, cost in enumerate(costs))
    assert PListMLELoss()(zeros, zeros, label).item() == pytest.approx(halves, rel=1e-5)
    inverse = [1 / (k + 1) for k in range(classes)]
    harmonic = sum(w * c for w, c in zip(inverse, costs, strict=True)) / sum(inverse)
    found = PlackettLuceLoss(lambda step: 1 / step)(zeros, zeros, label).item()
    assert found == pytest.approx(harmonic, rel=1e-5)


def test_plackett_luce_probabilities_of_all_rankings_sum_to_one():
    student = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, total = PlackettLuceLoss(torch.ones_like), 0.0  # the mean of the four steps
    for ranking in itertools.permutations(range(4)):
        order, label = torch.tensor([ranking]), torch.tensor([ranking[0]])
        total += math.exp(-4 * loss(student, student, label, order=order).item())
    assert total == pytest.approx(1, abs=1e-12)


def test_all_weight_on_the_first_step_is_cross_entropy():
    student, teacher, labels = draw(5, 6, 0)
    expected = reference.cross_entropy(student.astype(float), labels)
    args = [torch.tensor(x) for x in (student, teacher, labels)]
    loss = PlackettLuceLoss(lambda step: (step == 1).double())
    assert loss(*args).item() == pytest.approx(expected)
    sure = 1e4 * torch.nn.functional.one_hot(args[2], 6).float()  # a teacher without doubt
    assert PLDLoss()(args[0], sure, args[2]).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda step: step[1:], "expected 6 weights for 6 steps"),
        (lambda step: -step, "none negative"),
        (torch.zeros_like, "not all 0"),
        (lambda step: torch.exp(1e3 * step), "their sum is inf"),
    ],
)
def test_schedules_that_are_none(schedule, message):
    args = [torch.tensor(x) for x in draw(2, 6, 0)]
    with pytest.raises(ValueError, match=message):
        PlackettLuceLoss(schedule)(*args)


# orders


@given(st.integers(1, 300), st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float16]))
@settings(max_examples=60, deadline=None)
def test_order_is_descending_with_ties_by_class(classes, seed, dtype):
    rng = np.random.default_rng(seed)
    teacher = rng.choice([-np.inf, -65504, -1.5, -1e-7, -0.0, 0.0, 1e-7, 2.0, 65504], (3, classes))
    found = teacher_order(torch.tensor(teacher, dtype=dtype))
    expected = [sorted(range(classes), key=lambda c, row=row: (-row[c], c)) for row in teacher]
    assert found.tolist() == expected
    labels = rng.integers(0, classes, 3)
    found = teacher_order(torch.tensor(teacher, dtype=dtype), torch.tensor(labels))
    expected = [reference.ranking(row, y) for row, y in zip(teacher, labels, strict=True)]
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("classes", "dtype"), [(256, torch.uint8), (257, torch.int16), (32769, torch.int32)]
)
def test_order_is_kept_in_the_smallest_integers(classes, dtype):
    logits = torch.arange(classes, dtype=torch.float64)[None, None]
    order = teacher_order(logits)
    assert order.dtype == dtype and order.shape == (1, 1, classes)
    assert order[0, 0, 0] == classes - 1 and order[0, 0, -1] == 0
    assert teacher_order(logits, top_k=2).tolist() == [[[classes - 1, classes - 2]]]


@pytest.mark.parametrize(
    "loss",
    [PLDLoss(2.0), PLDLoss(top_k=4), PLDLoss(standardize="both"), ListMLELoss(), PListMLELoss()],
    ids=repr,
)
@pytest.mark.parametrize("scale", [3.0, 2000.0])
def test_a_given_order_gives_the_same(loss, scale):
    student, teacher, labels = draw(6, 9, 0, scale)
    labels[0] = teacher[0].argmin()  # passed over at the very end of the order
    labels[1] = teacher[1].argmax()
    order = teacher_order(torch.tensor(teacher))
    expected = value_and_gradient(loss, student, teacher, labels)
    for given_order in (order, order.long()):
        found = value_and_gradient(loss, student, teacher, labels, order=given_order)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
        np.testing.assert_allclose(found[1], expected[1], atol=1e-7)
    if not getattr(loss, "top_k", None):
        first = teacher_order(torch.tensor(teacher), torch.tensor(labels))
        found = value_and_gradient(loss, student, teacher, labels, order=first)
        assert (found[0] == expected[0]).all() and (found[1] == expected[1]).all()


def test_orders_that_do_not_fit():
    student, teacher, labels = (torch.tensor(x) for x in draw(6, 9, 0))
    order = teacher_order(teacher)
    with pytest.raises(ValueError, match=r"order: expected integers of shape \[6, 9\]"):
        PLDLoss()(student, teacher, labels, order=order[:5])
    with pytest.raises(ValueError, match="order: expected integers"):
        PLDLoss()(student, teacher, labels, order=order.float())
    with pytest.raises(ValueError, match="order: expected 9 classes, got 4"):
        PLDLoss()(student, teacher, labels, order=order[:, :4])
    with pytest.raises(ValueError, match="order: expected 5 classes, got 4"):
        PLDLoss(top_k=5)(student, teacher, labels, order=order[:, :4])


# top-K


def top_k_rows(student, teacher, labels, k):
    rows = []
    for s, t, y in zip(student, teacher, labels, strict=True):
        best = sorted(range(len(t)), key=lambda c, t=t: (-t[c], c))[:k]
        ranked = [y, *(c for c in best if c != y)]
        alpha = reference.softmax(t.astype(np.float64))
        rows.append(reference.weighted_ranking(s, ranked, alpha[ranked]))
    return tuple(np.array(x) for x in zip(*rows, strict=True))


@given(st.integers(1, 12), st.integers(0, 10**6), st.sampled_from([1.0, 60.0, 1e3]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_top_k_is_the_ranked_classes_with_the_others_as_tail(k, seed, scale, last):
    student, teacher, labels = draw(4, 11, seed, scale)
    if last:
        labels = teacher.argmin(1)
    expected = top_k_rows(student, teacher, labels, k)
    loss = PLDLoss(top_k=k, reduction="none")
    assert_close(value_and_gradient(loss, student, teacher, labels), expected, 1e-5)


def test_top_k_keeps_its_bound_on_random_and_adversarial_logits():
    for seed, k in itertools.product(range(20), (1, 3, 8)):
        student, teacher, labels = (x for x in draw(4, 12, seed, 30.0))
        if seed % 2:  # adversarial: the student ranks the tail the other way round
            student = -10 * teacher
        full = reference.pld_rows(student, teacher, labels)
        loss = PLDLoss(top_k=k, reduction="none")
        values, gradients = value_and_gradient(loss, student, teacher, labels)
        for i, (s, t, y) in enumerate(zip(student, teacher, labels, strict=True)):
            tail = [c for c in np.argsort(-t)[k:] if c != y]
            eps = reference.softmax(t.astype(np.float64))[tail].sum()
            bound = eps * (math.log(len(tail)) + s[tail].max() - s[tail].min())
            slack = 1e-5 * full[0][i]  # float32
            assert -slack <= full[0][i] - values[i] <= bound + slack
            assert np.abs(full[1][i] - gradients[i]).sum() <= 2 * eps + 1e-5


def test_auto_top_k_leaves_less_than_the_tolerance_out_and_each_sample_to_itself():
    rng = np.random.default_rng(0)
    classes = 4100  # k = 64 and 256 are tried, and one sample needs all
    rank = 1 + np.argsort(rng.random((6, classes)))
    steep = np.array([1.2, 1.5, 2, 3, 4, 6])[:, None]  # probabilities fall as rank^-steep
    teacher = (-steep * np.log(rank)).astype(np.float32)
    student = rng.standard_normal((6, classes)).astype(np.float32)
    labels = rng.integers(0, classes, 6)
    loss = PLDLoss(top_k="auto", tolerance=1e-2, reduction="none")
    together = value_and_gradient(loss, student, teacher, labels)
    full = reference.pld_rows(student, teacher, labels)
    assert (np.abs(full[1] - together[1]).sum(1) <= 2e-2 + 1e-5).all()
    for i in range(6):
        row = slice(i, i + 1)
        alone = value_and_gradient(loss, student[row], teacher[row], labels[row])
        np.testing.assert_allclose(alone[0], together[0][row], rtol=1e-6)
        # by hand: steps until less than the tolerance is left out
        order = reference.ranking(teacher[i], labels[i])
        alpha = reference.softmax(teacher[i].astype(float))[order]
        steps = 1 + int((1 - alpha.cumsum() >= 1e-2).sum())
        expected, _ = reference.weighted_ranking(student[i], order[:steps], alpha[:steps])
        assert alone[0][0] == pytest.approx(expected, rel=1e-5)


# adaptive weights, the warning


def test_adaptive_weights():
    student, teacher, labels = draw(6, 5, 0)
    losses = reference.pld_rows(student, teacher, labels, 2.0)[0]
    q = np.array([reference.softmax(t.astype(float) / 2) for t in teacher])
    entropy = 1 + (q * np.log(q)).sum(1) / math.log(5)
    best = np.sort(q)[:, ::-1]
    for adaptive, weight in (("entropy", entropy), ("margin", best[:, 0] - best[:, 1])):
        loss = PLDLoss(2.0, adaptive=adaptive)
        found = value_and_gradient(loss, student, teacher, labels)[0]
        assert found == pytest.approx((weight * losses).sum() / weight.sum(), rel=1e-5)


def test_a_teacher_close_to_uniform_is_told_once():
    student, teacher, labels = draw(8, 10, 0)
    loss = PLDLoss()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value_and_gradient(loss, student, 3 * teacher, labels)
        with pytest.raises(UserWarning, match=r"close to uniform at temperature 1 \(mean entropy"):
            value_and_gradient(loss, student, teacher / 10, labels)
        for _ in range(6):
            value_and_gradient(loss, student, teacher / 10, labels)


# what autograd keeps, and what other transforms make of the loss

FORMS = {
    "pld": PLDLoss(2.0),
    "top_k": PLDLoss(top_k=2),
    "auto": PLDLoss(top_k="auto", tolerance=0.2),
    "listmle": ListMLELoss(),
    "plistmle": PListMLELoss(),
}


def test_nothing_but_the_gradient_is_kept_for_the_backward_pass():
    student, teacher, labels = (torch.tensor(x) for x in draw(6, 9, 0))
    kept = []

    def keep(x):
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        PLDLoss()(student.requires_grad_(), teacher, labels)
    given = {x.data_ptr() for x in (student, teacher, labels)}
    assert [x.shape for x in kept if x.data_ptr() not in given] == [student.shape]


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives(form):
    student, teacher, labels = (torch.tensor(x) for x in draw(3, 5, 1))
    labels[0] = teacher[0].argmin()
    student, teacher = student.double().requires_grad_(), teacher.double()
    assert torch.autograd.gradgradcheck(lambda s: FORMS[form](s, teacher, labels), student)


@pytest.mark.parametrize("form", FORMS)
def test_vmap_and_hessian_of_torch_func(form):
    student, teacher, labels = (torch.tensor(x) for x in draw(3, 5, 1))
    student, teacher, loss = student.double(), teacher.double(), FORMS[form]
    one_by_one = [loss(s[None], teacher[:1], labels[:1]).item() for s in student]
    batched = torch.func.vmap(lambda s: loss(s[None], teacher[:1], labels[:1]))(student)
    assert batched.tolist() == pytest.approx(one_by_one)
    each = torch.func.vmap(lambda s, t, y: loss(s[None], t[None], y[None]))(
        student, teacher, labels
    )
    assert each.mean().item() == pytest.approx(loss(student, teacher, labels).item())

    def of(s):
        return loss(s, teacher, labels)

    by_func = torch.func.hessian(of)(student)
    by_autograd = torch.autograd.functional.hessian(of, student)
    torch.testing.assert_close(by_func, by_autograd)


@pytest.mark.parametrize("form", [*FORMS, "order"])
def test_compiled_without_a_graph_break(form):
    student, teacher, labels = draw(6, 9, 0)
    more = {"order": teacher_order(torch.tensor(teacher))} if form == "order" else {}
    loss = FORMS.get(form, PLDLoss())
    expected = value_and_gradient(loss, student, teacher, labels, **more)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = value_and_gradient(compiled, student, teacher, labels, **more)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], atol=1e-7)
