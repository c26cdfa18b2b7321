"""The Triton kernel of PLD, in Triton's interpreter on the CPU, against float64."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CHECK = """
import torch
from pld_ray.losses import PLDLoss, likelihood, teacher_order
from pld_ray.losses import triton_kernel
from pld_ray.losses.triton_kernel import pld

triton_kernel.WARPS = 2  # two programs at most, each of which computes several rows

def brute_force(student, teacher, labels, temperature):
    # the loss of each row by its definition, differentiable, in float64
    total = []
    for s, t, y in zip(student, teacher, labels, strict=True):
        order = t.argsort(descending=True, stable=True)
        ranked = torch.cat([y[None], order[order != y]])
        weights = (t / temperature).softmax(0)[ranked]
        s = s[ranked]
        total.append(sum(w * (s[k:].logsumexp(0) - s[k]) for k, w in enumerate(weights)))
    return torch.stack(total)

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
    exact = student.double().requires_grad_()
    expected = brute_force(exact, teacher.double(), labels, temperature)
    expected.sum().backward()
    for order in (teacher_order(teacher), teacher_order(teacher, labels), teacher.argsort(1, True)):
        if order.dtype == torch.int64:
            order = teacher.argsort(dim=1, descending=True, stable=True)
        found, gradient = pld(student, teacher, labels, order, float(temperature), True, block)
        assert torch.allclose(found.double(), expected.detach(), rtol=1e-5, atol=1e-6), classes
        error = (gradient - exact.grad).abs().sum(1)
        assert (error <= 1e-5 * exact.grad.abs().sum(1) + 1e-7).all(), (classes, error)
        alone, _ = pld(student, teacher, labels, order, float(temperature), False, block)
        assert torch.equal(alone, found)

for place in (0, 7, 11):  # logits that are not finite are not passed over
    for wrong in (torch.nan, torch.inf):
        student, teacher = torch.randn(2, 2, 12, generator=generator)
        student[1, place] = wrong
        for given in ((student, teacher), (teacher, student)):
            order = teacher_order(teacher)
            found, gradient = pld(*given, torch.tensor([3, 3]), order, 1.0, True)
            assert found.isfinite().tolist() == [True, False]
            assert gradient.isfinite().all(1).tolist() == [True, False]

for least in (-1e30, -3e38):  # a large logit is none that is missing
    student, teacher = torch.randn(2, 3, 12, generator=generator)
    student[1, 5] = least
    labels = torch.tensor([5, 5, 5])
    exact = student.double().requires_grad_()
    brute_force(exact, teacher.double(), labels, 1.0).sum().backward()
    found, gradient = pld(student, teacher, labels, teacher_order(teacher), 1.0, True)
    assert torch.allclose(gradient.double(), exact.grad, rtol=1e-5, atol=1e-6)
    assert found[1] > 1e28

# the loss uses the kernel after it has compared it with the form in log space
kernel = likelihood.checked_kernel(torch.device("cpu"))
assert kernel is pld
student, teacher = 3 * torch.randn(2, 6, 12, generator=generator)
labels = torch.arange(6)
results = []
for used in (None, kernel):
    likelihood._kernel = lambda student: used
    logits = student.clone().requires_grad_()
    loss = PLDLoss(temperature=2.0)(logits, teacher, labels, order=teacher_order(teacher))
    loss.backward()
    results.append((loss.detach(), logits.grad))
    assert used is None or PLDLoss(top_k=3)(logits, teacher, labels).isfinite()
torch.testing.assert_close(*results)
"""

DISAGREES = """
import torch
from pld_ray.losses import likelihood, triton_kernel

pld = triton_kernel.pld
triton_kernel.pld = lambda *given: tuple(1.01 * each for each in pld(*given))
assert likelihood.checked_kernel(torch.device("cpu")) is None
"""


def interpreted(script):
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )


def test_the_kernel_is_pld_and_its_gradient():
    done = interpreted(CHECK)
    assert done.returncode == 0, done.stderr


def test_a_kernel_that_disagrees_is_not_used():
    done = interpreted(DISAGREES)
    assert done.returncode == 0, done.stderr
    assert "the Triton kernel is not used on cpu: AssertionError: " in done.stderr
