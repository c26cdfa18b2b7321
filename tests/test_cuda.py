"""What only a GPU can show. `make test-gpu` runs it; without a GPU all of it is skipped."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pld_ray.data import stream
from pld_ray.data.sampling import batches, order
from pld_ray.losses import ListMLELoss, PLDLoss, create_loss, likelihood, teacher_order
from pld_ray.losses.registry import REGISTRY

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GPU = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
LOGITS = [name for name, loss in REGISTRY.items() if not loss.needs_features]


@pytest.mark.parametrize("classes", [10, 1000, 5000])
@pytest.mark.parametrize("name", LOGITS)
def test_a_loss_has_the_value_and_the_gradient_of_float64_on_the_cpu(name, classes):
    generator = torch.Generator().manual_seed(classes)
    student, teacher = 4 * torch.randn(2, 16, classes, generator=generator)
    labels = torch.randint(classes, (8,), generator=generator).repeat(2)  # two views of 8 images
    found = []
    for device, dtype in ((CPU, torch.float64), (CUDA, torch.float32)):
        logits = student.to(device, dtype).requires_grad_()
        given = logits, teacher.to(device, dtype), labels.to(device)
        loss = create_loss(name, ignore_index=None).to(device)(*given)  # CTKD learns a scalar
        loss.backward()
        found.append((loss.detach().cpu().double(), logits.grad.cpu().double()))
    (expected, gradient), (ours, our_gradient) = found
    assert abs(ours - expected) <= 1e-5 * abs(expected) + 1e-6
    assert (our_gradient - gradient).abs().sum() <= 1e-4 * gradient.abs().sum()


RULES = {
    "pld": lambda classes: PLDLoss(2.0),
    "top-k": lambda classes: PLDLoss(2.0, top_k=max(1, classes // 3)),
    "auto": lambda classes: PLDLoss(2.0, top_k="auto"),
    "listmle": lambda classes: ListMLELoss(),
}


@pytest.mark.parametrize("classes", [3, 127, 128, 1000, 4095, 4096, 9000, 40_000])
@pytest.mark.parametrize("scale", [3, 1e4])
@pytest.mark.parametrize("rule", RULES)
def test_the_kernel_agrees_with_float64(classes, scale, rule):
    kernel = likelihood.checked_kernel(CUDA)
    assert kernel is not None
    rows = 300 if classes <= 1000 else 8  # more rows than programs
    generator = torch.Generator().manual_seed(classes)
    student, teacher = torch.randn(2, rows, classes, generator=generator)
    student = scale * student
    if classes > 8:
        teacher[0, 2:7] = teacher[0, 1]
        teacher[1, 3:6] = -torch.inf
    labels = torch.randint(classes, (rows,), generator=generator)
    loss, order = RULES[rule](classes), teacher_order(teacher)
    ranking, weights = likelihood._ranked(loss, teacher.double(), labels, order)
    expected, gradient = likelihood._in_log_space(student.double(), ranking, weights, True)
    chosen = loss.chosen(teacher.to(CUDA), order.to(CUDA))
    weighting = loss.weighting(teacher.to(CUDA))
    for ranked in (ranking.index, chosen):
        given = (x.to(CUDA) for x in (student, teacher, labels, ranked))
        ours, our_gradient = kernel(*given, weighting, True)
        torch.testing.assert_close(ours.cpu().double(), expected, rtol=1e-5, atol=1e-6)
        error = (our_gradient.cpu().double() - gradient).abs().sum(1)
        assert (error <= 1e-5 * gradient.abs().sum(1) + 1e-7).all()


@pytest.mark.parametrize("pad", [0, 2])
def test_images_on_the_gpu_are_those_of_the_cpu(pad):
    benchmark = runpy.run_path(str(GPU))
    images = benchmark["random_images"](64, 32, 10)
    data = benchmark["Data"](name="digits", pad=pad, flip=True)
    shares = list(batches(order(0, 1, 64), 24, False))
    ours, expected = (
        list(stream.Stream(images, data, 0, device).train(shares, 1)) for device in (CUDA, CPU)
    )
    for (x, y), (there, labels) in zip(ours, expected, strict=True):
        torch.testing.assert_close(x.cpu(), there, rtol=0, atol=1e-6)
        assert torch.equal(y.cpu(), labels)


def test_trials_that_are_resumed_or_captured_have_the_bits_of_others():
    benchmark = runpy.run_path(str(GPU))
    rows = list(benchmark["measure_resume"](CUDA, False))
    for row in rows:
        assert row["captured"] and row["deterministic"], row
        assert row["same bits after resume"] and row["same bits one by one"], row


def test_two_processes_on_one_gpu_train_a_trial_and_resume_it(tmp_path):
    command = [sys.executable, GPU, "--quick", "--parts", "workers", "--out", tmp_path]
    subprocess.run(command, check=True)
    (row,) = json.loads((tmp_path / "gpu.json").read_text())["workers"]
    assert row["same bits after resume"]
