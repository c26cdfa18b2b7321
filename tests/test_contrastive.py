"""CRD and what a loss that keeps a memory of the training samples needs of the core."""

import copy
import math

import numpy as np
import pytest
import timm
import torch
import warm
from scipy import stats
from small import CPU, cells, run, weights
from test_gang import same, together
from test_steps import trained
from test_workers import on_two_workers
from torch.utils.data import DataLoader, TensorDataset

from pld_ray.config.trial import Trial
from pld_ray.data.datasets import load
from pld_ray.distill import keeping, running
from pld_ray.distill.distiller import Distiller
from pld_ray.distill.fit import fit
from pld_ray.distill.loop import Gang, train, train_epoch
from pld_ray.distill.running import Shared, set_up
from pld_ray.errors import InputError
from pld_ray.losses import CRDLoss, Features
from pld_ray.models.checks import check_features
from pld_ray.store.store import Store

COUNT, BATCH, DIM, K, TAU, MOMENTUM = 40, 6, 5, 12, 0.3, 0.6
CRD = "grid.loss=[{name: crd, negatives: 40, dim: 8}]"


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(labels=None, **options):
    """A loss in float64, and the pooled features of student and teacher."""
    torch.manual_seed(0)
    settings = {"negatives": K, "temperature": TAU, "momentum": MOMENTUM, "dim": DIM} | options
    loss = CRDLoss(**settings)
    student, teacher = draw(BATCH, 7, seed=1), draw(BATCH, 9, seed=2)
    loss.connect(Features([], student), Features([], teacher))
    loss.connect_samples(torch.arange(COUNT) % 4 if labels is None else labels)
    return loss.double(), student, teacher


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def vectors(loss, student, teacher):
    """The vectors of both sides, computed with numpy."""
    layers = ((loss.embed_student, student), (loss.embed_teacher, teacher))
    return [
        unit(x.numpy() @ layer.weight.detach().numpy().T + layer.bias.detach().numpy())
        for layer, x in layers
    ]


def reference(pairs, index, negatives, scales=None):
    """The loss by loops over samples and negatives, and Z of both sides."""
    found, total = [], 0
    for side, (v, memory) in enumerate(pairs):
        values = [
            [math.exp(memory[j] @ v[i] / TAU) for j in (index[i], *negatives[i])]
            for i in range(len(v))
        ]
        z = np.mean(values) * COUNT if scales is None else scales[side]
        found.append(z)
        noise = K / COUNT
        for first, *others in values:
            total -= math.log(first / z / (first / z + noise + 1e-7)) / len(v)
            for other in others:
                total -= math.log(noise / (other / z + noise + 1e-7)) / len(v)
    return total, found


def drawn(loss, index):
    candidates, chosen = loss.draw(index)
    return [candidates[row].tolist() for row in chosen]


def test_loss_scale_and_memories_against_loops():
    loss, student, teacher = made(weight=1.0)
    batches = [torch.tensor(i) for i in ([3, 17, 8, 21, 39, 0], [5, 17, 30, 1, 2, 39])]
    memories = [m.numpy().copy() for m in (loss.student_memory, loss.teacher_memory)]
    assert all(
        abs(abs(m).max() - math.sqrt(3 / DIM)) < 0.03 and abs(m.mean()) < 0.1 for m in memories
    )
    scales = None
    for number, index in enumerate(batches):
        s, t = student + number, teacher - number
        mine, theirs = vectors(loss, s, t)
        pairs = (mine, memories[1]), (theirs, memories[0])
        negatives = drawn(loss, index)
        expected, found = reference(pairs, index.tolist(), negatives, scales)
        value = loss.distance(Features([], s), Features([], t), index)
        assert value.item() == pytest.approx(expected, rel=1e-10)
        scales = scales or found  # those of the first batch
        np.testing.assert_allclose(loss.log_scale.exp().numpy(), scales, rtol=1e-12)
        for memory, new in zip(memories, (mine, theirs), strict=True):
            for row, i in enumerate(index.tolist()):
                memory[i] = unit(MOMENTUM * memory[i] + (1 - MOMENTUM) * new[row])
        for memory, kept in zip(memories, (loss.student_memory, loss.teacher_memory), strict=True):
            np.testing.assert_allclose(kept.numpy(), memory, rtol=1e-12)
    before = copy.deepcopy(loss.state_dict())
    loss.eval().distance(Features([], s), Features([], t), index)
    assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())


def test_exponentials_larger_than_any_float32_are_summed_by_their_logarithms():
    tau, index = 0.002, torch.arange(BATCH)  # exp(1 / 0.002) is 1e217
    loss, student, teacher = made(weight=1.0, temperature=tau)
    loss, student, teacher = loss.float(), student.float(), teacher.float()
    scales = None
    for _ in range(3):
        memories = [m.double().numpy() for m in (loss.teacher_memory, loss.student_memory)]
        pairs = list(zip(vectors(loss, student, teacher), memories, strict=True))
        negatives = drawn(loss, index)
        a = [  # logarithms of a_ij times Z
            np.array([m[[i, *negatives[i]]] @ v[i] / tau for i in range(BATCH)]) for v, m in pairs
        ]
        scales = scales or [np.logaddexp.reduce(x.ravel()) + math.log(COUNT / x.size) for x in a]
        total, noise = 0.0, K / COUNT
        for x, log_z in zip(a, scales, strict=True):
            together = np.logaddexp(x - log_z, math.log(noise + 1e-7))
            total += (together[:, 0] - (x - log_z)[:, 0]).sum() / BATCH
            total += (together[:, 1:] - math.log(noise)).sum() / BATCH
        value = loss.distance(Features([], student), Features([], teacher), index)
        assert value.item() == pytest.approx(total, rel=1e-5)
        gradients = torch.autograd.grad(value, list(loss.parameters()))
        assert all(gradient.isfinite().all() for gradient in gradients)


def test_gradients_are_those_of_differences():
    loss, student, teacher = made(weight=0.7)
    index = torch.tensor([3, 17, 8, 21, 39, 0])
    loss.distance(Features([], student), Features([], teacher), index)
    loss.eval()  # what follows changes neither Z nor the memories
    negatives, scales = drawn(loss, index), loss.log_scale.exp().tolist()
    memories = loss.teacher_memory.numpy(), loss.student_memory.numpy()

    def value(features):
        pairs = zip(vectors(loss, features, teacher), memories, strict=True)
        return 0.7 * reference(tuple(pairs), index.tolist(), negatives, scales)[0]

    student.requires_grad_()
    loss.distance(Features([], student), Features([], teacher), index).backward()
    expected = torch.zeros_like(student)
    for i, j in np.ndindex(*student.shape):
        step = torch.zeros_like(student)
        step[i, j] = 1e-5
        at = student.detach()
        expected[i, j] = (value(at + step) - value(at - step)) / 2e-5
    torch.testing.assert_close(student.grad, expected, rtol=1e-6, atol=1e-8)
    for layer in (loss.embed_student, loss.embed_teacher):
        slope = layer.weight.grad[2, 3].item()
        with torch.no_grad():
            ends = []
            for sign in (1, -2):
                layer.weight[2, 3] += sign * 1e-5
                ends.append(value(student.detach()))
            layer.weight[2, 3] += 1e-5
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


def test_negatives_are_of_other_classes_without_replacement_and_uniform():
    """Of unequal classes. In one epoch, a sample draws once."""
    labels = torch.tensor([0] * 4 + [1] * 9 + [2] * 17)
    loss, *_ = made(labels, negatives=7)
    torch.manual_seed(1)
    rounds, index = 3000, torch.tensor([2, 7, 29, 0])
    counts = torch.zeros(len(index), len(labels))
    pairs = torch.zeros(len(labels), len(labels))
    for epoch in range(rounds):
        loss.set_epoch(epoch)
        rows = drawn(loss, index)
        for number, (i, row) in enumerate(zip(index, rows, strict=True)):
            assert len(set(row)) == len(row) == 7 and (labels[row] != labels[i]).all()
            counts[number, row] += 1
        pairs[np.ix_(rows[2], rows[2])] += 1
    for number, i in enumerate(index):
        others = counts[number][labels != labels[i]]
        # draws without replacement vary less than independent ones, by (n - K) / (n - 1)
        expected = rounds * 7 / len(others)
        left = (len(others) - 7) / (len(others) - 1)
        statistic = ((others - expected) ** 2 / expected).sum().item() / left
        assert 0.001 < stats.chi2.sf(statistic, len(others) - 1) < 0.999
    together = pairs[:13, :13][~torch.eye(13, dtype=bool)] / rounds  # both of two other samples
    assert together.mean().item() == pytest.approx(7 * 6 / (13 * 12), abs=1e-6)
    assert together.std() < 3 * math.sqrt(0.27 * 0.73 / rounds)
    again = drawn(loss, index)
    assert again == rows  # no generator is read between two epochs


def test_few_samples_of_other_classes_are_all_negatives():
    labels = torch.tensor([0] * 25 + [1] * 15)
    loss, student, teacher = made(labels, negatives=16384)
    assert loss.negatives == 15 and loss.candidates == 40
    assert loss.notes == [
        "crd: 15 negatives instead of 16384: no more of the 40 training samples are of other "
        "classes than the largest one"
    ]
    index = torch.tensor([3, 17, 8, 21, 30, 0])
    rows = drawn(loss, index)
    assert sorted(rows[0]) == list(range(25, 40)) and set(rows[4]) < set(range(25))
    assert loss.distance(Features([], student), Features([], teacher), index).isfinite()


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([2, 2, 2], "crd: all 3 training samples are of one class: expected two classes or more"),
        ([], "crd: all 0 training samples are of one class: expected two classes or more"),
        ([1, -100, 0], "crd: a label is -100: expected class indices from 0"),
    ],
)
def test_samples_that_cannot_be_used_are_told(labels, said):
    with pytest.raises(ValueError, match=said):
        made(torch.tensor(labels, dtype=torch.int64))


def test_what_cannot_train_is_told_before_the_run(experiment):
    with pytest.raises(InputError, match=r"data\.mixup: loss crd keeps a memory of single samples"):
        cells(experiment, CRD, "data.mixup=0.2")
    with pytest.raises(InputError, match=r"or no cutmix"):
        cells(experiment, CRD, "data.cutmix=1.0")
    (trial,) = cells(experiment, CRD)
    with pytest.raises(InputError, match="resnet8 → resnet8: crd: all 150 training samples are of"):
        check_features(trial, 10, 1, 8, labels=np.zeros(150, np.int64))
    check_features(trial, 10, 1, 8, labels=np.arange(150) % 10)


def small():
    """A distiller that is not connected, and its samples."""
    torch.manual_seed(0)
    student, teacher = (timm.create_model("resnet8", num_classes=3, in_chans=1) for _ in range(2))
    labels = torch.arange(30) % 3
    return (
        Distiller(student, teacher, CRDLoss(negatives=8, dim=4)),
        draw(30, 1, 8, 8).float(),
        labels,
    )


def test_a_plain_loop_and_fit_are_told_what_is_missing():
    distiller, images, labels = small()
    with pytest.raises(
        ValueError, match=r"expected distiller\.connect\(images, labels\), with the"
    ):
        distiller.connect(images)
    for wrong, shown in (
        (labels.float(), r"float32 \[30\]"),
        (labels[:, None], r"int64 \[30, 1\]"),
    ):
        with pytest.raises(
            ValueError, match=f"labels is torch.{shown}: expected the class indices"
        ):
            distiller.connect(images, wrong)
    small()[0].connect(images, labels.tolist())
    whole = TensorDataset(images, labels, torch.arange(30))
    with pytest.raises(InputError, match=r"call distiller\.connect\(images, labels\) before fit"):
        fit(distiller, DataLoader(whole, 8), 1, progress=False)
    distiller.connect(images, labels)
    with pytest.raises(ValueError, match=r"expected distiller\(images, labels, index=\.\.\.\)"):
        distiller(images, labels)
    with pytest.raises(InputError, match=r"expected batches \(images, labels, index\)"):
        fit(distiller, DataLoader(TensorDataset(images, labels), 8), 1, progress=False)
    shifted = TensorDataset(images, labels, torch.arange(1, 31))
    with pytest.raises(InputError, match=r"expected indices in \[0, 30\), got 30"):
        fit(distiller, DataLoader(shifted, 8), 1, progress=False)


def test_fit_is_a_plain_loop_with_indices():
    (ours, images, labels), (other, *_) = small(), small()
    whole = TensorDataset(images, labels, torch.arange(30))
    for distiller in (ours, other):
        torch.manual_seed(3)
        distiller.connect(images, labels)
    torch.manual_seed(4)
    parameters = [*ours.student.parameters(), *ours.learnt_by_loss()]
    options = {"schedule": "constant", "progress": False, "device": "cpu"}
    optimizer = torch.optim.SGD(parameters, 0.1)
    history = fit(ours, DataLoader(whole, 8), 2, optimizer=optimizer, **options)
    torch.manual_seed(4)
    optimizer = torch.optim.SGD([*other.student.parameters(), *other.learnt_by_loss()], 0.1)
    other.train()
    losses = []
    for epoch in range(2):
        other.set_epoch(epoch)
        for x, y, index in DataLoader(whole, 8):
            optimizer.zero_grad()
            losses.append(other(x, y, index=index))
            losses[-1].backward()
            optimizer.step()
    assert history["train_loss"].iloc[1] == pytest.approx(
        sum(loss.item() * n for loss, n in zip(losses[4:], (8, 8, 8, 6), strict=True)) / 30
    )
    state = other.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in ours.state_dict().items())


def test_a_killed_trial_resumes_to_the_bit_and_keeps_no_memory_in_the_student(
    experiment, tmp_path, monkeypatch
):
    monkeypatch.setattr(keeping, "CHECKPOINT_SECONDS", 0)
    (trial,) = cells(experiment, CRD)
    stores = whole, broken = [Store(tmp_path / name) for name in ("whole", "broken")]
    run(trial.teacher, broken)
    kept = []

    def stop(metrics):
        kept.append(broken.load_checkpoint(trial)["loss"])
        if metrics["epoch"] < 3:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(trial, load(trial.data), broken, stop, device=CPU)
    train(trial, load(trial.data), broken, stop, device=CPU)
    record = run(trial, whole)
    assert len({weights(store, trial) for store in stores}) == 1
    assert record["metrics"]["train_loss"] == broken.record(trial.id)["metrics"]["train_loss"]
    assert "student_memory" not in whole.load_weights(trial)
    assert {name for name in kept[0] if "." not in name} == {
        "student_memory", "teacher_memory", "log_scale"
    }  # fmt: skip
    assert torch.equal(kept[0]["log_scale"], kept[2]["log_scale"])
    assert kept[0]["log_scale"].isfinite().all()
    assert not torch.equal(kept[0]["student_memory"], kept[2]["student_memory"])
    # each of the 150 samples was in a batch, so that its vector has length 1
    lengths = kept[0]["teacher_memory"].norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(150))


def test_a_gang_has_the_bits_of_trials_alone(experiment, tmp_path):
    (first,) = cells(experiment, CRD)
    base = first.model_dump(mode="json")
    others = [
        {"loss": "kd"},
        {"loss": {"name": "crd", "negatives": 30, "dim": 4, "momentum": 0.9}},
        {"student": {"name": "wrn_16_2"}, "ema": 0.9},
    ]
    trials = [first, *(Trial.model_validate(base | each) for each in others)]
    alone, gang = (Store(tmp_path / name) for name in ("alone", "gang"))
    for store in (alone, gang):
        run(first.teacher, store)
    assert together(trials, gang) == {trial.id: None for trial in trials}
    same(trials, alone, gang)


def test_replays_of_a_graph_get_the_indices(monkeypatch, tmp_path, experiment):
    (trial,) = cells(experiment, CRD)
    ours, record, counts = trained(monkeypatch, tmp_path, trial)
    expected, *_ = trained(monkeypatch, tmp_path, trial, warm=10**9)
    assert ours == expected and record["environment"]["cuda_graph"]
    # the first step draws Z, so that four are done before the capture
    assert counts == {"warm": 4, "captured": 1, "replayed": 8}


def test_batches_come_with_the_indices_of_their_samples(experiment, tmp_path):
    """Of a part of the dataset, with a last batch that is dropped."""
    (trial,) = cells(experiment, CRD, "drop_last=true", "data.limit=70")
    run(trial.teacher, Store(tmp_path))
    images = load(trial.data)
    shared = Shared(trial, images, Store(tmp_path), None, lambda: None, CPU)
    member, seen = set_up(trial, shared), []
    member.distiller.register_forward_pre_hook(lambda _, args: seen.append(args))
    gang = Gang(shared, lambda epochs: None, lambda trial, error: None, lambda trial: False)
    gang.runs.append(member)
    train_epoch(gang, [member], 0)
    assert [len(args[5]) for args in seen] == [32, 32]
    index = torch.cat([args[5] for args in seen])
    assert len(index.unique()) == 64 and index.max() < 70
    labels = torch.from_numpy(images.train_labels)
    assert torch.equal(torch.cat([args[1] for args in seen]), labels[index])
    loss = member.distiller.loss
    assert torch.equal(loss.labels, labels)
    negatives = {}
    for epoch in (0, 4, 1, 4, 0):  # what is drawn for an epoch does not depend on earlier ones
        member.begin(epoch)
        negatives.setdefault(epoch, []).append(drawn(loss, index[:5]))
        torch.rand(7)
    assert negatives[0][0] == negatives[0][1] != negatives[4][0] == negatives[4][1]


def test_two_workers_keep_one_memory_of_all_samples(experiment, tmp_path, monkeypatch):
    """151 images: the last batch has 12 images for one worker and 11 for the other."""
    overrides = CRD, "workers=2", "teacher.train.workers=1", "epochs=1", "data.limit=151"
    (trial,) = cells(experiment, *overrides)
    for name in ("whole", "parts"):
        run(trial.teacher, Store(tmp_path / name))
    whole = on_two_workers([trial], tmp_path / "whole")
    parts = on_two_workers([trial], tmp_path / "parts", last=1)
    state = parts.load_checkpoint(trial)["loss"]
    lengths = state["student_memory"].norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(151))
    on_two_workers([trial], tmp_path / "parts", last=-1)
    assert weights(parts, trial) == weights(whole, trial)


def test_no_step_copies_the_memory_between_workers(monkeypatch):
    left_out = []

    class StandIn:
        def __init__(self, module, device_ids):
            pass

        @staticmethod
        def _set_params_and_buffers_to_ignore_for_model(module, names):
            left_out.extend(names)

    monkeypatch.setattr(running, "DistributedDataParallel", StandIn)
    distiller, images, labels = small()
    distiller.connect(images, labels)
    running.share_gradients(distiller, CPU)
    assert {name for name in left_out if name.startswith("loss.")} == {
        f"loss.{name}"
        for name in ("student_memory", "teacher_memory", "log_scale", "labels", "order", "starts")
    }


WORKER = """
import sys
import torch, torch.distributed as dist
from pld_ray.losses import CRDLoss, Features
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
torch.manual_seed(0)
loss = CRDLoss(negatives=39, dim=5)
student, teacher = torch.randn(2, 7, 7)
loss.connect(Features([], student), Features([], teacher))
loss.connect_samples(torch.arange(52) % 4)
index = torch.tensor([3, 17, 8, 21, 39, 0, 50])
own = index[rank::2]
given = torch.cat([own, own[-1:]])[:4]
value = loss.distance(Features([], student[rank::2]), Features([], teacher[rank::2]), given)
torch.save((value.detach(), loss.state_dict()), f"{folder}/{rank}.pt")
"""


def test_the_memory_and_z_of_two_workers_are_those_of_one(tmp_path):
    started = [warm.start(WORKER, tmp_path, rank) for rank in (0, 1)]
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0, 0]
    (first, ours), (second, theirs) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    torch.manual_seed(0)
    loss = CRDLoss(negatives=39, dim=5)  # all samples of other classes: nothing is drawn
    student, teacher = torch.randn(2, 7, 7)
    loss.connect(Features([], student), Features([], teacher))
    loss.connect_samples(torch.arange(52) % 4)
    index = torch.tensor([3, 17, 8, 21, 39, 0, 50])
    value = loss.distance(Features([], student), Features([], teacher), index)
    torch.testing.assert_close((4 * first + 3 * second) / 7, value.detach())
    for name, expected in loss.state_dict().items():
        torch.testing.assert_close(ours[name], expected)


@pytest.mark.parametrize("labels", [torch.zeros(3, 2).long(), torch.zeros(3), 7])
def test_labels_that_are_no_class_indices_are_told(labels):
    with pytest.raises(ValueError, match=r"crd: the labels are .*: expected class indices"):
        CRDLoss().connect_samples(labels)
