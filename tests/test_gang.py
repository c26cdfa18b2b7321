"""Trials that step together have the bits that each of them has alone."""

import gc
import math
import time
import weakref

import pytest
import torch
from small import run, weights

from pld_ray.config.gangs import stream_key
from pld_ray.config.parts import Model
from pld_ray.config.planning import plan
from pld_ray.config.trial import Trial
from pld_ray.data.datasets import load
from pld_ray.distill import keeping, memory, running
from pld_ray.distill.frozen_teacher import FrozenTeacher
from pld_ray.distill.loop import train, train_gang
from pld_ray.distill.running import TrainingError
from pld_ray.models.factory import create_model
from pld_ray.models.features import WithFeatures
from pld_ray.store.store import Store

ROWS = 2 * 32 + 22  # training images: batches of 32, and one of 22
SMALL = f"""
base:
  data: {{name: digits, pad: 1, flip: true, limit: {ROWS}}}
  student: resnet8
  teacher: {{name: resnet8, train: {{epochs: 1}}}}
  epochs: 3
  batch_size: 32
grid: {{loss: [ce]}}
"""
SMALL_VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
DROPOUT = {
    "name": "vit_tiny_patch16_224",
    "args": SMALL_VIT | {"drop_rate": 0.3, "drop_path_rate": 0.2},
}
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
# students, losses, optimizers, schedules, epochs, averages: all that members may differ in
MEMBERS = (
    {"loss": "pld", "student": DROPOUT},
    {"loss": "kd", "teacher_logits": "float32", "epochs": 4},
    {"loss": "dist", "teacher_logits": "live", "ema": 0.9},
    {"loss": "fitnet", "student": {"name": "wrn_16_2"}},
    {"loss": "rkd", "optimizer": SGD, "clip_grad": 1},
    {"loss": "vid", "epochs": 2, "schedule": {"name": "constant"}},
    {"loss": "ce", "student": DROPOUT, "teacher": None},
    {"loss": "dkd", "teacher_logits": "live", "teacher": "other"},
    {"loss": "kd", "optimizer": SGD | {"lr": 1e30}},
    {"loss": "ofd", "student": {"name": "wrn_16_2"}},
    {"loss": {"name": "reviewkd", "weight": 5, "student_preact": True}},
    {"loss": "srrl", "ema": 0.9},
)


def together(trials, store, report=lambda epochs: None, stopped=lambda trial: False):
    """Train trials as a gang; return the errors of those that fail, by id."""
    ended = {}

    def note(trial, error):
        assert trial.id not in ended
        ended[trial.id] = error

    train_gang(
        trials,
        load(trials[0].data),
        store,
        report,
        note,
        stopped=stopped,
        device=torch.device("cpu"),
    )
    return ended


def members(experiment, *chosen):
    """The chosen MEMBERS, and two stores with their teachers: for alone and for together."""
    texts = SMALL, SMALL.replace("{name: resnet8, train", "{name: wrn_16_2, train")
    bases = [plan(experiment(text, "loss=kd")).cells[0].trial for text in texts]
    trials = []
    for number in chosen:
        changes = dict(MEMBERS[number])
        base = bases[changes.get("teacher") == "other"].model_dump(mode="json")
        if changes.get("teacher"):
            del changes["teacher"]
        trials.append(Trial.model_validate(base | changes))
    stores = [Store(experiment.folder / name) for name in ("alone", "together")]
    for store in stores:
        for trial in trials:
            if isinstance(trial.teacher, Trial) and store.record(trial.teacher.id) is None:
                run(trial.teacher, store)
    return trials, *stores


def same(trials, alone, gang):
    """Compare the weights and the metrics of trials with those of a store where each was alone."""
    for trial in trials:
        run(trial, alone)
        assert weights(gang, trial) == weights(alone, trial), trial.label
        first, second = (store.epochs(trial.id) for store in (alone, gang))
        assert len(first) == trial.epochs
        for one, other in zip(first, second, strict=True):
            for name in ("epoch", "train_loss", "top1", "val_loss", "lr", "teacher_top1"):
                assert one.get(name) == other.get(name), (trial.label, name)


def test_members_have_the_bits_of_trials_alone(experiment):
    trials, alone, gang = members(experiment, *range(8))
    assert len({stream_key(trial) for trial in trials}) == 1
    ended = together(trials, gang)
    assert ended == {trial.id: None for trial in trials}
    same(trials, alone, gang)


def test_what_is_the_same_is_done_once(experiment, monkeypatch):
    trials, alone, gang = members(experiment, 2, 3, 4, 6)
    images = load(trials[0].data)
    together(trials, gang)
    seen = sum(gang.record(trial.id)["teacher_images"] for trial in trials)
    # validation once; each epoch once, logits and features in one pass; the first batch twice, to
    # find that this gives the same logits
    assert seen == len(images.val) + 3 * ROWS + 32
    for trial in trials:
        run(trial, alone)
    apart = sum(alone.record(trial.id)["teacher_images"] for trial in trials)
    assert apart == 3 * (len(images.val) + 3 * ROWS)


def test_losses_that_need_more_features_share_one_pass_and_resume(experiment, monkeypatch):
    monkeypatch.setattr(keeping, "CHECKPOINT_SECONDS", 0)
    trials, alone, gang = members(experiment, 2, 3, 9, 10, 11)

    def stop(epochs):
        raise SystemExit

    for some in (trials[:3], trials[3:]):  # with and without the maps before a ReLU
        with pytest.raises(SystemExit):
            together(some, gang, stop)
    together(trials, gang)
    same(trials, alone, gang)
    seen = sum(gang.record(trial.id)["teacher_images"] for trial in trials)
    # the pass of one epoch of two gangs and of two epochs of one; logits for DIST, and their check
    assert seen == 3 * len(load(trials[0].data).val) + 4 * ROWS + 2 * 32


def test_logits_that_the_pass_for_features_does_not_give_are_computed_apart(
    experiment, monkeypatch
):
    forward = WithFeatures.forward

    def other(self, x):
        logits, features = forward(self, x)
        return logits + 1e-6, features

    monkeypatch.setattr(WithFeatures, "forward", other)
    trials, alone, gang = members(experiment, 2, 3, 4)
    together(trials, gang)
    same(trials, alone, gang)
    seen = sum(gang.record(trial.id)["teacher_images"] for trial in trials)
    assert seen == len(load(trials[0].data).val) + 2 * 3 * ROWS


def test_each_set_of_features_is_compared_with_the_logits_of_the_network(monkeypatch):
    """The pass with the maps before a ReLU says nothing about the pass without them."""
    forward = WithFeatures.forward

    def other(self, x):
        logits, features = forward(self, x)
        return logits + (0 if self.further else 1e-3), features

    monkeypatch.setattr(WithFeatures, "forward", other)
    teacher = FrozenTeacher(create_model(Model(name="resnet8"), 10, 1, 8))
    x = torch.randn(2, 1, 8, 8)
    for further, passes in (("preact", 2), ("preact", 1), ("", 2), ("", 2), ("preact", 1)):
        teacher.images_seen = 0
        logits, _ = teacher.logits_and_features(x, frozenset(filter(None, [further])))
        assert teacher.images_seen == passes * len(x)
        assert torch.equal(logits, teacher(x))


@pytest.mark.parametrize("first", [0, 2])
def test_a_member_that_is_not_finite_leaves_and_the_others_go_on(experiment, first):
    several = [0, 3]
    several.insert(first, 8)
    trials, alone, gang = members(experiment, *several)
    ended = together(trials, gang)
    left = trials.pop(first)
    assert isinstance(ended.pop(left.id), TrainingError)
    assert ended == {trial.id: None for trial in trials} and gang.record(left.id) is None
    same(trials, alone, gang)


def test_members_resume_at_different_epochs_with_other_companions(experiment, monkeypatch):
    monkeypatch.setattr(keeping, "CHECKPOINT_SECONDS", 0)
    trials, alone, gang = members(experiment, *range(6))

    def until(epoch):
        def report(epochs):
            if epochs[0]["epoch"] == epoch:
                raise SystemExit

        return report

    for some, epoch in ((trials[:3], 2), (trials[2:5], 1), (trials[5:], 1)):
        with pytest.raises(SystemExit):
            together(some, gang, until(epoch))
    begun = [len(gang.epochs(trial.id)) for trial in trials]
    assert begun == [2, 2, 2, 1, 1, 1]
    seen = []
    together(trials, gang, lambda epochs: seen.append([each["epoch"] for each in epochs]))
    assert seen == [[2, 2, 2], [3, 3, 3, 3, 3], [4]]
    same(trials, alone, gang)


def test_a_process_that_is_stopped_keeps_the_epoch_of_every_member(experiment):
    trials, alone, gang = members(experiment, 0, 1)

    def stop(epochs):
        raise SystemExit

    with pytest.raises(SystemExit):  # a checkpoint a second is the most, and it took less
        together(trials, gang, stop)
    assert [len(gang.load_checkpoint(trial)["history"]) for trial in trials] == [1, 1]
    together(trials, gang)
    same(trials, alone, gang)


def test_a_member_that_is_stopped_leaves_and_can_continue(experiment):
    trials, alone, gang = members(experiment, 0, 1, 2)
    ended = together(trials, gang, stopped=lambda trial: trial is trials[1])
    assert ended == {trial.id: None for trial in trials}
    assert len(gang.load_checkpoint(trials[1])["history"]) == 1
    assert gang.record(trials[1].id) is None
    together(trials[1:2], gang)
    same(trials, alone, gang)


def test_a_member_without_memory_leaves_before_its_first_step(experiment, monkeypatch):
    trials, alone, gang = members(experiment, 0, 1, 3)
    asked = []

    def available(device):
        asked.append(device)
        return -1.0 if len(asked) == 2 else math.inf

    monkeypatch.setattr(memory, "available", available)
    ended = together(trials, gang)
    left = trials.pop(2)
    assert isinstance(ended.pop(left.id), memory.NoRoom) and not gang.epochs(left.id)
    assert len(asked) == 2  # the first trial has room, and each is asked for once
    same(trials, alone, gang)
    monkeypatch.undo()
    together([left], gang)
    same([left], alone, gang)


def test_nothing_is_held_of_a_member_that_left(experiment, monkeypatch):
    trials, _, gang = members(experiment, 8, 0, 1)
    students, made = [], running.create_student

    def create(*arguments):
        students.append(weakref.ref(made(*arguments)))
        return students[-1]()

    def report(epochs):
        gc.collect()
        left = [student() is not None for student in students]
        assert left == [False, True, True]

    monkeypatch.setattr(running, "create_student", create)
    together(trials, gang, report)
    gc.collect()
    assert not any(student() for student in students)


def test_first_steps_say_what_another_one_needs(monkeypatch):
    steps, cpu = memory.FirstSteps(torch.device("cpu")), torch.device("cpu")
    assert not steps.lacks_room()  # nothing is known
    used = iter([100.0, 350.0, 350.0, 400.0])
    monkeypatch.setattr(memory, "_most_used", lambda: next(used))
    for _ in range(2):
        steps.begin()
        steps.end()
    assert steps.largest == 250
    for free, lacks in ((499.0, True), (500.0, False)):
        monkeypatch.setattr(memory, "available", lambda device, free=free: free)
        assert steps.lacks_room() == lacks
    monkeypatch.undo()
    assert 2**24 < memory._most_used() < memory.available(cpu) + memory._most_used() < math.inf


def test_memory_of_a_container_is_what_its_limit_leaves(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    cpu = torch.device("cpu")
    machine = memory.available(cpu)
    (tmp_path / "memory.current").write_text("1000000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available(cpu) == pytest.approx(machine, rel=0.2)
    (tmp_path / "memory.max").write_text("3000000\n")
    assert memory.available(cpu) == 2_000_000


def test_an_error_in_what_is_shared_ends_every_member(experiment, monkeypatch):
    trials, _, gang = members(experiment, 2, 3)

    def broken(*_):
        raise ValueError("no teacher today")

    monkeypatch.setattr("pld_ray.distill.targets._outputs", broken)
    ended = together(trials, gang)
    assert {str(error) for error in ended.values()} == {"no teacher today"}
    assert ended.keys() == {trial.id for trial in trials}


def test_what_the_end_of_a_trial_raises_ends_the_gang(experiment):
    trials, _, gang = members(experiment, 5, 0)

    def ended(trial, error):
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train_gang(trials, load(trials[0].data), gang, lambda epochs: None, ended)


def test_seconds_of_members_add_up_to_those_of_the_gang(experiment):
    trials, _, gang = members(experiment, 0, 1, 2)
    started = time.perf_counter()
    together(trials, gang)
    took = time.perf_counter() - started
    parts = [gang.record(trial.id)["seconds"]["seconds"] for trial in trials]
    assert 0.2 * took < sum(parts) < took


OTHER_STREAMS = (
    "data.pad=2", "data.flip=false", "data.limit=100", "batch_size=64", "drop_last=true",
    "precision=bfloat16", "channels_last=false", "teacher.views=2", "compile=true",
)  # fmt: skip


@pytest.mark.parametrize("settings", OTHER_STREAMS)
def test_trials_with_another_stream_are_no_gang(experiment, settings):
    trials = [plan(experiment(SMALL, *more)).cells[0].trial for more in ((), (settings,))]
    assert stream_key(trials[0]) != stream_key(trials[1])


def test_seeds_are_no_gang(experiment):
    trials = [cell.trial for cell in plan(experiment(SMALL + "seeds: [0, 1]\n")).cells]
    assert stream_key(trials[0]) != stream_key(trials[1])


def test_train_alone_reports_its_epochs(experiment, tmp_path):
    trial = plan(experiment(SMALL)).cells[0].trial
    seen = []
    train(trial, load(trial.data), Store(tmp_path / "results"), seen.append)
    assert [epoch["epoch"] for epoch in seen] == [1, 2, 3] and seen[0]["id"] == trial.id


CARELESS = '''
"""Code that changes what it is given, and that draws random numbers."""

import torch
from timm.models import register_model
from torch import nn
from torch.nn import functional as F

from pld_ray import DistillationLoss, register_loss, register_metric


@register_loss("careless", label="Careless")
class Careless(DistillationLoss):
    """KD that changes its inputs and fails if it is told so."""

    def __init__(self, fails: bool = False, **options):
        super().__init__(**options)
        self.fails = fails

    def set_epoch(self, epoch):
        self.weight = 0.5 + float(torch.rand(()))

    def losses(self, student, teacher, labels, kept):
        if self.fails and len(labels) > 8:
            torch.set_grad_enabled(False)
            raise ValueError("in the middle")
        teacher.sub_(teacher.amax(1, keepdim=True)).mul_(0.5)
        found = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="none").sum(1)
        found = found + self.weight * F.cross_entropy(student, labels.clone(), reduction="none")
        labels.add_(1).remainder_(10)
        return found


@register_metric("lucky")
def lucky(student, labels, teacher):
    """The accuracy of noisy logits."""
    return ((student + torch.rand_like(student)).argmax(1) == labels).double()


class Halving(nn.Module):
    def __init__(self, num_classes, in_chans):
        super().__init__()
        self.num_classes, self.fc = num_classes, nn.Linear(64 * in_chans, num_classes)

    def forward(self, x):
        return self.fc(F.dropout(x.mul_(0.5).flatten(1), 0.5, training=True))


@register_model
def halving(pretrained=False, num_classes=10, in_chans=1, **kwargs):
    return Halving(num_classes, in_chans)
'''


def test_code_of_plugins_changes_nothing_for_others(experiment):
    (experiment.folder / "careless.py").write_text(CARELESS)
    text = "plugins: [./careless.py]\n" + SMALL
    base = plan(experiment(text, "loss=kd")).cells[0].trial.model_dump(mode="json")
    digest = plan(experiment(text, "loss=careless")).cells[0].trial.plugins
    careless = {"loss": {"name": "careless"}, "plugins": digest, "metrics": ["lucky"]}
    several = [
        careless,
        {},
        {"teacher_logits": "live"},
        careless | {"teacher_logits": "live"},
        {"teacher_logits": "live", "student": {"name": "halving"}, "plugins": digest},
        {"loss": "ce", "teacher": None, "metrics": ["lucky"], "plugins": digest},
        careless | {"loss": {"name": "careless", "fails": True}},
    ]
    trials = [Trial.model_validate(base | changes) for changes in several]
    stores = alone, gang = [Store(experiment.folder / name) for name in ("alone", "together")]
    for store in stores:
        run(trials[0].teacher, store)
    ended = together(trials, gang)
    failed = trials.pop()
    assert str(ended.pop(failed.id)) == "in the middle" and set(ended.values()) == {None}
    same(trials, alone, gang)
    for trial in trials:
        for one, other in zip(*(store.epochs(trial.id) for store in stores), strict=True):
            assert one.get("lucky") == other.get("lucky")
    assert torch.is_grad_enabled()
