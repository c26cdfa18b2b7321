"""The core of a step, and the calls for modules and loaders of one's own, against plain PyTorch."""

import copy
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from own_modules import Small, batch, loader
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pld_ray import (
    ATLoss,
    CELoss,
    Distiller,
    FitNetLoss,
    KDLoss,
    PLDKnowledgeDistillation,
    PLDLoss,
    evaluate,
    fit,
    teacher_order,
)
from pld_ray.config.parts import Schedule
from pld_ray.errors import InputError
from pld_ray.losses import Features
from pld_ray.models.factory import Renormalize


@pytest.fixture
def pair():
    torch.manual_seed(0)
    teacher, student = Small(9), Small()
    teacher.train()(batch(7)[0])  # running statistics that are not those of the first batch
    return student, teacher


# ---------------------------------------------------------------- the core


def test_a_step_is_what_plain_pytorch_does(pair):
    student, teacher = pair
    x, y = batch()
    distiller = Distiller(student, teacher, KDLoss(temperature=2.0, ce_weight=0.25))
    distiller.train()
    assert student.training and not teacher.training
    torch.manual_seed(1)
    loss = distiller(x, y)
    loss.backward()
    got = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    torch.manual_seed(1)
    with torch.no_grad():
        t = copy.deepcopy(teacher).eval()(x)
    z = student(x)
    kl = F.kl_div(F.log_softmax(z / 2, 1), F.softmax(t / 2, 1), reduction="batchmean")
    expected = 0.25 * F.cross_entropy(z, y) + 0.75 * 4 * kl
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, p in student.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_the_teacher_never_changes(pair):
    student, teacher = pair
    before = copy.deepcopy(teacher.state_dict())
    distiller = Distiller(student, teacher)
    fit(distiller, loader(), epochs=2, lr=0.1, progress=False)
    distiller.train()
    assert not teacher.training and student.training
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_kept_logits_and_orders_give_the_same_loss(pair):
    student, teacher = pair
    student.eval()
    x, y = batch()
    live = Distiller(student, teacher, PLDLoss())(x, y)
    logits = teacher(x)
    kept = Distiller(student, None, PLDLoss())
    assert kept(x, y, teacher_logits=logits).item() == pytest.approx(live.item(), rel=1e-6)
    order = teacher_order(logits, y)
    assert kept(x, y, logits, order).item() == pytest.approx(live.item(), rel=1e-6)
    with pytest.raises(ValueError, match="PLDLoss needs a teacher: expected a teacher network or"):
        kept(x, y)
    alone = Distiller(student, loss=CELoss())
    assert alone(x, y).item() == pytest.approx(F.cross_entropy(student(x), y).item(), rel=1e-6)


def test_renormalized_images_are_the_ones_the_teacher_knows():
    raw = torch.rand(5, 3, 4, 4)
    ours, theirs = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)), ((0.5, 0.4, 0.3), (0.1, 0.2, 0.4))

    def normalised(mean, std):
        return (raw - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    change = Renormalize(*ours, *theirs)
    torch.testing.assert_close(change(normalised(*ours)), normalised(*theirs))
    seen = []

    class Teacher(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.flatten(1)[:, :4]

    distiller = Distiller(Small(), Teacher(), renormalize=change)
    with pytest.raises(RuntimeError):  # the student is made for smaller images
        distiller(normalised(*ours), torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(seen[0], normalised(*theirs))


def test_bfloat16_is_for_forward_passes_alone(pair):
    student, teacher = pair
    seen = []

    def loss(z, t, y):
        seen.extend([z.dtype, t.dtype])
        return z.sum()

    distiller = Distiller(student, teacher, loss, precision="bfloat16")
    student.head.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    distiller(*batch())
    assert seen == [torch.bfloat16, torch.float32, torch.float32]


def test_losses_on_features_connect_first_and_learn_their_own_parts():
    torch.manual_seed(0)
    student, teacher = (
        timm.create_model(name, num_classes=4, in_chans=3) for name in ("resnet8", "resnet20")
    )
    x, y = torch.randn(6, 3, 8, 8), torch.randint(0, 4, (6,))
    distiller = Distiller(student, teacher, FitNetLoss(stage=1, weight=2.0))
    with pytest.raises(ValueError, match=r"FitNetLoss compares features: call distiller\.connect"):
        distiller(x, y)
    statistics = copy.deepcopy(student.state_dict())
    student.train()
    distiller.connect(x)
    assert student.training
    assert all(torch.equal(statistics[k], v) for k, v in student.state_dict().items())
    with pytest.raises(InputError, match=r"train_loader is an iterator: call distiller\.connect"):
        fit(Distiller(student, teacher, FitNetLoss()), iter([(x, y)]), 1, progress=False)
    learnt = distiller.learnt_by_loss()
    assert [tuple(p.shape) for p in learnt] == [(16, 16, 1, 1), (16,), (16,), (16,)]
    assert not any(name.startswith("loss") for name in student.state_dict())
    distiller.eval()
    s, t = (net.stages[0](net.stem(x)) for net in (student, teacher.eval()))
    expected = F.cross_entropy(student(x), y) + 2 * F.mse_loss(distiller.loss.regressor(s), t)
    assert distiller(x, y).item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match="ATLoss compares features: expected a teacher network"):
        Distiller(student, None, ATLoss())
    with pytest.raises(InputError, match="model family Small: timm cannot return its intermediate"):
        Distiller(Small(), teacher, ATLoss())


def test_a_module_may_give_features_itself():
    class Own(Small):
        taps = (0,)

        def forward_intermediates(self, x, indices):
            maps = [x * 2]
            return x, [maps[i] for i in indices]

        def forward_head(self, x, pre_logits=False):
            return self.body(x)

        def get_classifier(self):
            return self.head

    student, teacher = Own().eval(), Own().eval()
    distiller = Distiller(student, teacher, ATLoss(weight=1.0, ce_weight=0.0))
    x, y = batch()
    distiller.connect(x)
    assert distiller(x, y).item() == 0.0  # both give the same map
    assert isinstance(distiller.teacher.features(x), Features)


# ---------------------------------------------------------------- fit


def test_fit_is_a_plain_loop(pair):
    student, teacher = pair
    other = copy.deepcopy(student)
    torch.manual_seed(3)
    history = fit(
        Distiller(student, teacher), loader(), epochs=3, optimizer="sgd", lr=0.2, clip_grad=0.5,
        weight_decay=0.01, progress=False,
    )  # fmt: skip
    torch.manual_seed(3)
    # timm decays matrices alone
    matrices, others = (
        [p for p in other.parameters() if (p.ndim > 1) is big] for big in (True, False)
    )
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    loss, optimizer = PLDLoss(), torch.optim.SGD(groups, lr=0.2, momentum=0.9, nesterov=True)
    seen, rates = [], []
    for step in range(9):
        x, y = batch(step % 3)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 + math.cos(math.pi * step / 9))
        other.train()
        optimizer.zero_grad()
        value = loss(other(x), teacher(x), y)
        value.backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
        seen.append(value.item())
        rates.append(optimizer.param_groups[0]["lr"])
    terms = ["loss_ce", "loss_kd"] if isinstance(loss, KDLoss) else []
    assert list(history.columns) == ["epoch", "train_loss", *terms, "lr", "images_per_second"]
    assert list(history["epoch"]) == [1, 2, 3]
    np.testing.assert_allclose(history["train_loss"], np.reshape(seen, (3, 3)).mean(1), rtol=1e-5)
    np.testing.assert_allclose(history["lr"], rates[2::3], rtol=1e-6)
    for a, b in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_fit_validates_averages_and_takes_objects(pair):
    student, teacher = pair
    other = copy.deepcopy(student)
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    history = fit(
        Distiller(student, teacher), loader(), 2, loader(5), optimizer=optimizer, ema=0.9,
        schedule=Schedule(name="constant"), progress=False,
    )  # fmt: skip
    assert {"top1", "top5", "val_loss", "ece"} <= set(history.columns)
    assert (history["lr"] == 0.5).all()
    assert history["top1"].iloc[-1] == pytest.approx(100 * evaluate(student, loader(5)))
    x = torch.cat([images for images, _ in loader(5)])
    y = torch.cat([labels for _, labels in loader(5)])
    right = (student.eval()(x).argmax(1) == y).double().mean().item()
    assert evaluate(student, loader(5)) == pytest.approx(right)
    torch.manual_seed(5)
    optimizer, loss = torch.optim.SGD(other.parameters(), lr=0.5), PLDLoss()
    average = []
    for step in range(6):
        images, labels = batch(step % 3)
        optimizer.zero_grad()
        loss(other.train()(images), teacher(images), labels).backward()
        optimizer.step()
        now = [p.detach().clone() for p in other.parameters()]
        # timm begins to average with the third update
        average = (
            now if step < 2 else [0.9 * a + 0.1 * w for a, w in zip(average, now, strict=True)]
        )
    for got, expected in zip(student.parameters(), average, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0: expected a whole number from 1"),
        ({"epochs": 1.5}, "epochs is 1.5: expected a whole number from 1"),
        ({"clip_grad": -1.0}, "clip_grad is -1.0: expected a number above 0, or None"),
        ({"clip_grad": math.nan}, "clip_grad is nan: expected a number above 0, or None"),
        ({"ema": 1.0}, "ema is 1.0: expected a number between 0 and 1, or None"),
        ({"optimizer": torch.optim.AdamW}, "expected a torch optimizer, or the name of one in"),
        ({"optimizer": torch.optim.SGD(Small().parameters())}, "none of the student's parameters"),
        ({"schedule": "multistep"}, "schedule: multistep needs milestones"),
        ({"warmup_epochs": 1}, "warmup_epochs is 1: expected fewer than the 1 epochs"),
        ({"schedule": Schedule(), "warmup_epochs": 1}, "warmup_epochs: expected in the Schedule"),
        ({"train_loader": TensorDataset(*batch())}, "pass a DataLoader, not a dataset"),
        ({"train_loader": [(batch()[0][:0], batch()[1][:0])]}, "train_loader gave no batch"),
        ({"lr": -1.0}, "optimizer: lr is -1.0: input should be greater than 0"),
        ({"optimizer": "adamx"}, "optimizer is 'adamx': not in timm; did you mean"),
        ({"schedule": "cosin"}, "schedule: name is 'cosin'; did you mean 'cosine'"),
        ({"precision": "half"}, "precision is 'half'; accepted: auto, bfloat16, float32"),
        ({"device": "gpu"}, "device is 'gpu': expected cpu, cuda or cuda:NUMBER"),
        ({"train_loader": []}, "train_loader has no batches"),
        ({"train_loader": iter(loader())}, "a list_iterator without a length, which the"),
        ({"train_loader": [batch()[0]]}, "expected (images, labels)"),
        ({"train_loader": [(batch()[0].numpy(), [1])]}, "a batch is (ndarray, list): exp"),
        ({"train_loader": [(batch()[0], batch()[1].float())]}, "labels are torch.float32: exp"),
        ({"train_loader": [(batch()[0], batch()[1][:3])]}, "labels [3]: expected floating point"),
        ({"train_loader": [(batch()[0].byte(), batch()[1])]}, "images are torch.uint8 [8, 3"),
        ({"train_loader": [(batch()[0], batch()[1] + 9)]}, "labels: expected classes in [0, 4)"),
        ({"train_loader": [(batch()[0] * math.nan, batch()[1])]}, "training loss is nan in epoch"),
        ({"val_loader": [(batch()[0], batch()[1] + 9)]}, "expected labels in [0, 4), got"),
        ({"val_loader": [(batch()[0] * math.nan, batch()[1])]}, "logits are not finite on the val"),
        ({"val_loader": iter(loader(1)), "epochs": 2}, "val_loader is an iterator, which can be"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_sentence(pair, change, message):
    student, teacher = pair
    given = {"train_loader": loader(), "epochs": 1, "val_loader": None, **change}
    with pytest.raises(ValueError) as error:
        fit(Distiller(student, teacher), progress=False, **given)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_class_counts_that_differ_are_told(pair):
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(12, 7))
    with pytest.raises(ValueError, match=r"expected the student's shape \[8, 4\], got \[8, 7\]"):
        fit(Distiller(pair[0], teacher), loader(), 1, progress=False)

    class Output(nn.Module):
        def forward(self, x):
            return {"logits": x}

    with pytest.raises(ValueError, match=r"the student returned a dict: expected logits \[B, C\]"):
        Distiller(Output(), pair[1])(*batch())
    with pytest.raises(ValueError, match=r"the teacher returned a dict: expected logits \[B, C\]"):
        Distiller(pair[0], Output())(*batch())
    with pytest.raises(ValueError, match=r"the network returned a dict: expected logits \[B, C\]"):
        evaluate(Output(), loader())


def sharing():
    student = Small()
    return student, nn.Sequential(student.body, nn.Linear(6, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s, t: Distiller(s, s), "student and teacher share parameters"),
        (lambda s, t: Distiller(*sharing()), "student and teacher share parameters"),
        (lambda s, t: Distiller(s, len), "expected a torch module"),
        (lambda s, t: Distiller(s, t, PLDLoss), "expected a loss module, such as PLDLoss()"),
        (lambda s, t: Distiller(s, t, "pld"), "loss is 'pld': expected a loss module"),
        (lambda s, t: Distiller(s, t, nn.CrossEntropyLoss()), "a torch.nn.CrossEntropyLoss, which"),
        (lambda s, t: Distiller(s, t, precision="bf16"), "precision is 'bf16': expected 'float32'"),
        (
            lambda s, t: Distiller(s, Distiller(s, t).teacher, renormalize=nn.Identity()),
            "renormalize: expected a teacher network that is not frozen yet",
        ),
        (
            lambda s, t: Distiller(s, t, PLDLoss(reduction="none"))(*batch()),
            "the loss returned [8]: expected one number, such as a mean",
        ),
        (lambda s, t: evaluate(s, loader(), precision="auto"), "precision is 'auto': expected"),
        (lambda s, t: PLDKnowledgeDistillation(t, s, device="cpu").fit(loader(), 0), "epochs is 0"),
    ],
)
def test_what_cannot_be_distilled_is_one_sentence(pair, make, message):
    with pytest.raises(ValueError) as error:
        make(*pair)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_last_batch_of_one_image_is_told(pair):
    student, teacher = pair
    x, y = batch()
    student.norm = nn.BatchNorm1d(4)
    student.forward = lambda images: student.norm(Small.forward(student, images))
    wanted = "train_loader: a batch has one image, on which batch norm cannot train"
    with pytest.raises(InputError, match=wanted):
        fit(Distiller(student, teacher), [(x, y), (x[:1], y[:1])], 1, progress=False)


def test_a_network_that_was_a_teacher_is_frozen(pair):
    student, teacher = pair
    Distiller(student, teacher)
    with pytest.raises(InputError, match="the student has no parameter that trains"):
        fit(Distiller(teacher, loss=CELoss()), loader(), 1, progress=False)


def test_a_kind_of_cross_entropy_needs_no_teacher(pair):
    class Own(CELoss):
        pass

    x, y = batch()
    student = pair[0].eval()
    assert torch.equal(Distiller(student, loss=Own())(x, y), F.cross_entropy(student(x), y))


def test_another_student_is_the_one_that_trains(pair):
    student, teacher = pair
    distiller, other = Distiller(Small(), teacher), copy.deepcopy(student)
    distiller.student = student
    fit(distiller, loader(), 1, progress=False)
    assert not torch.equal(student.head.weight, other.head.weight)


def test_an_optimizer_without_what_the_loss_learns_is_refused():
    student, teacher = (timm.create_model("resnet8", num_classes=4) for _ in range(2))
    shown = [(torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,)))]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with pytest.raises(InputError, match="it lacks parameters that the loss learns"):
        fit(Distiller(student, teacher, FitNetLoss()), shown, 1, optimizer=optimizer)


def test_a_last_update_that_breaks_the_student_is_told(pair):
    class Breaking(torch.optim.SGD):
        def step(self):
            for parameter in self.param_groups[0]["params"]:
                parameter.data.fill_(math.inf)

    student, teacher = pair
    with pytest.raises(InputError, match="the last update made the student's weights infinite"):
        fit(Distiller(student, teacher), loader(1), 1, optimizer=Breaking(student.parameters()))


def test_images_of_other_types_are_float32(pair):
    x, y = batch()
    torch.manual_seed(0)
    fit(Distiller(*copy.deepcopy(pair)), [(x.double(), y.int())], 1, val_loader=[(x.half(), y)])
    assert evaluate(pair[0].eval(), [(x.double(), y)]) == evaluate(pair[0], [(x, y)])


def test_an_iterator_serves_one_epoch_of_a_constant_schedule(pair):
    history = fit(Distiller(*pair), iter(loader()), 1, schedule="constant", progress=False)
    assert len(history) == 1


# ---------------------------------------------------------------- the article, the example


def test_the_articles_class(pair, tmp_path):
    student, teacher = pair
    with pytest.warns(UserWarning, match="no CUDA device is available: training on the CPU"):
        method = PLDKnowledgeDistillation(teacher_model=teacher, student_model=student)
    assert isinstance(method.optimizer, torch.optim.AdamW)
    assert method.optimizer.param_groups[0]["lr"] == 0.01
    other, x, y = copy.deepcopy(student), *batch()
    torch.manual_seed(0)
    value = method.train_step(x, y)
    torch.manual_seed(0)
    assert value == pytest.approx(PLDLoss()(other.train()(x), teacher(x), y).item(), rel=1e-6)
    assert student.training and not teacher.training
    right = (student.eval()(x).argmax(1) == y).double().mean().item()
    assert method.validate([(x, y)]) == pytest.approx(right)
    train = DataLoader(TensorDataset(x, y), 4)
    history = method.fit(train, epochs=3, test_loader=train)
    assert set(history) == {"train_loss", "val_acc"}
    assert len(history["train_loss"]) == 3 and all(0 <= a <= 1 for a in history["val_acc"])
    assert history["val_acc"][-1] == method.validate(train)
    assert method.fit(train, epochs=1)["val_acc"] == []
    with pytest.raises(InputError, match="train_loader gave no batch: an iterator can be read"):
        method.fit(iter(train), epochs=2)
    torch.save(student.state_dict(), tmp_path / "student.pt")
    fresh = Small()
    fresh.load_state_dict(torch.load(tmp_path / "student.pt", weights_only=True))
    assert torch.equal(fresh.eval()(x), student.eval()(x))


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    example = Path(__file__).parents[1] / "examples" / "digits.py"
    monkeypatch.setattr(
        sys, "argv", [str(example), "--epochs", "6", "--folder", str(tmp_path / "s")]
    )
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    assert "student of a plain loop: " in printed
    accuracy = float(printed.split("student: ")[1].split("%")[0])
    assert accuracy > 30  # chance is 10
