"""The optimizer DOT against loops in float64, and in trials."""

import copy

import numpy as np
import pytest
import torch
from small import cells, run, weights
from test_gang import members, together
from torch import nn

from pld_ray import DOT, Distiller, fit
from pld_ray.config.parts import Optimizer
from pld_ray.distill import keeping
from pld_ray.distill.optimization import create_optimizer
from pld_ray.errors import InputError
from pld_ray.losses import KDLoss, create_loss
from pld_ray.store.store import Store

LR, MU, DECAY, DELTA = 0.1, 0.9, 0.01, 0.075


class Three(nn.Module):
    """Weights that both terms, cross-entropy alone or distillation alone reach."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        both, ce, kd = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        self.both, self.ce, self.kd = nn.Parameter(both), nn.Parameter(ce), nn.Parameter(kd)
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def terms(self, number):
        shift = 0.3 * number
        ce = (self.both - shift).square().sum() + (self.both * self.ce).sin().sum()
        kd = ((self.both + shift) ** 4).sum() / 10 + (self.kd + shift).square().sum()
        return ce, kd


def gradients(w, number):
    """The gradients of both terms by hand: name -> (cross-entropy, distillation)."""
    shift = 0.3 * number
    inner = np.cos(w["both"] * w["ce"])
    return {
        "both": (
            2 * (w["both"] - shift) + w["ce"] * inner,
            4 * (w["both"] + shift) ** 3 / 10,
        ),
        "ce": (w["both"] * inner, None),
        "kd": (None, 2 * (w["kd"] + shift)),
    }


def loop(w, steps, delta, largest=None):
    """The weights after some steps, number by number."""
    w = {name: value.copy() for name, value in w.items()}
    velocity = {}
    for number in range(steps):
        found = gradients(w, number)
        factor = 1.0
        if largest is not None:
            sums = [sum(g for g in pair if g is not None) for pair in found.values()]
            norm = np.sqrt(sum((each**2).sum() for each in sums))
            factor = min(1.0, largest / (norm + 1e-6))
        for name, (ce, kd) in found.items():
            for i in range(4):
                change = 0.0
                for term, gradient, sign in (("ce", ce, -1), ("kd", kd, 1)):
                    if gradient is None:
                        continue
                    momentum = MU + sign * delta if ce is not None and kd is not None else MU
                    g = factor * gradient[i]
                    if term == "ce" or ce is None:
                        g += DECAY * w[name][i]
                    velocity[name, term, i] = momentum * velocity.get((name, term, i), 0.0) + g
                    change += velocity[name, term, i]
                w[name][i] -= LR * change
    return w


@pytest.mark.parametrize("largest", [None, 0.5, 100.0])
@pytest.mark.parametrize("delta", [0.0, DELTA])
def test_steps_are_the_loops(delta, largest):
    model = Three()
    start = {n: p.detach().numpy().copy() for n, p in model.named_parameters() if n != "unused"}
    optimizer = DOT(model.parameters(), LR, MU, DECAY, delta)
    for number in range(6):
        optimizer.backward(*model.terms(number))
        if largest is not None:
            optimizer.clip_grad_norm(largest)
        optimizer.step()
    expected = loop(start, 6, delta, largest)
    for name, value in expected.items():
        found = getattr(model, name).detach().numpy()
        np.testing.assert_allclose(found, value, rtol=1e-12, err_msg=name)
    assert model.unused.tolist() == [1, 1] and model.unused not in optimizer.state
    assert set(optimizer.state[model.kd]) == {"kd"} and set(optimizer.state[model.ce]) == {"ce"}


@pytest.mark.parametrize("largest", [None, 0.5])
def test_without_delta_it_is_sgd(largest):
    model, other = Three(), Three()
    optimizer = DOT(model.parameters(), LR, MU, DECAY, 0.0)
    sgd = torch.optim.SGD(other.parameters(), LR, MU, weight_decay=DECAY)
    for number in range(6):
        optimizer.backward(*model.terms(number))
        sgd.zero_grad()
        sum(other.terms(number)).backward()
        if largest is not None:
            optimizer.clip_grad_norm(largest)
            nn.utils.clip_grad_norm_(other.parameters(), largest)
        optimizer.step()
        sgd.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_a_state_that_is_loaded_goes_on_with_the_same_bits():
    model = Three()
    optimizer = DOT(model.parameters(), LR)
    for number in range(6):
        if number == 3:
            second = copy.deepcopy(model)
            resumed = DOT(second.parameters(), LR)
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for net, each in ((model, optimizer), *([(second, resumed)] if number >= 3 else [])):
            each.backward(*net.terms(number))
            each.step()
    for one, two in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["kd", "fitnet"])
def test_a_loss_of_two_terms_in_plain_pytorch(name):
    """FitNet at stage 1 leaves the last layers to cross-entropy, and its regressor to itself."""
    from pld_ray.config.parts import Model
    from pld_ray.models.factory import create_model

    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    student, teacher = (create_model(Model(name="resnet8"), 4, 3, 8) for _ in range(2))
    options = {"stage": 1} if name == "fitnet" else {}
    distiller = Distiller(student, teacher, create_loss(name, **options))
    distiller.connect(images)
    settings = Optimizer(name="dot", lr=0.1, delta=0.05)
    optimizer = create_optimizer(settings, distiller)
    first = {n: p.detach().clone() for n, p in distiller.named_parameters() if p.requires_grad}
    distiller(images, labels)
    optimizer.backward(*distiller.take_terms())
    optimizer.step()
    kinds = {n: set(optimizer.state[p]) for n, p in distiller.named_parameters() if n in first}
    if name == "kd":
        assert set(map(frozenset, kinds.values())) == {frozenset({"ce", "kd"})}
    else:
        assert kinds["student.fc.weight"] == {"ce"}
        assert kinds["loss.regressor.0.weight"] == {"kd"}
        assert {"ce", "kd"} in kinds.values()
    with pytest.raises(InputError, match="the last loss has no two terms"):
        distiller.take_terms()
    copy.deepcopy(distiller.loss)


def test_fit_with_a_name_and_with_an_object():
    torch.manual_seed(0)
    student, teacher = nn.Linear(6, 4), nn.Linear(6, 4)
    batches = [(torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])) for _ in range(4)]
    found = []
    for kind in ("dot", "object", "loop"):
        distiller = Distiller(copy.deepcopy(student), teacher, create_loss("kd"))
        weights = distiller.student.parameters()
        if kind == "loop":
            distiller.keep_graphs()
            optimizer = DOT(weights, 0.1)
            for images, labels in batches:
                distiller(images, labels)
                optimizer.backward(*distiller.take_terms())
                optimizer.step()
        else:
            chosen = DOT(weights, 0.1) if kind == "object" else kind
            fit(distiller, batches, 1, optimizer=chosen, lr=0.1, schedule="constant")
            distiller(*batches[0])
            copy.deepcopy(distiller)  # later losses keep no graph, which cannot be copied
        found.append(distiller.student.weight.detach())
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
    sgd = Distiller(copy.deepcopy(student), teacher, create_loss("kd"))
    fit(sgd, batches, 1, optimizer="momentum", lr=0.1, schedule="constant")
    assert (sgd.student.weight - found[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda w: DOT(w, -1.0), "lr is -1.0: expected a number of at least 0"),
        (lambda w: DOT(w, "a"), "lr is 'a': expected a number of at least 0"),
        (lambda w: DOT(w, 0.1, momentum=None), "momentum is None: expected a number of at least 0"),
        (lambda w: DOT(w, 0.1, delta=0.1), "delta is 0.1: expected .* momentum is 0.9"),
        (lambda w: DOT(w, 0.1, momentum=0.05), "delta is 0.075: expected .* momentum is 0.05"),
        (lambda w: DOT(w, 0.1).step(), r"expected a call of optimizer.backward\(ce, kd\) before"),
    ],
)
def test_wrong_use_is_told(make, said):
    with pytest.raises((ValueError, RuntimeError), match=said):
        make([nn.Parameter(torch.ones(2))])


def test_a_scaler_of_gradients_is_refused():
    weight = nn.Parameter(torch.ones(2))
    optimizer = DOT([weight], 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    terms = weight.sum(), weight.square().sum()
    optimizer.backward(*map(scaler.scale, terms))
    with pytest.raises(RuntimeError, match="GradScaler is not supported"):
        scaler.step(optimizer)
    assert weight.tolist() == [1, 1]


@pytest.mark.parametrize("loss", ["pld", "ce"])
def test_losses_without_terms_are_refused(loss):
    distiller = Distiller(nn.Linear(2, 2), nn.Linear(2, 2), create_loss(loss))
    with pytest.raises(InputError, match=f"the loss {loss} has no two terms"):
        create_optimizer(Optimizer(name="dot"), distiller)


def test_a_loss_that_overrides_forward_is_refused():
    """What it adds to the loss would be in neither of the two terms."""

    class Decayed(KDLoss):
        def forward(self, student, teacher, labels, **options):
            return super().forward(student, teacher, labels, **options) + student.square().mean()

    distiller = Distiller(nn.Linear(2, 2), nn.Linear(2, 2), Decayed())
    with pytest.raises(InputError, match="the forward pass of Decayed is its own"):
        distiller.keep_graphs()
    assert not distiller.loss.keeps_graphs


# ---------------------------------------------------------------- trials

DOTTED = [
    "optimizer={name: dot, lr: 0.05, weight_decay: 0.0005}",
    "teacher.train={epochs: 1, optimizer: {name: sgd}}",
    "clip_grad=5",
]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss=pld"], "optimizer is 'dot' and loss pld has no ce_weight above 0"),
        (["loss={name: kd, ce_weight: 0}"], "loss kd has no ce_weight above 0"),
        (["loss={name: sdd, ce_weight: 0}"], "loss sdd has no ce_weight above 0"),
        (["teacher.train={epochs: 1}"], "loss ce has no ce_weight .* in teacher.train"),
        (["workers=2"], "optimizer is 'dot' and workers is 2: .* expected workers: 1"),
        (["optimizer.delta=0.2"], "delta is 0.2: expected momentum - delta"),
        (["optimizer.betas=[0.9]"], "dot has no betas"),
        (["optimizer={name: sgd, delta: 0.05}"], "delta is 0.05: only for dot, and name is 'sgd'"),
    ],
)
def test_refusals_of_a_plan(experiment, overrides, said):
    with pytest.raises(InputError, match=said):
        cells(experiment, "loss=kd", *DOTTED, *overrides)


def test_a_weight_that_the_loss_chooses_is_one(experiment):
    """SDD has the weights of its base; with kd, that of the cross-entropy is 0.1."""
    (trial,) = cells(experiment, "grid.loss=[sdd]", "epochs=1", *DOTTED)
    store = Store(experiment.folder / "store")
    run(trial, store)
    (epoch,) = store.epochs(trial.id)
    assert 0.1 * 1.5 < epoch["loss_ce"] < 0.1 * 4  # about 0.1 log 10
    assert epoch["loss_ce"] + epoch["loss_kd"] == pytest.approx(epoch["train_loss"])


def test_a_trial_resumes_and_a_gang_has_the_same_bits(experiment, monkeypatch):
    trials, alone, gang = members(experiment, 1, 3, 4)
    settings = Optimizer(name="dot", lr=0.05, weight_decay=5e-4)
    trials = [trial.model_copy(update={"optimizer": settings}) for trial in trials]
    assert together(trials, gang) == {trial.id: None for trial in trials}
    monkeypatch.setattr(keeping, "CHECKPOINT_SECONDS", 0.0)
    log = alone.log
    for trial in trials:

        def killed(of, history, trial=trial):
            log(of, history)
            if len(history) == 3 and of.id == trial.id:
                raise KeyboardInterrupt

        monkeypatch.setattr(alone, "log", killed)
        with pytest.raises(KeyboardInterrupt):
            run(trial, alone)
        monkeypatch.setattr(alone, "log", log)
        run(trial, alone)
        assert weights(alone, trial) == weights(gang, trial), trial.label


def test_the_identity_of_a_trial(experiment, tmp_path):
    plain = cells(experiment, "loss=kd", *DOTTED)[0]
    same = cells(experiment, "loss=kd", *DOTTED, "optimizer.delta=0.075")[0]
    other = cells(experiment, "loss=kd", *DOTTED, "optimizer.delta=0.09")[0]
    assert plain.id == same.id != other.id and plain.teacher.optimizer.name == "sgd"
    assert run(other, Store(tmp_path / "results"))["metrics"]["loss_ce"] > 0
