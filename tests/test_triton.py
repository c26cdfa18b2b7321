"""The Triton kernel of the ranking losses, in Triton's interpreter on the CPU, against float64."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CHECK = """
import torch
from pld_ray.losses import ListMLELoss, PLDLoss, PListMLELoss, likelihood, teacher_order
from pld_ray.losses import triton_kernel
from pld_ray.losses.likelihood import Weighting
from pld_ray.losses.triton_kernel import plackett_luce

triton_kernel.WARPS = 2  # two programs at most, each of which computes several rows

def brute_force(student, teacher, labels, weigh):
    # the loss of each row by its definition, differentiable, in float64
    total = []
    for s, t, y in zip(student, teacher, labels, strict=True):
        order = t.argsort(descending=True, stable=True)
        ranked = torch.cat([y[None], order[order != y]])
        weights = weigh(t, ranked)
        s = s[ranked]
        total.append(sum(w * (s[k:].logsumexp(0) - s[k]) for k, w in enumerate(weights)))
    return torch.stack(total)

def softmax(temperature):
    return lambda t, ranked: (t / temperature).softmax(0)[ranked]

def best(temperature, count):
    # the label and the `count` best classes; the order of the others does not matter
    def weigh(t, ranked):
        weights = (t / temperature).softmax(0)
        kept = set(t.argsort(descending=True, stable=True)[:count].tolist()) | {int(ranked[0])}
        return torch.stack([w if int(c) in kept else 0 * w
                            for w, c in zip(weights[ranked], ranked, strict=True)])
    return weigh

def until(temperature, tolerance):
    def weigh(t, ranked):
        weights = (t / temperature).softmax(0)[ranked]
        before = weights.cumsum(0) - weights
        kept = 1 - before >= tolerance
        kept[0] = True
        return weights * kept
    return weigh

def agrees(student, teacher, labels, order, weighting, weigh, block):
    exact = student.double().requires_grad_()
    expected = brute_force(exact, teacher.double(), labels, weigh)
    expected.sum().backward()
    found, gradient = plackett_luce(student, teacher, labels, order, weighting, True, block)
    assert torch.allclose(found.double(), expected.detach(), rtol=1e-5, atol=1e-6), weighting
    error = (gradient - exact.grad).abs().sum(1)
    assert (error <= 1e-5 * exact.grad.abs().sum(1) + 1e-7).all(), (weighting, error)
    if classes == 31:
        alone, _ = plackett_luce(student, teacher, labels, order, weighting, False, block)
        assert torch.equal(alone, found)

generator = torch.Generator().manual_seed(0)
cases = [(1, 3, 1, 1024), (2, 3, 1, 2), (10, 3, 1, 1024), (15, 3, 1, 16), (31, 3, 2, 16)]
cases += [(32, 3, 0.5, 16), (100, 3, 4, 32), (20, 1e3, 1, 8), (20, 1e4, 1, 8), (33, 0, 1, 8)]
for classes, scale, temperature, block in cases:
    student, teacher = torch.randn(2, 4, classes, generator=generator)
    student, teacher = scale * student, 3 * teacher
    labels = torch.randint(classes, (4,), generator=generator)
    if classes > 8:
        teacher[1, 3:6] = -torch.inf  # masked
        teacher[2, 1:5] = teacher[2, 0]  # ties
        labels[1] = 4  # masked and the label
        labels[3] = teacher[3].argmin()  # ranked last
    order = teacher.argsort(dim=1, descending=True, stable=True)
    given = student, teacher, labels
    for each in (order, teacher_order(teacher, labels))[: 2 if classes > 8 else 1]:
        agrees(*given, each, Weighting(temperature), softmax(temperature), block)
    for count in {1, min(3, classes), block - 1, block} if classes in (20, 31) else ():
        best_classes = order[:, :count]
        agrees(*given, best_classes, Weighting(temperature), best(temperature, count), block)
    if classes not in (10, 31):
        continue
    agrees(*given, order, Weighting(temperature, 0.1), until(temperature, 0.1), block)
    for loss in (ListMLELoss(), PListMLELoss()):
        weights = loss.weighting(teacher).schedule
        for each in (order, teacher_order(teacher, labels)):
            weighting = Weighting(schedule=weights)
            agrees(*given, each, weighting, lambda t, ranked: weights.double(), block)

for place in (0, 7, 11):  # logits that are not finite are not passed over
    for wrong in (torch.nan, torch.inf):
        student, teacher = torch.randn(2, 2, 12, generator=generator)
        student[1, place] = wrong
        for given in ((student, teacher), (teacher, student)):
            order = teacher_order(teacher)
            for each in (order, order[:, :4]):
                rest = torch.tensor([3, 3]), each, Weighting(), True
                found, gradient = plackett_luce(*given, *rest)
                assert found.isfinite().tolist() == [True, False]
                assert gradient.isfinite().all(1).tolist() == [True, False]

for shown in (torch.tensor([[0, 9], [5, 9], [11, 9]])[:, 0], torch.tensor([4]).expand(3)):
    student, teacher = torch.randn(2, 3, 12, generator=generator)
    order = teacher_order(teacher)
    found, _ = plackett_luce(student, teacher, shown, order, Weighting(), False)
    copied, _ = plackett_luce(student, teacher, shown.clone(), order, Weighting(), False)
    assert torch.equal(found, copied)  # labels need not be contiguous

for least in (-1e30, -3e38):  # a large logit is none that is missing
    student, teacher = torch.randn(2, 3, 12, generator=generator)
    student[1, 5] = least
    labels = torch.tensor([5, 5, 5])
    exact = student.double().requires_grad_()
    brute_force(exact, teacher.double(), labels, softmax(1)).sum().backward()
    given = student, teacher, labels, teacher_order(teacher)
    found, gradient = plackett_luce(*given, Weighting(), True)
    assert torch.allclose(gradient.double(), exact.grad, rtol=1e-5, atol=1e-6)
    assert found[1] > 1e28

# the losses use the kernel after it has been compared with the form in log space
likelihood.CHECKED = 40  # the interpreter is slow
kernel = likelihood.checked_kernel(torch.device("cpu"))
assert kernel is plackett_luce
student, teacher = 3 * torch.randn(2, 6, 12, generator=generator)
labels = torch.arange(6)

class OwnWeights(PLDLoss):
    def weigh(self, teacher, labels, ranking):
        return 2 * super().weigh(teacher, labels, ranking)

for loss in (PLDLoss(2.0), PLDLoss(top_k=3), PLDLoss(top_k="auto"), ListMLELoss(), OwnWeights()):
    for order in (None, teacher_order(teacher)):
        results = []
        for used in (False, True):
            likelihood._on_cuda = lambda student: used
            logits = student.clone().requires_grad_()
            value = loss(logits, teacher, labels, order=order)
            value.backward()
            results.append((value.detach(), logits.grad))
        torch.testing.assert_close(*results)
# on CUDA a schedule in float64, as that of such teacher logits, would not compile
class Launched:
    def __getitem__(self, grid):
        return lambda *given, **flags: launched.extend(given)

launched, triton_kernel._ranking = [], Launched()
schedule = ListMLELoss().weighting(teacher.double()).schedule
weighting = Weighting(schedule=schedule)
plackett_luce(student, teacher.double(), labels, teacher_order(teacher), weighting, True)
assert schedule.dtype == torch.float64 and launched[2].dtype == torch.float32
"""

DISAGREES = """
import torch
from pld_ray.losses import likelihood, triton_kernel

likelihood.CHECKED = 40
right = triton_kernel.plackett_luce
triton_kernel.plackett_luce = lambda *given: tuple(1.01 * each for each in right(*given))
assert likelihood.checked_kernel(torch.device("cpu")) is None
"""


def interpreted(script):
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=900
    )


def test_the_kernel_is_the_loss_and_its_gradient():
    done = interpreted(CHECK)
    assert done.returncode == 0, done.stderr


def test_a_kernel_that_disagrees_is_not_used():
    done = interpreted(DISAGREES)
    assert done.returncode == 0, done.stderr
    assert "the Triton kernel is not used on cpu: AssertionError: " in done.stderr
