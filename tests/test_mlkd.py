"""MLKD: its formula on three levels, and what the released code computes instead."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pld_ray.losses import MLKDLoss, create_loss

TAUS = (4.0, 3.0, 5.0, 2.0, 6.0)


def pairs(images=5, classes=6, seed=0):
    rng = np.random.default_rng(seed)
    student, teacher = 2 * rng.standard_normal((2, 2 * images, classes))
    return student, teacher, np.tile(rng.integers(0, classes, images), 2)


def apply(loss, *arrays):
    return loss(*(torch.tensor(x) for x in arrays)).item()


@pytest.mark.parametrize("variant", ["paper", "masked", "released"])
@given(st.integers(1, 7), st.integers(2, 7), st.integers(0, 10**6), st.booleans())
@example(2, 2, 52, True)  # logits that differ by 0.02
@settings(max_examples=15, deadline=None)
def test_the_loss_is_the_loops(variant, images, classes, seed, standardized):
    mode = "both" if standardized else "none"
    for taus in (TAUS, (2.0, 1.0, 7.0)):
        loss = MLKDLoss(taus, 0.3, 0.7, variant=variant, standardize=mode)
        args = pairs(images, classes, seed)
        expected = reference.mlkd(*args, taus, 0.3, 0.7, variant, mode)
        assert apply(loss, *args) == pytest.approx(expected, rel=1e-9)


def test_the_defaults_are_those_of_the_paper():
    expected = reference.mlkd(*pairs(), TAUS, 0.1, 0.9, "paper")
    assert apply(create_loss("mlkd"), *pairs()) == pytest.approx(expected, rel=1e-10)
    assert MLKDLoss().strong == ("randaugment", "cutout")


def test_one_temperature_and_two_classes_by_hand():
    # teacher p = (3/4, 1/4), student q = (1/2, 1/2), for the first view of the only image
    ln3 = np.log(3)
    args = np.zeros((2, 2)), np.array([[ln3, 0.0], [0.0, 0.0]]), np.array([0, 0])
    kl = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    batch = (10 / 16 - 1 / 2) ** 2
    classes = ((9 / 16 - 1 / 4) ** 2 + 2 * (3 / 16 - 1 / 4) ** 2 + (1 / 16 - 1 / 4) ** 2) / 2
    for weights, terms in (((0, 0), kl), ((1, 0), kl + batch), ((0, 2), kl + 2 * classes)):
        loss = MLKDLoss((1.0,), 0.0, 1.0, *map(float, weights))
        assert apply(loss, *args) == pytest.approx(terms, rel=1e-12)
    # the second class has the smaller sum, and its column is (3/16, 1/16)
    loss = MLKDLoss((1.0,), 0.0, 1.0, 0.0, 1.0, variant="masked")
    column = ((3 / 16 - 1 / 4) ** 2 + (1 / 16 - 1 / 4) ** 2) / 2
    assert apply(loss, *args) == pytest.approx(kl + column, rel=1e-12)
    loss = MLKDLoss((1.0,), 0.0, 1.0, 0.0, 1.0, variant="released")
    # the share of images is 1, of classes 1/2; the only temperature is one of the last two
    assert apply(loss, *args) == pytest.approx(2 * kl + classes / 2, rel=1e-12)


@pytest.mark.parametrize("variant", ["paper", "masked", "released"])
def test_gradients(variant):
    student, teacher, labels = (torch.tensor(x) for x in pairs(3, 4))
    loss = MLKDLoss(variant=variant)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, labels), student)


@pytest.mark.parametrize("variant", ["paper", "masked", "released"])
def test_ignored_images_are_left_out(variant):
    student, teacher, labels = (torch.tensor(x) for x in pairs(6))
    kept = torch.arange(12) % 6 != 2
    loss, ignored = MLKDLoss(variant=variant), labels.where(kept, -100)
    x = student.clone().requires_grad_()
    value = loss(x, teacher, ignored)
    value.backward()
    expected = loss(student[kept], teacher[kept], labels[kept])
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert x.grad[~kept].abs().max() == 0 < x.grad[kept].abs().max()
    assert loss(student, teacher, torch.full_like(labels, -100)).item() == 0


def test_many_classes_take_little_memory():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 8, 50_000, generator=generator)  # [C, C] would be 10 GB
    labels = torch.arange(4).repeat(2)
    for variant in ("paper", "masked"):
        loss = MLKDLoss(variant=variant)
        exact = loss(student.double(), teacher.double(), labels).item()
        assert loss(student, teacher, labels).item() == pytest.approx(exact, rel=1e-5)


def test_equal_predictions_are_compared_without_a_difference_of_large_numbers():
    generator = torch.Generator().manual_seed(0)
    teacher = 5 * torch.randn(4, 30, generator=generator)
    student = teacher + 1e-4 * torch.randn(4, 30, generator=generator)
    p, q = ((x.double()).softmax(1) for x in (teacher, student))
    expected = (p @ p.T - q @ q.T).square().sum() / 4 + (p.T @ p - q.T @ q).square().sum() / 30
    ones = torch.ones(4), torch.ones(30)
    found = MLKDLoss()._relations(p.float(), q.float(), *ones, None)
    assert found.item() == pytest.approx(expected.item(), rel=1e-2)


def test_rows_that_are_no_pairs_are_refused():
    loss, s = MLKDLoss(), torch.zeros(4, 3)
    with pytest.raises(ValueError, match="labels: expected those of B images twice.* got 3 labels"):
        loss(s[:3], s[:3], torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match="got 4 labels whose halves differ"):
        loss(s, s, torch.tensor([0, 0, 1, 1]))
    with pytest.raises(ValueError, match="mlkd: temperatures is "):
        MLKDLoss(temperatures=())
    with pytest.raises(ValueError, match=r"mlkd: strong.0 is 'own'"):
        MLKDLoss(strong=("own",))
