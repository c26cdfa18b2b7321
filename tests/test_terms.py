"""The two terms of a loss, against hand-computed means."""

import copy

import numpy as np
import pytest
import reference
import torch
from small import cells, live, run, weights
from test_gang import members, together
from test_steps import trained

from analysis.figures import methods, style
from analysis.records import frames
from pld_ray import Distiller, fit
from pld_ray.config.planning import plan
from pld_ray.data.mixing import MixedLabels
from pld_ray.losses import REGISTRY, Features, create_loss
from pld_ray.losses.feature_loss import TeacherLayers
from pld_ray.store.store import Store

TERMED = [name for name, params in REGISTRY.items() if "ce_weight" in params.model_fields]


def batch(rows=8, classes=6):
    """Logits and labels; the labels are those of two views of each image."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(classes, (rows // 2,), generator=generator).repeat(2)


def features():
    generator = torch.Generator().manual_seed(1)
    sizes = (8, 4, 8, 8), (8, 6, 4, 4), (8, 8, 2, 2)
    stages = [torch.randn(size, generator=generator) for size in sizes]
    further = {"preact": stages, "last": stages[-1:]}
    for m in (1, 2, 4):
        further[f"cells{m}"] = [torch.randn(8, m * m, 6, generator=generator)]
    return Features(stages, stages[-1].mean((2, 3)), further)


def value(loss, student, teacher, labels, **further):
    if REGISTRY[loss.name].needs_features:
        one, other = features(), features()
        norms = [torch.nn.BatchNorm2d(stage.shape[1]) for stage in other.stages]
        last = torch.nn.Linear(other.pooled.shape[1], student.shape[1])
        loss.borrow(TeacherLayers("teacher", last, norms))
        loss.connect(one, other)
        if loss.takes_samples:
            loss.connect_samples(torch.arange(20) % student.shape[1])
            further["index"] = torch.arange(len(labels))
        return loss(student, labels, one, other, **further)
    return loss(student, teacher, labels, **further)


@pytest.mark.parametrize("ce_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", TERMED)
def test_the_term_is_the_weighted_cross_entropy(name, ce_weight):
    student, teacher, labels = batch()
    torch.manual_seed(0)
    loss = create_loss(name, ce_weight=ce_weight)
    value(loss, student.requires_grad_(), teacher, labels)
    expected = ce_weight * reference.cross_entropy(student.detach().numpy(), labels.numpy())
    expected *= 1 + REGISTRY[name].paired  # MLKD adds the means over both views
    assert loss.ce_term.item() == pytest.approx(expected, rel=1e-6)
    assert not loss.ce_term.requires_grad and loss.kd_term is None
    copy.deepcopy(loss)


@pytest.mark.parametrize("name", TERMED)
def test_both_terms_have_the_gradients_of_the_loss(name):
    student, teacher, labels = batch()
    x = student.requires_grad_()
    torch.manual_seed(0)
    loss = create_loss(name, ce_weight=0.7)
    loss.keeps_graphs = True
    total = value(loss, x, teacher, labels)
    torch.testing.assert_close(loss.ce_term + loss.kd_term, total)
    one_hot = torch.nn.functional.one_hot(labels, x.shape[1])
    expected = 0.7 * (x.detach().softmax(1) - one_hot) / len(x) * (1 + REGISTRY[name].paired)
    (ce,) = torch.autograd.grad(loss.ce_term, x, retain_graph=True)
    (whole,) = torch.autograd.grad(total, x, retain_graph=True)
    torch.testing.assert_close(ce, expected, rtol=1e-5, atol=1e-8)
    if REGISTRY[name].needs_features:  # only SRRL's distance sees the logits
        kd = loss.kd_term  # FitNet and VID learn parts of their own
        reached = kd.requires_grad and torch.autograd.grad(kd, x, allow_unused=True)[0] is not None
        assert reached == (name == "srrl")
    else:
        (kd,) = torch.autograd.grad(loss.kd_term, x)
        torch.testing.assert_close(kd, whole - expected, rtol=1e-5, atol=1e-8)


def test_ignored_labels_weights_and_sums():
    student, teacher, labels = batch()
    weight = torch.arange(8.0, dtype=torch.float64)
    labels[3] = -100
    rows = [i for i in range(8) if i != 3]
    ce = [reference.cross_entropy(student[[i]].numpy(), labels[[i]].numpy()) for i in rows]
    w = weight[rows].numpy()
    for name in ("kd", "dkd", "nkd", "dist", "ttm", "wttm"):
        loss = create_loss(name, ce_weight=0.5)
        loss(student, teacher, labels)
        assert loss.ce_term.item() == pytest.approx(0.5 * np.mean(ce), rel=1e-9)
        loss(student, teacher, labels, sample_weight=weight)
        assert loss.ce_term.item() == pytest.approx(0.5 * (w @ ce) / w.sum(), rel=1e-9)
        loss.reduction = "sum"
        loss(student, teacher, labels)
        assert loss.ce_term.item() == pytest.approx(0.5 * np.sum(ce), rel=1e-9)


def test_transformed_losses_keep_no_tensor():
    student, teacher, labels = batch()
    loss = create_loss("kd")
    loss(student, teacher, labels)
    torch.func.grad(lambda s: loss(s, teacher, labels))(student)
    assert loss.ce_term is None


def test_mixed_labels_are_two_weighted_ones():
    student, teacher, labels = batch()
    logits = student.float()
    mixed = MixedLabels(labels, labels.flip(0), torch.linspace(0, 1, 8))
    network = torch.nn.Identity()
    network.register_parameter("w", torch.nn.Parameter(torch.ones(1)))
    distiller = Distiller(network, None, create_loss("kd", ce_weight=0.4))
    total = distiller(logits, mixed, teacher_logits=teacher.float())
    rows = -logits.double().log_softmax(1)
    expected = sum(
        (share * row[one] + (1 - share) * row[other]).item()
        for row, one, other, share in zip(rows, *mixed, strict=True)
    )
    told = distiller.with_terms(total)
    assert told.shape == (2,) and told[0] == total
    assert told[1].item() == pytest.approx(0.4 * expected / 8, rel=1e-5)


def test_losses_without_terms_report_one_number():
    student, teacher, labels = batch()
    for loss in (create_loss("pld"), create_loss("ce"), lambda s, t, y: (s - t).square().mean()):
        distiller = Distiller(torch.nn.Linear(6, 6).double(), None, loss)
        total = distiller(student, labels, teacher_logits=teacher)
        assert distiller.with_terms(total).shape == ()


def test_fit_reports_means_over_the_epoch():
    student, labels = batch()[0].float(), batch()[2]
    frozen = torch.nn.Linear(6, 6)
    batches = [(student[:4], labels[:4]), (student[4:], labels[4:])]
    distiller = Distiller(torch.nn.Linear(6, 6), frozen, create_loss("kd", ce_weight=0.4))
    first = copy.deepcopy(distiller.student)
    step = torch.optim.SGD(distiller.student.parameters(), 1e-30)
    history = fit(distiller, batches, 1, optimizer=step, schedule="constant", progress=False)
    ce = reference.cross_entropy(first(student).detach().double().numpy(), labels.numpy())
    assert history["loss_ce"][0] == pytest.approx(0.4 * ce, rel=1e-5)
    whole = history["loss_ce"] + history["loss_kd"]
    np.testing.assert_allclose(whole, history["train_loss"], rtol=1e-12)


# ---------------------------------------------------------------- trials


def test_epochs_of_a_trial_have_the_means_of_its_steps(experiment, tmp_path, monkeypatch):
    trial = live(cells(experiment, "loss=kd", "data.mixup=0.4")[0])
    seen = []
    forward = Distiller.forward

    def recorded(self, images, labels, *further):
        loss = forward(self, images, labels, *further)
        if self.loss.name == "kd":
            logits = self.loss_logits.double().log_softmax(1)
            rows = torch.arange(len(logits))
            first, second = logits[rows, labels.labels], logits[rows, labels.others]
            ce = -(labels.share * first + (1 - labels.share) * second)
            seen.append((0.1 * ce.mean().item(), len(logits)))
        return loss

    def looked(self, module, inputs, outputs):
        self.loss_logits = outputs.detach()

    init = Distiller.__init__

    def made(self, student, *args, **kwargs):
        init(self, student, *args, **kwargs)
        student.register_forward_hook(lambda *given: looked(self, *given))

    monkeypatch.setattr(Distiller, "__init__", made)
    monkeypatch.setattr(Distiller, "forward", recorded)
    store = Store(tmp_path / "results")
    record = run(trial, store)
    epochs = store.epochs(trial.id)
    assert len(seen) == 3 * 5
    for number, epoch in enumerate(epochs):
        part = seen[5 * number : 5 * number + 5]
        expected = sum(value * size for value, size in part) / sum(size for _, size in part)
        assert epoch["loss_ce"] == pytest.approx(expected, rel=1e-5)
        assert epoch["loss_ce"] + epoch["loss_kd"] == pytest.approx(epoch["train_loss"])
    assert record["metrics"]["loss_kd"] == epochs[-1]["loss_kd"]
    other = store.epochs(trial.teacher.id)  # plain cross-entropy
    assert "loss_ce" not in other[-1]


def test_replays_of_a_graph_give_the_terms(monkeypatch, tmp_path, experiment):
    trial = cells(experiment, "loss=dkd")[0]
    _, record, counts = trained(monkeypatch, tmp_path, trial)
    _, other, _ = trained(monkeypatch, tmp_path, trial, warm=10**9)
    assert counts["replayed"] == 9
    for name in ("train_loss", "loss_ce", "loss_kd"):
        assert record["metrics"][name] == other["metrics"][name] > 0


def test_members_of_a_gang_have_the_terms_of_trials_alone(experiment):
    trials, alone, gang = members(experiment, 0, 1, 4)
    together(trials, gang)
    for trial in trials:
        run(trial, alone)
        assert weights(gang, trial) == weights(alone, trial)
        found = [[e.get("loss_ce") for e in s.epochs(trial.id)] for s in (alone, gang)]
        assert found[0] == found[1] and (None in found[0]) is (trial.loss.name == "pld")


def test_figures_of_the_terms(experiment, tmp_path):
    made, store = plan(experiment(TEXT)), Store(tmp_path / "results")
    for cell in made.cells:
        history = [{"epoch": e, "top1": 50.0 + e, "train_loss": 1 / e} for e in (1, 2)]
        if cell.trial.loss.name == "kd":
            history = [h | {"loss_ce": 0.1, "loss_kd": h["train_loss"] - 0.1} for h in history]
        store.log(cell.trial, history)
    records = frames.frame(made, store)
    figure = methods.term_curves(frames.curves(records, store), style.method_colours(records))
    lines = [axis.get_lines() for axis in figure.axes]
    assert [[line.get_label() for line in each] for each in lines] == [["KD"], ["KD"]]
    np.testing.assert_allclose(lines[1][0].get_ydata(), [0.9, 0.4])


TEXT = """
base: {data: digits, student: resnet8, teacher: resnet20, epochs: 2}
grid: {loss: [kd, pld]}
"""
