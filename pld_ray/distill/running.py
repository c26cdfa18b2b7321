"""What one worker holds while it trains a trial, and how it is made."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pld_ray.config.trial import Trial
from pld_ray.data.images import Images
from pld_ray.data.sampling import Ints, batches, order, random_bits
from pld_ray.data.stream import Stream
from pld_ray.distill.bank import Bank, Ledger, open_banks
from pld_ray.distill.bank_format import uses_bank
from pld_ray.distill.device import Clock, memory_format, pick_precision
from pld_ray.distill.distiller import Distiller
from pld_ray.distill.optimization import MovingAverage, create_optimizer, create_schedule
from pld_ray.distill.steps import Steps
from pld_ray.distill.teacher import Teacher
from pld_ray.losses.registry import create_loss
from pld_ray.models.factory import create_model
from pld_ray.store.store import Store


class TrainingError(RuntimeError):
    """The trial cannot continue, and would fail in the same way if it were tried again."""


@dataclass
class Run:
    """What one worker holds while it trains a trial."""

    trial: Trial
    images: Images
    store: Store
    device: torch.device
    rank: int
    world: int
    clock: Clock
    stream: Stream
    distiller: Distiller
    update: Steps
    teacher: Teacher | None
    bank: Bank | None
    val_bank: Bank | None
    optimizer: torch.optim.Optimizer
    schedule: Any
    steps: int  # updates in an epoch
    ema: MovingAverage | None
    val_index: Ints  # this worker's share of the validation images
    history: list[dict[str, Any]] = field(default_factory=list)
    environments: list[dict[str, Any]] = field(default_factory=list)  # where its epochs ran
    note: str = ""  # a sentence for the record
    teacher_val: list[Tensor] | None = None  # the teacher's logits on the validation batches
    teacher_scores: dict[str, float] = field(default_factory=dict)
    kept_at: float = field(default_factory=time.perf_counter)

    @property
    def best_student(self) -> nn.Module:
        """The network that is evaluated and kept: the moving average if there is one."""
        return self.distiller.student if self.ema is None else self.ema.module


def set_up(
    trial: Trial,
    images: Images,
    store: Store,
    ledger: Ledger | None,
    alive: Callable[[], None],
    device: torch.device,
) -> Run:
    """Make all that a trial needs; the first weights are the same on every worker."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    layout = memory_format(trial.channels_last)
    seed_epoch(trial.seed, epoch=0, rank=0)
    student = create_model(trial.student, *images.shape).to(device).to(memory_format=layout)
    stream = Stream(images, trial.data, trial.seed, device, layout)
    clock = Clock(device, alive)
    teacher = Teacher(trial, images, store, device) if trial.teacher else None
    bank = val_bank = None
    if teacher is not None and uses_bank(trial):
        bank, val_bank = open_banks(teacher, stream, clock, ledger, f"{trial.id}/{rank}")
    distiller = make_distiller(trial, student, teacher if bank is None else None, images)
    distiller.clock = clock
    steps = len(list(batches(order(0, 0, len(images.train)), trial.batch_size, trial.drop_last)))
    optimizer = create_optimizer(trial.optimizer, distiller)
    ema = MovingAverage(student, decay=trial.ema) if trial.ema else None
    module = distiller if world == 1 else share_gradients(distiller, device)
    return Run(
        trial=trial,
        images=images,
        store=store,
        device=device,
        rank=rank,
        world=world,
        clock=clock,
        stream=stream,
        distiller=distiller,
        update=Steps(trial, distiller, module, optimizer, ema, clock),
        teacher=teacher,
        bank=bank,
        val_bank=val_bank,
        optimizer=optimizer,
        schedule=create_schedule(trial.schedule, optimizer, trial.epochs, steps),
        steps=steps,
        ema=ema,
        val_index=order(0, 0, len(images.val))[rank::world],
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
    distiller.connect(next(student.parameters()).new_zeros(1, channels, size, size))
    if trial.compile:
        torch._dynamo.reset()  # it compiles a few networks in a process and runs the rest eagerly
        torch._dynamo.utils.counters.clear()
        distiller.compile_student()
    return distiller


def share_gradients(distiller: Distiller, device: torch.device) -> DistributedDataParallel:
    """The distiller, its gradients averaged over the workers. The frozen teacher is left out."""
    frozen = [name for name in distiller.state_dict() if name.startswith("teacher.")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(distiller, frozen)
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
