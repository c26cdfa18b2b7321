"""The training loop of one trial, on one worker or many.

    set up -> resume -> [train an epoch -> evaluate -> keep -> report] ... -> record

A trial is a pure function of its spec: the first weights are drawn from its seed, and the random
numbers of an epoch from (seed, epoch, worker). A trial that was killed continues from its last
checkpoint and ends with the same bits as one that was not. Checkpoints are at least one second
apart, so short epochs share one.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pld_ray import __version__
from pld_ray.config.trial import Trial
from pld_ray.data.datasets import describe
from pld_ray.data.images import Images
from pld_ray.data.sampling import Ints, batches, order, random_bits
from pld_ray.data.stream import Stream
from pld_ray.distill import metrics
from pld_ray.distill.bank import Bank, Ledger, open_banks
from pld_ray.distill.bank_format import VAL_BATCH, uses_bank
from pld_ray.distill.device import Clock, autocast, memory_format, pick_device, pick_precision
from pld_ray.distill.distiller import Distiller
from pld_ray.distill.optimization import create_optimizer, create_schedule, update
from pld_ray.distill.teacher import Teacher
from pld_ray.losses.registry import create_loss
from pld_ray.models.factory import create_model
from pld_ray.store.store import Store

CHECKPOINT_SECONDS = 1.0  # the least time between two checkpoints
Report = Callable[[dict[str, Any]], None]


class TrainingError(RuntimeError):
    """The trial cannot continue, and would fail in the same way if it were tried again."""


def train(
    trial: Trial,
    images: Images,
    store: Store,
    report: Report,
    ledger: Ledger | None = None,
    alive: Callable[[], None] = lambda: None,
    device: torch.device | None = None,
) -> None:
    """Run a trial to its end, from its last checkpoint if there is one.

    With several workers, each of them calls this with torch.distributed initialised. The first one
    writes to the store.

    Args:
        trial: The trial, fully specified.
        images: Its dataset.
        store: Receives checkpoints, the epoch log, the weights and the record.
        report: Called after every epoch with its metrics, by all workers.
        ledger: Keeps trials from computing the same teacher logits twice.
        alive: Called after every piece of work: a batch, or a forward pass of the teacher.
        device: Default: the CUDA device if there is one, else the CPU.

    Raises:
        TrainingError: The loss, a weight or a logit of the teacher is not finite.
    """
    run = set_up(trial, images, store, ledger, alive, device or pick_device())
    resume(run)
    evaluate_teacher(run)
    for epoch in range(len(run.history), trial.epochs):
        started = time.perf_counter()
        train_loss, seen = train_epoch(run, epoch)
        train_seconds = time.perf_counter() - started
        share_buffers(run)
        scores = evaluate_student(run)
        run.history.append(
            {
                "epoch": epoch + 1,
                "train_loss": train_loss,
                **scores,
                **run.teacher_scores,
                "lr": run.optimizer.param_groups[0]["lr"],
                "images_per_second": seen / train_seconds,
                "seconds": time.perf_counter() - started,
                "teacher_images": run.teacher.take_images_seen() if run.teacher else 0,
                **{f"{part}_seconds": seconds for part, seconds in run.clock.read().items()},
            }
        )
        keep_and_report(run, report)
    if run.rank == 0:
        store.finish(trial, make_record(run), run.best_student.state_dict())


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
    step: Callable[..., Tensor]  # the distiller, in DistributedDataParallel if there are others
    teacher: Teacher | None
    bank: Bank | None
    val_bank: Bank | None
    optimizer: torch.optim.Optimizer
    schedule: Any
    steps: int  # updates in an epoch
    ema: ModelEmaV3 | None
    val_index: Ints  # this worker's share of the validation images
    history: list[dict[str, Any]] = field(default_factory=list)
    teacher_val: list[Tensor] | None = None  # the teacher's logits on the validation batches
    teacher_scores: dict[str, float] = field(default_factory=dict)
    kept_at: float = field(default_factory=time.perf_counter)

    @property
    def best_student(self) -> nn.Module:
        """The network that is evaluated and kept: the moving average if there is one."""
        return self.distiller.student if self.ema is None else self.ema.module


# ---------------------------------------------------------------- before the first epoch


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
    torch.backends.cudnn.deterministic = True
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
        step=distiller if world == 1 else share_gradients(distiller, device),
        teacher=teacher,
        bank=bank,
        val_bank=val_bank,
        optimizer=optimizer,
        schedule=create_schedule(trial.schedule, optimizer, trial.epochs, steps),
        steps=steps,
        ema=ModelEmaV3(student, decay=trial.ema) if trial.ema else None,
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
        distiller.compile_student()
    return distiller


def share_gradients(distiller: Distiller, device: torch.device) -> DistributedDataParallel:
    """The distiller, its gradients averaged over the workers. The frozen teacher is left out."""
    frozen = [name for name in distiller.state_dict() if name.startswith("teacher.")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(distiller, frozen)
    return DistributedDataParallel(
        distiller, device_ids=[device] if device.type == "cuda" else None
    )


def resume(run: Run) -> None:
    """Continue from the last checkpoint, or say in the store that the trial has begun."""
    state = run.store.load_checkpoint(run.trial)
    if state is None:
        if run.rank == 0:
            run.store.start(run.trial)
        return
    run.history = state["history"]
    run.distiller.student.load_state_dict(state["student"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.distiller.loss.load_state_dict(state["loss"])
    if run.ema is not None:
        run.ema.load_state_dict(state["ema"])


def evaluate_teacher(run: Run) -> None:
    """Keep the teacher's logits on the validation images, and its top-1."""
    if run.teacher is None:
        return
    if run.val_bank is not None:
        logits = run.val_bank.read(run.val_index, 0)[0].to(run.device)
        run.teacher_val = list(logits.split(VAL_BATCH))
    else:
        run.teacher_val = validation_logits(run, run.teacher)
    logits = torch.cat(run.teacher_val)
    if sum_over_workers((~logits.isfinite()).sum()).item():
        raise TrainingError(f"the logits of the teacher {run.trial.teacher_name} are not finite")
    run.distiller.loss.notice(logits)
    total = sum_over_workers(validation_sums(run, run.teacher_val, None))
    run.teacher_scores = {"teacher_top1": metrics.averages(total, False)["top1"]}


# ---------------------------------------------------------------- an epoch


def train_epoch(run: Run, epoch: int) -> tuple[float, int]:
    """Train on every batch of an epoch (from 0).

    Returns:
        The mean loss over the samples, and the number of samples.
    """
    trial = run.trial
    seed_epoch(trial.seed, epoch + 1, run.rank)
    run.distiller.set_epoch(epoch)
    run.distiller.train()
    losses: list[Tensor] = []  # they stay on the device, since reading one would wait for it
    view = trial.view(epoch)
    samples = order(trial.seed, epoch, len(run.images.train))
    global_batches = list(batches(samples, trial.batch_size, trial.drop_last))
    shares = [batch[run.rank :: run.world] for batch in global_batches]
    shown = run.stream.train(shares, view)
    for number, (batch, share) in enumerate(zip(global_batches, shares, strict=True)):
        with run.clock("data"):
            x, labels = next(shown)
        target, ranking = read_bank(run, share, view)
        step = epoch * run.steps + number
        run.schedule.step_update(step)
        loss = run.step(x, labels, teacher_logits=target, order=ranking)
        # The shares of a ragged batch differ by one sample. With these weights the mean of the
        # workers' gradients is the gradient of the mean over the batch.
        loss = loss * (len(share) * run.world / len(batch))
        with run.clock("student"):
            update(loss, run.distiller, run.optimizer, step, trial.clip_grad, run.ema)
        losses.append(loss.detach())
    sizes = torch.tensor([len(batch) for batch in global_batches], dtype=torch.float64)
    means = sum_over_workers(torch.stack(losses).double()).cpu() / run.world
    check_finite(run, epoch, means)
    return float((means * sizes).sum() / sizes.sum()), int(sizes.sum())


def share_buffers(run: Run) -> None:
    """Give all workers the buffers of the first one, such as the running means of batch norm.

    Each worker updates them with its own share of the batches. The first one's are kept, so that
    they must be those that are evaluated, and those with which all workers go on.
    """
    if run.world > 1:
        for network in (run.distiller.student, run.distiller.loss, run.ema):
            for buffer in network.buffers() if network is not None else ():
                dist.broadcast(buffer, 0)


def check_finite(run: Run, epoch: int, losses: Tensor) -> None:
    """Raise TrainingError if a loss [steps] of an epoch, or a weight after it, is not finite."""
    wrong = losses.isfinite().logical_not().nonzero()
    if len(wrong):
        step = int(wrong[0])
        raise TrainingError(
            f"the training loss is {losses[step]:g} in step {step + 1} of epoch {epoch + 1}: a "
            "lower optimizer.lr or clip_grad may help"
        )
    finite = torch.stack([p.isfinite().all() for p in run.best_student.parameters()])
    if not finite.all():
        raise TrainingError(
            f"the student's weights are not finite after step {len(losses)}, the last of epoch "
            f"{epoch + 1}: a lower optimizer.lr or clip_grad may help"
        )


def read_bank(run: Run, share: Ints, view: int) -> tuple[Tensor | None, Tensor | None]:
    """The teacher's stored logits [B, C] of some samples, and their order where it is kept."""
    if run.bank is None:
        return None, None
    logits, ranking = run.bank.read(share, view, run.trial.loss.needs_order)
    if ranking is not None:
        ranking = ranking.to(run.device, non_blocking=True)
    return logits.to(run.device, non_blocking=True), ranking


def evaluate_student(run: Run) -> dict[str, float]:
    """Metrics on the validation images of all workers."""
    with run.clock("validation"):
        student = run.best_student.eval()
        with autocast(run.device, run.distiller.precision):
            logits = validation_logits(run, student)
        total = sum_over_workers(validation_sums(run, logits, run.teacher_val))
        scores = metrics.averages(total, run.teacher is not None)
        scores |= own_metrics(run, logits)
    if not math.isfinite(scores["val_loss"]):
        raise TrainingError(
            f"the validation loss is {scores['val_loss']:g} after epoch {len(run.history) + 1}: a "
            "lower optimizer.lr or clip_grad may help"
        )
    return scores


def own_metrics(run: Run, logits: list[Tensor]) -> dict[str, float]:
    """The trial's own metrics on the validation images of all workers."""
    names, labels = run.trial.metrics, validation_labels(run)
    if not names:
        return {}
    others: Sequence[Tensor | None] = run.teacher_val or [None] * len(logits)
    parts = [metrics.own_sums(names, *batch) for batch in zip(logits, labels, others, strict=True)]
    means = sum_over_workers(torch.stack(parts).sum(0)) / len(run.images.val)
    for name, mean in zip(names, means.tolist(), strict=True):
        if not math.isfinite(mean):
            epoch = len(run.history) + 1
            raise TrainingError(f"the metric {name} is {mean:g} after epoch {epoch}")
    return dict(zip(names, means.tolist(), strict=True))


def keep_and_report(run: Run, report: Report) -> None:
    """Write the epoch log and, once a second, a checkpoint; then report the epoch."""
    if run.rank == 0:
        run.store.log(run.trial, run.history)
    fresh = run.rank == 0 and time.perf_counter() - run.kept_at >= CHECKPOINT_SECONDS
    if fresh:
        keep_checkpoint(run)
        run.kept_at = time.perf_counter()
    try:
        report({**run.history[-1], "epochs": run.trial.epochs})
    except SystemExit:  # Tune stops a trial in this way; the trial may continue later
        if run.rank == 0 and not fresh:
            keep_checkpoint(run)
        raise


def keep_checkpoint(run: Run) -> None:
    """Write all that is needed to continue after this epoch."""
    state = {
        "history": run.history,
        "student": run.distiller.student.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "ema": run.ema.state_dict() if run.ema is not None else {},
        "loss": run.distiller.loss.state_dict(),
    }
    run.store.checkpoint(run.trial, state)


# ---------------------------------------------------------------- parts of the above


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Seed torch for an epoch of one worker; epoch 0 is the set-up."""
    bits = random_bits(seed, epoch, torch.tensor([rank]).numpy(), "torch")[0]
    torch.manual_seed(int(bits) >> 1)  # torch takes 63 bits


@torch.no_grad()
def validation_logits(run: Run, network: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Logits [B, C] of each validation batch of this worker."""
    shares = batches(run.val_index, VAL_BATCH, False)
    return [network(x).float() for x in run.stream.val(shares)]


def validation_labels(run: Run) -> Sequence[Tensor]:
    """The labels [B] of each validation batch of this worker."""
    index = torch.from_numpy(run.val_index).to(run.device)
    return run.stream.labels["val"][index].split(VAL_BATCH)


def validation_sums(run: Run, logits: list[Tensor], teacher: list[Tensor] | None) -> Tensor:
    """The sums of `metrics.sums` over this worker's validation samples."""
    labels = validation_labels(run)
    others: Sequence[Tensor | None] = teacher or [None] * len(logits)
    parts = [metrics.sums(*batch) for batch in zip(logits, labels, others, strict=True)]
    return torch.stack(parts).sum(0)


def sum_over_workers(value: Tensor) -> Tensor:
    """The sum over all workers, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def make_record(run: Run) -> dict[str, Any]:
    """What a finished trial leaves behind; the metrics are those of its last epoch."""
    import timm

    history = run.history
    parts = dict.fromkeys(n for epoch in history for n in epoch if n.endswith("seconds"))
    spent = {*parts, "epoch", "teacher_images"}
    cuda = run.device.type == "cuda"
    return {
        "id": run.trial.id,
        "trial": run.trial.model_dump(mode="json"),
        "metrics": {k: v for k, v in history[-1].items() if k not in spent},
        "data": describe(run.trial.data, run.images),
        "best_top1": max(epoch["top1"] for epoch in history),
        "seconds": {name: sum(epoch.get(name, 0.0) for epoch in history) for name in parts},
        "teacher_images": sum(epoch.get("teacher_images", 0) for epoch in history),
        "parameters": sum(p.numel() for p in run.distiller.student.parameters()),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": {
            "pld_ray": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "precision": run.distiller.precision,
            "threads": torch.get_num_threads(),
            "host": platform.node(),
            "cores": os.cpu_count(),
        },
        "notes": run.distiller.loss.notes,
    }
