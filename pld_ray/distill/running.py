"""What one worker holds while it trains trials, and how it is made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pld_ray import plugins
from pld_ray.config.parts import Data
from pld_ray.config.trial import Trial
from pld_ray.data.images import Images
from pld_ray.data.sampling import batches, order, random_bits
from pld_ray.data.stream import Stream
from pld_ray.distill.bank import Bank, Ledger, open_banks
from pld_ray.distill.bank_format import uses_bank, views
from pld_ray.distill.device import Clock, memory_format, pick_precision
from pld_ray.distill.distiller import Distiller
from pld_ray.distill.optimization import MovingAverage, create_optimizer, create_schedule
from pld_ray.distill.steps import Steps
from pld_ray.distill.teacher import Teacher
from pld_ray.losses.registry import create_loss
from pld_ray.models.factory import create_student
from pld_ray.models.reused import ReusedClassifier
from pld_ray.store.store import Store


class TrainingError(RuntimeError):
    """The trial cannot continue, and would fail in the same way if it were tried again."""


class Shared:
    """What trials that step together share in one worker: images, teachers and banks.

    Args:
        trial: One of the trials. All of them have the same stream (see `config.gangs.stream_key`).
        images: Their dataset.
        store: The store of the trials and banks.
        ledger: Keeps processes from computing the same teacher logits twice.
        alive: Called after every piece of work.
        device: The device of the worker.

    Attributes:
        rank: The number of this worker, from 0.
        world: The number of workers.
        clock: Measures what is done once for all trials.
        stream: The images. All trials see these views of them.
        steps: Updates in an epoch.
        val_index: This worker's share of the validation images.
        validated: The teacher's logits on the validation batches of this worker, and its scores,
            by what they were computed with.
    """

    def __init__(
        self,
        trial: Trial,
        images: Images,
        store: Store,
        ledger: Ledger | None,
        alive: Callable[[], None],
        device: torch.device,
    ) -> None:
        self.rank, self.world = 0, 1
        if dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.images, self.store, self.ledger, self.device = images, store, ledger, device
        self.alive, self.clock = alive, Clock(device, alive)
        layout = memory_format(trial.channels_last)
        self.stream = Stream(images, trial.data, trial.seed, device, layout)
        samples = order(0, 0, len(images.train))
        self.steps = len(list(batches(samples, trial.batch_size, trial.drop_last)))
        self.val_index = order(0, 0, len(images.val))[self.rank :: self.world]
        self.validated: dict[Any, tuple[list[Tensor], dict[str, float]]] = {}
        self._holder = f"{trial.id}/{self.rank}"
        self._teachers: dict[str, Teacher] = {}
        self._streams = {trial.data: self.stream}
        self._banks: dict[tuple[str, str, Data], tuple[Bank, Bank]] = {}

    def teacher(self, trial: Trial) -> Teacher | None:
        """Return the teacher of a trial, or None if it has none."""
        if trial.teacher is None:
            return None
        name = trial.teacher.model_dump_json()
        if name not in self._teachers:
            self._teachers[name] = Teacher(trial, self.images, self.store, self.device)
        return self._teachers[name]

    def streams(self, trial: Trial) -> tuple[Stream, ...]:
        """Return the images of each view that a trial takes."""
        for each in trial.each_view:
            if each.data not in self._streams:
                self._streams[each.data] = self.stream.with_data(each.data)
        return tuple(self._streams[each.data] for each in trial.each_view)

    def banks(self, trial: Trial) -> tuple[tuple[Bank, ...], Bank | None]:
        """Return the banks that a trial reads, if it does: of each view, and of validation images.

        The first ones are in the order of its streams.
        """
        teacher = self.teacher(trial)
        if teacher is None or not uses_bank(trial):
            return (), None
        assert trial.teacher is not None
        found = []
        for each, stream in zip(trial.each_view, self.streams(trial), strict=True):
            key = trial.teacher.model_dump_json(), trial.teacher_logits, each.data
            if key not in self._banks:
                given = teacher, each, stream, self.clock, self.ledger, self._holder
                self._banks[key] = open_banks(*given)
            train = self._banks[key][0]
            train.views = max(train.views, views(each))
            found.append(self._banks[key])
        return tuple(train for train, _ in found), found[0][1]


@dataclass(eq=False)  # a run is itself only
class Run:
    """What one worker holds of one trial while it trains it."""

    trial: Trial
    shared: Shared
    clock: Clock
    distiller: Distiller
    update: Steps
    teacher: Teacher | None
    streams: tuple[Stream, ...]  # the images of each view
    banks: tuple[Bank, ...]  # the teacher's logits of each view, if they are stored
    val_bank: Bank | None
    optimizer: torch.optim.Optimizer
    schedule: Any
    ema: MovingAverage | None
    history: list[dict[str, Any]] = field(default_factory=list)  # one entry for each epoch
    environments: list[dict[str, Any]] = field(default_factory=list)  # where its epochs ran
    note: str = ""  # a sentence for the record
    teacher_val: list[Tensor] | None = None  # the teacher's logits on the validation batches
    teacher_scores: dict[str, float] = field(default_factory=dict)
    stepped: bool = False  # whether it has done its first step in this process
    kept: int = 0  # epochs in the last checkpoint
    kept_at: float = field(default_factory=time.perf_counter)
    losses: list[Tensor] = field(default_factory=list)  # of the epoch; they stay on the device
    val_sums: list[Tensor] = field(default_factory=list)  # of the validation batches
    own_sums: list[Tensor] = field(default_factory=list)  # the same, of metrics from plug-ins
    random: list[Tensor] = field(default_factory=list)  # the state of its generators

    @property
    def best_student(self) -> nn.Module:
        """The network that is evaluated and kept: the moving average if there is one."""
        return self.distiller.student if self.ema is None else self.ema.module

    @property
    def own_code(self) -> bool:
        """Whether its student or loss is code of a plug-in, which may change what it is given."""
        names = {("network", self.trial.student.name), ("loss", self.trial.loss.name)}
        return bool(plugins.used(names))

    @property
    def live_teacher(self) -> Teacher | None:
        """The teacher if its network runs in every step, else None."""
        return self.teacher if self.distiller.teacher is not None else None

    def begin(self, epoch: int) -> None:
        """Prepare an epoch (from 0): its random numbers, the loss, and the mode of the modules."""
        seed_epoch(self.trial.seed, epoch + 1, self.shared.rank)
        self.distiller.set_epoch(epoch)
        self.distiller.train()
        self.losses = []
        self.random = _random_state(self.shared.device)

    @contextmanager
    def own_random(self) -> Iterator[None]:
        """Draw random numbers as if this were the only trial of the process."""
        torch.set_rng_state(self.random[0])
        if len(self.random) > 1:
            torch.cuda.set_rng_state(self.random[1])
        yield
        self.random = _random_state(self.shared.device)


def _random_state(device: torch.device) -> list[Tensor]:
    """Return the state of the generators that a training step draws from."""
    state = [torch.get_rng_state()]
    return [*state, torch.cuda.get_rng_state()] if device.type == "cuda" else state


def set_up(trial: Trial, shared: Shared) -> Run:
    """Make all that a trial needs; the first weights are the same on every worker."""
    device = shared.device
    seed_epoch(trial.seed, epoch=0, rank=0)
    student = create_student(trial, *shared.images.shape)
    clock = Clock(device, shared.alive)
    teacher = shared.teacher(trial)
    if isinstance(student, ReusedClassifier) and teacher is not None:
        student.copy_classifier(teacher.network)
    student = student.to(device).to(memory_format=memory_format(trial.channels_last))
    banks, val_bank = shared.banks(trial)
    distiller = make_distiller(trial, student, None if banks else teacher, shared.images)
    distiller.clock = clock
    optimizer = create_optimizer(trial.optimizer, distiller)
    ema = MovingAverage(student, decay=trial.ema) if trial.ema else None
    module = distiller if shared.world == 1 else share_gradients(distiller, device)
    return Run(
        trial=trial,
        shared=shared,
        clock=clock,
        distiller=distiller,
        update=Steps(trial, distiller, module, optimizer, ema, clock),
        teacher=teacher,
        streams=shared.streams(trial),
        banks=banks,
        val_bank=val_bank,
        optimizer=optimizer,
        schedule=create_schedule(trial.schedule, optimizer, trial.epochs, shared.steps),
        ema=ema,
    )


def make_distiller(
    trial: Trial, student: nn.Module, teacher: Teacher | None, images: Images
) -> Distiller:
    """The core of the trial's step. teacher: None if its logits come from the bank."""
    options: Any = {} if trial.loss.needs_features else {"ignore_index": None}
    distiller = Distiller(
        student,
        None if teacher is None else teacher.module,
        create_loss(trial.loss, **options),
        precision=pick_precision(trial.precision, next(student.parameters()).device),
    )
    _, channels, size = images.shape
    one = next(student.parameters()).new_zeros(1, channels, size, size)
    distiller.connect(one, torch.tensor(images.train_labels))
    if trial.compile:
        torch._dynamo.reset()  # it compiles a few networks in a process and runs the rest eagerly
        torch._dynamo.utils.counters.clear()
        distiller.compile_student()
    return distiller


def share_gradients(distiller: Distiller, device: torch.device) -> DistributedDataParallel:
    """The distiller, its gradients averaged over the workers.

    The frozen teacher is left out, and so is a memory of the training samples: the loss keeps it
    the same on all workers, and DistributedDataParallel would copy all of it in each step.
    """
    left_out = [name for name in distiller.state_dict() if name.startswith("teacher.")]
    if distiller.takes_samples:
        left_out += [f"loss.{name}" for name, _ in distiller.loss.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(distiller, left_out)
    return DistributedDataParallel(
        distiller, device_ids=[device] if device.type == "cuda" else None
    )


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Seed torch for an epoch of one worker; epoch 0 is the set-up."""
    bits = random_bits(seed, epoch, torch.tensor([rank]).numpy(), "torch")[0]
    torch.manual_seed(int(bits) >> 1)  # torch takes 63 bits


def sum_over_workers(value: Tensor) -> Tensor:
    """The sum over all workers, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value
