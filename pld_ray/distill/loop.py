"""Training one trial, on one worker or many: one function, read top to bottom.

    stream(seed, epoch) -> student, teacher or its bank -> loss -> optimizer        every step
    validation -> metrics -> report, and a checkpoint                               every epoch
    weights, then record                                                            at the end

A trial is a pure function of its spec: weights are drawn from `seed`, every epoch's random numbers
from (seed, epoch, worker). So a trial that was killed goes on from its last checkpoint and ends
with the same bits as one that was not. Epochs under a second share a checkpoint.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pld_ray import __version__
from pld_ray.config.trial import Schedule, Trial
from pld_ray.data.images import Images
from pld_ray.data.sampling import batches, order, random_bits
from pld_ray.data.stream import Stream
from pld_ray.distill import metrics
from pld_ray.distill.bank import open_banks
from pld_ray.distill.bank_format import VAL_BATCH, uses_bank
from pld_ray.distill.device import Clock, memory_format, pick_device, uses_bfloat16
from pld_ray.distill.teacher import Teacher
from pld_ray.losses import DKDLoss, create_loss
from pld_ray.models.factory import create_model
from pld_ray.models.features import WithFeatures, probe_features
from pld_ray.store.store import Store

CHECKPOINT_SECONDS = 1.0  # at the least between two checkpoints: more would be lost time
Report = Callable[[dict[str, Any]], None]


class TrainingError(RuntimeError):
    """The trial cannot go on, and would not if it were tried again."""


def train(
    trial: Trial,
    images: Images,
    store: Store,
    report: Report,
    ledger: Any = None,
    alive: Callable[[], None] = lambda: None,
) -> None:
    """Run a trial to its end, from its last checkpoint if there is one.

    With several workers every one of them calls this with torch.distributed initialised; the
    first writes to the store. `report` is called after every epoch with its metrics, by all.
    ledger: the Ray actor that keeps trials from computing the same teacher logits twice.
    alive: called whenever something has been done: a batch, a forward pass of the teacher.
    Raises TrainingError when the loss is not finite.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device, layout = pick_device(), memory_format(trial)
    torch.backends.cudnn.deterministic = True
    bfloat16 = uses_bfloat16(trial, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)

    _seed(trial.seed, epoch=0, rank=0)  # the first weights are the same on every worker
    student = create_model(trial.student, *images.shape).to(device).to(memory_format=layout)
    stream = Stream(images, trial.data, trial.seed, device, layout)
    clock = Clock(device, alive)
    teacher = Teacher(trial, images, store, device) if trial.teacher else None
    bank = val_bank = None
    if teacher is not None and uses_bank(trial):
        bank, val_bank = open_banks(teacher, stream, clock, ledger, f"{trial.id}/{rank}")
    options: Any = {} if trial.loss.needs_features else {"ignore_index": None}
    loss_function: Any = create_loss(trial.loss, **options)
    network = student
    if teacher is not None and trial.loss.needs_features:
        network = WithFeatures(student)
        shapes = [probe_features(model, *images.shape[1:]) for model in (student, teacher.network)]
        loss_function.connect(*shapes)
        loss_function.to(device)
    optimizer = create_optimizer_v2(student, **_optimizer_arguments(trial))
    learnt = list(loss_function.parameters())  # by the loss itself; no part of the student
    if learnt:
        optimizer.add_param_group({"params": learnt, "weight_decay": trial.optimizer.weight_decay})
    steps = len(list(batches(order(0, 0, len(images.train)), trial.batch_size, trial.drop_last)))
    if steps == 0:
        raise TrainingError(
            f"batch_size is {trial.batch_size} and there are {len(images.train)} training images: "
            "with drop_last that leaves no batch"
        )
    scheduler = _scheduler(trial.schedule, optimizer, trial.epochs, steps)
    ema = ModelEmaV3(student, decay=trial.ema) if trial.ema else None

    parallel, criterion = network, loss_function
    if world > 1:
        devices = [device] if device.type == "cuda" else None
        parallel = DistributedDataParallel(network, device_ids=devices)
        if learnt:
            criterion = DistributedDataParallel(loss_function, device_ids=devices)
    forward = torch.compile(parallel) if trial.compile else parallel
    history: list[dict[str, Any]] = []
    state = store.load_checkpoint(trial)
    if state is None:
        if rank == 0:
            store.start(trial)
    else:
        history = state["history"]
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        loss_function.load_state_dict(state.get("loss", {}))
        if ema is not None:
            ema.load_state_dict(state["ema"])
    val_index = order(0, 0, len(images.val))[rank::world]
    if len(val_index) == 0:
        raise TrainingError("there are fewer validation images than workers")
    teacher_val, teacher_scores = None, {}
    if teacher is not None:
        if val_bank is not None:
            logits = val_bank.read(val_index, 0)[0].to(device)
            teacher_val = list(logits.split(VAL_BATCH))
        else:
            teacher_val = _logits_on_val(teacher, stream, val_index)
        loss_function.notice(torch.cat(teacher_val))
        total = _val_sums(teacher_val, stream, val_index, None)
        teacher_top1 = metrics.averages(_sum_over_workers(total), False)["top1"]
        teacher_scores = {"teacher_top1": teacher_top1}

    def keep() -> None:
        kept = {
            "history": history,
            "student": student.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": ema.state_dict() if ema is not None else {},
            "loss": loss_function.state_dict(),
        }
        store.checkpoint(trial, kept)

    kept_at = time.perf_counter()
    for epoch in range(len(history), trial.epochs):
        started = time.perf_counter()
        _seed(trial.seed, epoch + 1, rank)
        if isinstance(loss_function, DKDLoss):
            loss_function.set_epoch(epoch)
        parallel.train()
        train_loss = torch.zeros((), dtype=torch.float64, device=device)
        seen = 0
        view = trial.view(epoch)
        epoch_order = order(trial.seed, epoch, len(images.train))
        global_batches = list(batches(epoch_order, trial.batch_size, trial.drop_last))
        if len(global_batches[-1]) < world:
            raise TrainingError(
                f"the last batch has {len(global_batches[-1])} samples for {world} workers: "
                "set drop_last: true"
            )
        shares = [batch[rank::world] for batch in global_batches]
        shown = stream.train(shares, view)
        for step, (batch, share) in enumerate(zip(global_batches, shares, strict=True)):
            with clock("data"):
                x, labels = next(shown)
            target: Any = None  # what the teacher says: logits, or features
            ranking = {}
            if bank is not None:
                target, kept_order = bank.read(share, view, trial.loss.needs_order)
                target = target.to(device, non_blocking=True)
                if kept_order is not None:
                    ranking["order"] = kept_order.to(device, non_blocking=True)
            elif teacher is not None:
                with clock("teacher"):
                    target = teacher.features(x) if trial.loss.needs_features else teacher(x)
            scheduler.step_update(epoch * steps + step)
            with clock("student"), autocast:
                outputs = forward(x)
            with clock("loss"):
                if trial.loss.needs_features:
                    logits, features = outputs
                    loss = criterion(logits, labels, features, target)
                else:
                    loss = criterion(outputs.float(), target, labels, **ranking)
                # shares of a ragged batch differ by one: weight them so that the mean of the
                # workers' gradients is the gradient of the mean over the batch
                loss = loss * (len(share) * world / len(batch))
            with clock("student"):
                optimizer.zero_grad()
                loss.backward()
                if trial.clip_grad:
                    nn.utils.clip_grad_norm_([*student.parameters(), *learnt], trial.clip_grad)
                optimizer.step()
                if ema is not None:
                    ema.update(student, step=epoch * steps + step)
            train_loss += loss.detach() * len(batch)
            seen += len(batch)

        train_seconds = time.perf_counter() - started
        loss_mean = _sum_over_workers(train_loss).item() / (world * seen)
        if not math.isfinite(loss_mean):
            raise TrainingError(f"the training loss is {loss_mean} in epoch {epoch + 1}")
        with clock("validation"):
            model = student if ema is None else ema.module
            with autocast:
                val_logits = _logits_on_val(model.eval(), stream, val_index)
            total = _val_sums(val_logits, stream, val_index, teacher_val)
            scores = metrics.averages(_sum_over_workers(total), teacher is not None)
        history.append(
            {
                "epoch": epoch + 1,
                "train_loss": loss_mean,
                **scores,
                **teacher_scores,
                "lr": optimizer.param_groups[0]["lr"],
                "images_per_second": seen / train_seconds,
                "seconds": time.perf_counter() - started,
                "teacher_images": teacher.images_seen if teacher else 0,
                **{f"{part}_seconds": seconds for part, seconds in clock.read().items()},
            }
        )
        if teacher is not None:
            teacher.images_seen = 0
        if rank == 0:
            store.log(trial, history)
        fresh = rank == 0 and time.perf_counter() - kept_at >= CHECKPOINT_SECONDS
        if fresh:
            keep()
            kept_at = time.perf_counter()
        try:
            report({**history[-1], "epochs": trial.epochs})
        except SystemExit:  # so Tune stops a trial, which may go on later
            if rank == 0 and not fresh:
                keep()
            raise

    if rank == 0:
        model = student if ema is None else ema.module
        record = _record(trial, history, student, device) | {"notes": loss_function.notes}
        store.finish(trial, record, model.state_dict())


def _seed(seed: int, epoch: int, rank: int) -> None:
    bits = random_bits(seed, epoch, torch.tensor([rank]).numpy(), "torch")[0]
    torch.manual_seed(int(bits) >> 1)  # torch takes 63 bits


def _optimizer_arguments(trial: Trial) -> dict[str, Any]:
    spec = trial.optimizer
    extra = {} if spec.betas is None else {"betas": spec.betas}
    return {
        "opt": spec.name,
        "lr": spec.lr,
        "weight_decay": spec.weight_decay,
        "momentum": spec.momentum,
        **extra,
        **spec.args,
    }


def _scheduler(spec: Schedule, optimizer: torch.optim.Optimizer, epochs: int, steps: int) -> Any:
    """timm's schedule, a function of the number of updates; "constant" never decays."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="step" if spec.name == "constant" else spec.name,
        num_epochs=epochs,
        decay_epochs=epochs + 1 if spec.name == "constant" else spec.decay_epochs,
        decay_milestones=list(spec.milestones),
        decay_rate=spec.decay_rate,
        min_lr=spec.min_lr,
        warmup_lr=spec.warmup_lr,
        warmup_epochs=spec.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    return scheduler


@torch.no_grad()
def _logits_on_val(model: Callable[[Tensor], Tensor], stream: Stream, index: Any) -> list[Tensor]:
    """Logits [B, C] of each validation batch of this worker."""
    return [model(x).float() for x in stream.val(batches(index, VAL_BATCH, False))]


def _val_sums(
    logits: list[Tensor], stream: Stream, index: Any, teacher_logits: list[Tensor] | None
) -> Tensor:
    """The sums of `metrics.sums` over this worker's validation samples."""
    labels = stream.labels["val"][torch.from_numpy(index).to(stream.device)].split(VAL_BATCH)
    others: Sequence[Tensor | None] = teacher_logits or [None] * len(logits)
    return torch.stack(
        [metrics.sums(*batch) for batch in zip(logits, labels, others, strict=True)]
    ).sum(0)


def _sum_over_workers(value: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def _record(
    trial: Trial, history: list[dict[str, Any]], student: nn.Module, device: torch.device
) -> dict[str, Any]:
    """What a finished trial leaves behind; the metrics are those of its last epoch."""
    import timm

    parts = dict.fromkeys(n for epoch in history for n in epoch if n.endswith("seconds"))
    spent = {*parts, "epoch", "teacher_images"}
    return {
        "id": trial.id,
        "trial": trial.model_dump(mode="json"),
        "metrics": {k: v for k, v in history[-1].items() if k not in spent},
        "best_top1": max(epoch["top1"] for epoch in history),
        "seconds": {name: sum(epoch.get(name, 0.0) for epoch in history) for name in parts},
        "teacher_images": sum(epoch.get("teacher_images", 0) for epoch in history),
        "parameters": sum(p.numel() for p in student.parameters()),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": {
            "pld_ray": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "host": platform.node(),
            "cores": os.cpu_count(),
        },
    }
