"""CTKD: the loss, the sign and size of the temperature's gradient, and trials."""

import itertools
import math

import numpy as np
import pytest
import reference
import torch
from small import cells, live, run, weights
from test_gang import members, together
from test_steps import trained

from pld_ray import CTKDLoss, Distiller, KDLoss, fit
from pld_ray.config.parts import Optimizer
from pld_ray.data.datasets import load
from pld_ray.distill import steps
from pld_ray.distill.loop import train
from pld_ray.distill.optimization import create_optimizer
from pld_ray.store.store import Store


def batch(rows=7, classes=6, seed=0):
    rng = np.random.default_rng(seed)
    student, teacher = 2 * rng.standard_normal((2, rows, classes))
    return student, teacher, rng.integers(0, classes, rows)


def loop(student, teacher, labels, a, ce_weight, beta, lowest, span):
    """The mean loss, number by number."""
    tau = lowest + span / (1 + math.exp(-a))
    total = 0.0
    for s, t, y in zip(student, teacher, labels, strict=True):
        p, log_q = reference.softmax(t / tau), reference.log_softmax(s / tau)
        divergence = sum(p[c] * (math.log(p[c]) - log_q[c]) for c in range(len(s)))
        total += beta * tau**2 * divergence - ce_weight * reference.log_softmax(s)[y]
    return total / len(student)


@pytest.mark.parametrize("a", [-2.0, 1.0, 3.0])
@pytest.mark.parametrize("weights", [(0.1, 0.9), (1.0, 1.0), (0.0, 2.0)])
def test_it_is_the_loop(a, weights):
    args = batch()
    loss = CTKDLoss(*weights, lowest=0.5, span=8.0).double()
    loss.a.data.fill_(a)
    found = loss(*map(torch.tensor, args))
    assert found.item() == pytest.approx(loop(*args, a, *weights, 0.5, 8.0), rel=1e-12)


def test_at_its_temperature_it_is_kd():
    student, teacher, labels = map(torch.tensor, batch())
    loss, x = CTKDLoss().double(), student.requires_grad_()
    tau = loss.temperature().item()
    assert tau == pytest.approx(1 + 20 / (1 + math.exp(-1)))
    (ours,) = torch.autograd.grad(loss(x, teacher, labels), x)
    (kd,) = torch.autograd.grad(KDLoss(tau, ce_weight=0.1)(x, teacher, labels), x)
    torch.testing.assert_close(ours, kd, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("epoch", "factor"),
    [
        (0, (math.cos(math.pi / 10) - 1) / 2),  # the first epoch is number 1
        (4, -0.5),
        (7, (math.cos(0.8 * math.pi) - 1) / 2),
        (9, -1.0),
        (200, -1.0),
    ],
)
def test_the_gradient_of_the_temperature_is_reversed(epoch, factor):
    args = batch()
    loss = CTKDLoss(0.3, 0.7, 0.5, 2.0).double()
    loss.set_epoch(epoch)
    loss(*map(torch.tensor, args)).backward()
    step = 1e-5
    up, down = (loop(*args, 1 + d, 0.3, 0.7, 0.5, 2.0) for d in (step, -step))
    slope = (up - down) / (2 * step)
    assert abs(slope) > 0.01
    assert loss.a.grad.item() == pytest.approx(factor * slope, rel=1e-6)


def test_descent_of_the_student_is_ascent_of_the_temperature():
    """With the student fixed, steps of SGD change a so that the loss grows."""
    args = batch()
    tensors = [torch.tensor(x) for x in args]
    loss = CTKDLoss(0.0, 1.0).double()
    loss.set_epoch(9)
    optimizer = torch.optim.SGD(loss.parameters(), 0.05)
    values = []
    for _ in range(5):
        optimizer.zero_grad()
        value = loss(*tensors)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert all(later > earlier for earlier, later in itertools.pairwise(values))


def test_steps_with_weight_decay_are_the_loop():
    """A student of one matrix and the scalar a, with SGD as trials use it."""
    rng = np.random.default_rng(1)
    images = rng.standard_normal((3, 8, 5))
    teacher = rng.standard_normal((3, 8, 4))
    labels = rng.integers(0, 4, (3, 8))
    student = torch.nn.Linear(5, 4, bias=False).double()
    distiller = Distiller(student, None, CTKDLoss(curriculum_epochs=2).double())
    settings = Optimizer(name="momentum", lr=0.1, momentum=0.9, weight_decay=0.01)
    optimizer = create_optimizer(settings, distiller)
    w, a, speed_w, speed_a = student.weight.detach().numpy().copy(), 1.0, 0.0, 0.0
    for epoch in range(3):
        distiller.loss.set_epoch(epoch)
        optimizer.zero_grad()
        x, t, y = images[epoch], teacher[epoch], labels[epoch]
        logits = student(torch.tensor(x))
        distiller.loss(logits, torch.tensor(t), torch.tensor(y)).backward()
        optimizer.step()
        given = t, y, a, 0.1, 0.9, 1.0, 20.0
        gradient = np.zeros_like(w)
        for index in np.ndindex(*w.shape):
            moved = [w.copy(), w.copy()]
            moved[0][index] += 1e-6
            moved[1][index] -= 1e-6
            up, down = (loop(x @ each.T, *given) for each in moved)
            gradient[index] = (up - down) / 2e-6
        up, down = (loop(x @ w.T, t, y, a + d, 0.1, 0.9, 1.0, 20.0) for d in (1e-5, -1e-5))
        factor = (math.cos(math.pi * min(epoch + 1, 2) / 2) - 1) / 2
        speed_w = 0.9 * speed_w + gradient + 0.01 * w
        speed_a = 0.9 * speed_a + factor * (up - down) / 2e-5 + 0.01 * a
        # timm's "momentum" has no Nesterov step
        w, a = w - 0.1 * speed_w, a - 0.1 * speed_a
    np.testing.assert_allclose(student.weight.detach().numpy(), w, atol=1e-6)
    assert distiller.loss.a.item() == pytest.approx(a, abs=1e-6)


def test_the_optimizer_dot_gives_the_temperature_plain_momentum():
    distiller = Distiller(torch.nn.Linear(5, 4), None, CTKDLoss())
    optimizer = create_optimizer(Optimizer(name="dot", lr=0.1), distiller)
    distiller(torch.randn(3, 5), torch.tensor([0, 1, 2]), teacher_logits=torch.randn(3, 4))
    optimizer.backward(*distiller.take_terms())
    optimizer.step()
    assert set(optimizer.state[distiller.loss.a]) == {"kd"}


def test_fit_reports_the_temperature():
    torch.manual_seed(0)
    distiller = Distiller(torch.nn.Linear(5, 4), torch.nn.Linear(5, 4), CTKDLoss())
    batches = [(torch.randn(6, 5), torch.arange(6) % 4) for _ in range(3)]
    history = fit(distiller, batches, 2, optimizer="momentum", lr=0.5, progress=False)
    assert history["temperature"][1] == pytest.approx(distiller.loss.temperature().item())
    assert history["temperature"][0] != history["temperature"][1] != 1 + 20 / (1 + math.exp(-1))


# ---------------------------------------------------------------- trials

SGD = ["loss=ctkd", "optimizer={name: sgd, lr: 0.05, weight_decay: 0.0005}"]


def test_the_temperature_is_trained_kept_on_resume_and_not_saved(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr("pld_ray.distill.keeping.CHECKPOINT_SECONDS", 0)
    trial = cells(experiment, *SGD)[0]
    whole, broken = Store(tmp_path / "whole"), Store(tmp_path / "broken")
    record = run(trial, whole)
    run(trial.teacher, broken)

    def stop(metrics):
        kept = broken.load_checkpoint(trial)["loss"]
        assert list(kept) == ["a"] and kept["a"] != 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(trial, load(trial.data), broken, stop)
    again = run(trial, broken)
    assert weights(whole, trial) == weights(broken, trial)
    assert not any("loss" in name or name == "a" for name in whole.load_weights(trial))
    taus = [epoch["temperature"] for epoch in whole.epochs(trial.id)]
    assert taus == [epoch["temperature"] for epoch in broken.epochs(trial.id)]
    assert len({*taus, 1 + 20 / (1 + math.exp(-1))}) == 4
    assert record["metrics"]["temperature"] == again["metrics"]["temperature"] == taus[-1]


def test_stored_logits_and_a_live_teacher_teach_the_same(experiment, tmp_path):
    trial = cells(experiment, *SGD)[0]
    found = [run(each, Store(tmp_path / "one"))["metrics"] for each in (trial, live(trial))]
    for name in ("train_loss", "temperature"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4)


def test_replays_of_a_graph_have_the_bits_of_steps(monkeypatch, tmp_path, experiment):
    trial = cells(experiment, *SGD)[0]
    ours, record, counts = trained(monkeypatch, tmp_path, trial)
    expected, other, _ = trained(monkeypatch, tmp_path, trial, warm=10**9)
    assert ours == expected and steps.WARM_UP == 10**9
    assert record["metrics"]["temperature"] == other["metrics"]["temperature"]
    assert counts["captured"] == 3  # the factor of the gradient changes with the epoch


def test_a_member_of_a_gang_has_the_temperature_of_a_trial_alone(experiment):
    trials, alone, gang = members(experiment, 0, 1)
    from pld_ray.losses import REGISTRY

    trials[1] = trials[1].model_copy(update={"loss": REGISTRY["ctkd"](name="ctkd")})
    assert together(trials, gang) == {trial.id: None for trial in trials}
    run(trials[1], alone)
    assert weights(alone, trials[1]) == weights(gang, trials[1])
    found = [[e["temperature"] for e in s.epochs(trials[1].id)] for s in (alone, gang)]
    assert found[0] == found[1]
