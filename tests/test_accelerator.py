"""What an accelerator asks for, as far as it can be shown without one.

Tensors on the meta device have no values: what would make the host wait for a value fails there,
and a copy between the host and the device can be counted.
"""

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import timm
import torch
from small import SMALL, cells, run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from pld_ray import losses, reuse_classifier
from pld_ray.config.parts import Data
from pld_ray.config.planning import plan
from pld_ray.data import stream
from pld_ray.data.datasets import load
from pld_ray.data.images import Images
from pld_ray.data.sampling import batches, order
from pld_ray.distill import keeping, loop
from pld_ray.distill.device import Clock, pick_precision
from pld_ray.distill.distiller import Distiller
from pld_ray.distill.loop import train
from pld_ray.losses.registry import REGISTRY
from pld_ray.store.store import Store

CPU = torch.device("cpu")


class Transfers(TorchDispatchMode):
    """Lists the operations between a tensor of the host and one of another device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        flat = tree_flatten((args, kwargs, result))[0]
        # a number in a tensor without dimensions is passed to a kernel and is not copied
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.dim() or x.device.type != "cpu"}
        if len(devices) > 1:
            self.found.append(str(function))
        return result


def shipped_losses():
    return sorted(name for name, params in REGISTRY.items() if params.source.startswith("pld_ray"))


@pytest.mark.parametrize("name", [*shipped_losses(), "pld with top_k"])
def test_a_step_makes_no_host_wait_and_copies_nothing(monkeypatch, name):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # not for this device
    name, *chosen = name.split(" with ")
    loss = losses.create_loss(name, **{option: "auto" for option in chosen})
    with torch.device("meta"):
        student, teacher = (timm.create_model(n, num_classes=1100) for n in ("resnet8", "resnet20"))
        images, labels = torch.randn(8, 3, 32, 32), torch.zeros(8, dtype=torch.int64)
        if name == "simkd":
            student = reuse_classifier(student, teacher, images)
            # tensors of this device have no values to compare
            monkeypatch.setattr(type(student), "has_classifier_of", lambda *_: True)
    distiller = Distiller(student, teacher, loss)
    distiller.connect(images, torch.arange(40) % 4)
    distiller.loss.notice(torch.randn(8, 1100))  # as before the first epoch of a trial
    parameters = [*student.parameters(), *distiller.learnt_by_loss()]
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9)
    distiller.train()
    for _ in range(2):  # what the first step keeps, the second uses
        with Transfers() as transfers:
            loss = distiller(images, labels, index=labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert transfers.found == []


def made_up(count):
    dice = np.random.default_rng(0)
    pixels = dice.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    labels = dice.integers(0, 4, count)
    return Images(pixels, labels, pixels[:9], labels[:9], 4, (0.5,) * 3, (0.2,) * 3)


@pytest.mark.parametrize("pad", [0, 2])
def test_an_epoch_from_the_memory_of_the_device_is_that_from_the_host(monkeypatch, pad):
    images, data = made_up(37), Data(name="digits", pad=pad, flip=True)
    shares = list(batches(order(3, 5, 37), 8, False))

    def epoch():
        shown = stream.Stream(images, data, 3, CPU)
        return [*shown.train(shares, 5)], [*shown.val([np.arange(9)])]

    host = epoch()
    monkeypatch.setattr(stream, "free_memory", lambda device: 1e9)
    device = epoch()
    for one, other in zip(host[0], device[0], strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert torch.equal(host[1][0], device[1][0])


def test_the_number_of_copies_of_an_epoch_does_not_depend_on_its_steps(monkeypatch):
    images, copies = made_up(64), []

    def counted(x, device):
        copies.append(x)
        return x

    monkeypatch.setattr(stream, "free_memory", lambda device: 1e9)
    monkeypatch.setattr(stream, "upload", counted)
    shown = stream.Stream(images, Data(name="digits", pad=1, flip=True), 0, CPU)
    counts = []
    for size in (32, 4):
        copies.clear()
        assert len([*shown.train(batches(order(0, 0, 64), size, False), 0)]) == 64 // size
        counts.append(len(copies))
    assert counts == [5, 5]  # order, labels' order, top, left, mirroring


def test_images_that_do_not_fit_stay_on_the_host(monkeypatch):
    images = made_up(64)
    monkeypatch.setattr(stream, "free_memory", lambda device: 4 * images.train.nbytes - 1)
    kept = stream.Stream(images, Data(name="digits"), 0, CPU).on_device
    assert kept.keys() == {"val"}


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def testfree_memory_is_what_the_share_of_the_process_leaves(monkeypatch, name):
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_getMemoryFraction", lambda number: 0.25, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (70, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda number: 5)
    assert stream.free_memory(torch.device(name)) == 0.25 * 80 - 5


@pytest.mark.parametrize(
    ("precision", "kind", "has", "expected"),
    [
        ("auto", "cuda", True, "bfloat16"),
        ("auto", "cuda", False, "float32"),
        ("auto", "cpu", True, "float32"),
        ("bfloat16", "cpu", False, "bfloat16"),
        ("float32", "cuda", True, "float32"),
    ],
)
def test_bfloat16_is_chosen_where_the_card_has_it(monkeypatch, precision, kind, has, expected):
    def supported(including_emulation):
        return has or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert pick_precision(precision, torch.device(kind)) == expected


def test_each_of_many_networks_in_a_process_is_compiled(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # not to C++
    text = "base: {data: {name: digits, limit: 40}, student: resnet8, epochs: 1, compile: true}\n"
    made = plan(experiment(f"{text}grid: {{loss: [ce]}}\nseeds: {[*range(10)]}\n"))
    store = Store(tmp_path)
    for trial in made.trials.values():
        train(trial, load(trial.data), store, lambda metrics: None)
    records = store.records(made.trials).values()
    assert [record["environment"]["compiled"] for record in records] == [True] * 10


class Events:
    """Events of a device whose clock the test sets."""

    now = 0.0

    def __init__(self, enable_timing, external):
        self.at = 0.0

    def record(self):
        self.at = Events.now

    def elapsed_time(self, end):
        return 1000 * (end.at - self.at)


@pytest.mark.parametrize("steps", [3, 16, 17, 391])
def test_the_clock_of_an_epoch_on_cuda(monkeypatch, steps):
    monkeypatch.setattr(torch.cuda, "Event", Events)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = Clock(torch.device("cuda"))
    for number in range(steps):
        clock.step(number, steps)
        with clock("data"):
            Events.now += 2.0 if number == 0 else 0.001  # the first one starts the workers
        for part in (0.01, 0.03):  # forward, then backward
            with clock("student"):
                Events.now += part
    found = clock.read()
    assert found["data"] == pytest.approx(2 + 0.001 * (steps - 1))
    assert found["student"] == pytest.approx(0.04 * steps)
    assert len(clock.events) == 0 and clock.read() == {}


def test_an_operation_without_a_deterministic_form_is_used_and_noted(
    monkeypatch, tmp_path, experiment
):
    said = (
        "upsample_backward does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'. You can turn off determinism."
    )
    chosen, epoch = [], loop.train_epoch

    def choose(device, strict=True):
        chosen.append(strict)

    def refused(gang, runs, number):
        if number == 1 and chosen[-1]:
            raise RuntimeError(said)
        return epoch(gang, runs, number)

    trial = cells(experiment, "student=resnet8", "epochs=2")[0]
    expected = run(trial, Store(tmp_path / "plain"))
    monkeypatch.setattr(
        loop, "use_deterministic", lambda device, strict=True: chosen.append(strict)
    )
    monkeypatch.setattr(loop, "train_epoch", refused)
    record = run(trial, Store(tmp_path / "refused"))
    assert chosen[-2:] == [True, False]
    assert record["weights_sha256"] == expected["weights_sha256"]
    assert record["notes"][-1] == (
        "another run may differ in its last bits: upsample_backward does not have a deterministic "
        "implementation"
    )
    assert expected["environment"]["deterministic"]


@pytest.mark.parametrize("error", [ValueError("deterministic"), RuntimeError("shapes differ")])
def test_other_errors_end_the_trial(monkeypatch, tmp_path, experiment, error):
    def refused(gang, runs, number):
        raise error

    monkeypatch.setattr(loop, "train_epoch", refused)
    with pytest.raises(type(error), match=str(error)):
        run(cells(experiment)[0], Store(tmp_path))


FEATURES = [name for name, params in REGISTRY.items() if params.needs_features]


@pytest.mark.parametrize("loss", FEATURES)
def test_losses_on_features_train_with_a_teacher_in_bfloat16(tmp_path, experiment, loss):
    settings = (f"grid.loss=[{loss}]", "precision=bfloat16", "epochs=1")
    record = run(plan(experiment(SMALL, *settings)).cells[0].trial, Store(tmp_path))
    assert record["environment"]["precision"] == "bfloat16"


def test_a_checkpoint_that_says_less_of_where_it_ran_is_resumed():
    before = {"from_epoch": 1, "device": "cpu", "precision": "float32", "tf32": False}
    before |= {"torch": "2.15", "cudnn": None}
    after = before | {"from_epoch": 3, "deterministic": True}
    assert keeping.change_notes([before, after]) == [
        "resumed in epoch 3 with deterministic None before and True from then on"
    ]
