"""The training loop of one trial, on one worker or many.

    set up -> resume -> [train an epoch -> evaluate -> keep -> report] ... -> record

A trial is a pure function of its spec: the first weights are drawn from its seed, and the random
numbers of an epoch from (seed, epoch, worker). A trial that was killed continues from its last
checkpoint and ends with the same bits as one that was not. Checkpoints are at least one second
apart, so short epochs share one.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pld_ray import __version__
from pld_ray.config.trial import Trial
from pld_ray.data.datasets import describe
from pld_ray.data.images import Images
from pld_ray.data.sampling import Ints, batches, order
from pld_ray.data.stream import upload
from pld_ray.distill.bank import Ledger
from pld_ray.distill.device import (
    lacks_deterministic,
    pick_device,
    release_memory,
    use_deterministic,
)
from pld_ray.distill.evaluation import evaluate_student, evaluate_teacher
from pld_ray.distill.optimization import load_optimizer
from pld_ray.distill.running import Run, TrainingError, seed_epoch, set_up, sum_over_workers
from pld_ray.store.store import Store

CHECKPOINT_SECONDS = 1.0  # the least time between two checkpoints
ON_DEVICE = 2**28
"""Bytes of the teacher's logits of a view that are copied to the device at once."""
Report = Callable[[dict[str, Any]], None]


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
    device = device or pick_device()
    use_deterministic(device)
    try:
        finish(set_up(trial, images, store, ledger, alive, device), report)
        return
    except RuntimeError as error:
        lacking = lacks_deterministic(error)
        if lacking is None:
            raise
    release_memory()  # of the first attempt
    use_deterministic(device, strict=False)
    run = set_up(trial, images, store, ledger, alive, device)
    run.note = f"another run may differ in its last bits: {lacking}"
    finish(run, report)


def finish(run: Run, report: Report) -> None:
    """Train all epochs that are left, and write the record; see `train`."""
    trial = run.trial
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
        run.store.finish(trial, make_record(run), run.best_student.state_dict())


def resume(run: Run) -> None:
    """Continue from the last checkpoint, or say in the store that the trial has begun."""
    state = run.store.load_checkpoint(run.trial)
    if state is None:
        run.environments = [environment(run)]
        if run.rank == 0:
            run.store.start(run.trial)
        return
    run.history, run.environments = state["history"], state["environments"]
    if (now := environment(run)) != run.environments[-1] | {"from_epoch": now["from_epoch"]}:
        run.environments.append(now)
    run.distiller.student.load_state_dict(state["student"])
    load_optimizer(run.optimizer, state["optimizer"])
    run.distiller.loss.load_state_dict(state["loss"])
    if run.ema is not None:
        run.ema.load_state_dict(state["ema"])


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
    prepared = run.stream.batches(shares, view)
    targets = teacher_targets(run, shares, view)
    for number, (batch, share) in enumerate(zip(global_batches, shares, strict=True)):
        run.clock.step(number, run.steps, each=run.update.graphs is not None)
        with run.clock("data"):
            ours = next(prepared)
        step = epoch * run.steps + number
        run.schedule.step_update(step)
        # The shares of a ragged batch differ by one sample. With these weights the mean of the
        # workers' gradients is the gradient of the mean over the batch.
        weight = len(share) * run.world / len(batch)
        losses.append(run.update(ours, *next(targets), weight, step))
    sizes = torch.tensor([len(batch) for batch in global_batches], dtype=torch.float64)
    means = sum_over_workers(torch.stack(losses).double()).cpu() / run.world
    check_finite(run, epoch, means)
    return float((means * sizes).sum() / sizes.sum()), int(sizes.sum())


def teacher_targets(
    run: Run, shares: list[Ints], view: int
) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Yield the stored logits of the teacher for each batch, and their order where it is kept.

    On an accelerator, those of the whole view are copied at once, so that no step waits for a copy.

    Args:
        run: The run.
        shares: The indices of samples of each batch, [B]: this worker's share of the batch.
        view: The view of the images.

    Yields:
        Logits, float32 [B, C], and the order [B, C]; None for what is not stored.
    """
    if run.bank is None:
        yield from ((None, None) for _ in shares)
        return
    size = 4 * len(run.images.train) * run.images.classes
    whole = run.device.type != "cpu" and size <= ON_DEVICE
    for part in [shares] if whole else [[share] for share in shares]:
        found = run.bank.read(np.concatenate(part), view, run.trial.loss.needs_order)
        logits, ranking = (None if x is None else upload(x, run.device) for x in found)
        lengths = [len(share) for share in part]
        assert logits is not None
        rankings = [None] * len(part) if ranking is None else ranking.split(lengths)
        yield from zip(logits.split(lengths), rankings, strict=True)


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
        "environments": run.environments,
        "student": run.distiller.student.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "ema": run.ema.state_dict() if run.ema is not None else {},
        "loss": run.distiller.loss.state_dict(),
    }
    run.store.checkpoint(run.trial, state)


def environment(run: Run) -> dict[str, Any]:
    """Return what the bits of an epoch depend on beside the trial, from the next epoch on."""
    cuda = run.device.type == "cuda"
    return {
        "from_epoch": len(run.history) + 1,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "precision": run.distiller.precision,
        "tf32": cuda and torch.backends.cudnn.allow_tf32,
        "torch": str(torch.__version__),
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "deterministic": not (cuda and torch.is_deterministic_algorithms_warn_only_enabled()),
    }


def change_notes(environments: list[dict[str, Any]]) -> list[str]:
    """Return sentences about a trial whose epochs did not all run in the same way."""
    notes = []
    for before, after in pairwise(environments):
        changed = [
            f"{name} {before.get(name)} before and {after.get(name)} from then on"
            for name in ("device", "precision", "tf32", "torch", "cudnn", "deterministic")
            if before.get(name) != after.get(name)
        ]
        notes.append(f"resumed in epoch {after['from_epoch']} with {', '.join(changed)}")
    return notes


def was_compiled() -> bool:
    """Return whether torch.compile has compiled all that it was given since it was last reset."""
    frames = torch._dynamo.utils.counters["frames"]
    return 0 < frames["total"] == frames["ok"]


def make_record(run: Run) -> dict[str, Any]:
    """What a finished trial leaves behind; the metrics are those of its last epoch."""
    import timm

    history = run.history
    parts = dict.fromkeys(n for epoch in history for n in epoch if n.endswith("seconds"))
    spent = {*parts, "epoch", "teacher_images"}
    ran = {name: value for name, value in run.environments[-1].items() if name != "from_epoch"}
    return {
        "id": run.trial.id,
        "metrics": {k: v for k, v in history[-1].items() if k not in spent},
        "data": describe(run.trial.data, run.images),
        "best_top1": max(epoch["top1"] for epoch in history),
        "seconds": {name: sum(epoch.get(name, 0.0) for epoch in history) for name in parts},
        "teacher_images": sum(epoch.get("teacher_images", 0) for epoch in history),
        "parameters": sum(p.numel() for p in run.distiller.student.parameters()),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": {
            "pld_ray": __version__,
            **ran,
            "compiled": run.trial.compile and was_compiled(),
            "cuda_graph": run.update.replay is not None,
            "timm": timm.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "host": platform.node(),
            "cores": os.cpu_count(),
        },
        "notes": [
            *run.distiller.loss.notes,
            *change_notes(run.environments),
            *filter(None, [run.update.note, run.note]),
        ],
    }
