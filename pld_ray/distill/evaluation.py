"""The teacher and the student of a trial on the validation images, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pld_ray.data.sampling import batches
from pld_ray.distill import metrics
from pld_ray.distill.bank_format import VAL_BATCH
from pld_ray.distill.device import autocast
from pld_ray.distill.running import Run, TrainingError, sum_over_workers

ON_DEVICE = 2**28
"""Bytes of the teacher's logits that stay on the device; more are kept in the host's memory."""


@torch.no_grad()
def evaluate_teacher(run: Run) -> None:
    """Keep the teacher's logits on the validation images, and its top-1.

    Trials that step together compute or read them once.

    Raises:
        TrainingError: A logit is not finite.
    """
    if run.teacher is None:
        return
    validated = run.shared.validated
    key = id(run.teacher), id(run.val_bank)
    if key not in validated:
        validated[key] = _evaluated(run)
    run.teacher_val, run.teacher_scores = validated[key]
    for logits in run.teacher_val[:1]:
        run.distiller.loss.notice(logits.to(run.shared.device))


def _evaluated(run: Run) -> tuple[list[Tensor], dict[str, float]]:
    """Return the teacher's logits on the validation batches of this worker, and its top-1."""
    shared = run.shared
    small = 4 * len(shared.val_index) * shared.images.classes <= ON_DEVICE
    kept, wrong, parts = [], [], []
    for logits, labels in zip(_teacher_logits(run), _labels(run), strict=True):
        wrong.append((~logits.isfinite()).sum())
        parts.append(metrics.sums(logits, labels, None))
        kept.append(logits if small else logits.cpu())
    if sum_over_workers(torch.stack(wrong).sum()).item():
        raise TrainingError(f"the logits of the teacher {run.trial.teacher_name} are not finite")
    total = sum_over_workers(torch.stack(parts).sum(0))
    return kept, {"teacher_top1": metrics.averages(total, False)["top1"]}


def _teacher_logits(run: Run) -> Iterator[Tensor]:
    """Yield the teacher's logits [B, C] of each validation batch of this worker."""
    assert run.teacher is not None
    shares = list(batches(run.shared.val_index, VAL_BATCH, False))
    if run.val_bank is not None:
        yield from (run.val_bank.read(share, 0)[0].to(run.shared.device) for share in shares)
    else:
        yield from (run.teacher(images).float() for images in run.shared.stream.val(shares))


@torch.no_grad()
def evaluate_student(run: Run) -> dict[str, float]:
    """Return the metrics on the validation images of all workers.

    Raises:
        TrainingError: A metric is not finite.
    """
    trial, epoch = run.trial, len(run.history) + 1
    parts, own = [], []
    with run.clock.host("validation"):
        student = run.best_student.eval()
        shares = list(batches(run.shared.val_index, VAL_BATCH, False))
        others: Sequence[Tensor | None] = run.teacher_val or [None] * len(shares)
        for images, labels, kept in zip(
            run.shared.stream.val(shares), _labels(run), others, strict=True
        ):
            with autocast(run.shared.device, run.distiller.precision):
                logits = student(images).float()
            teacher = None if kept is None else kept.to(run.shared.device)
            parts.append(metrics.sums(logits, labels, teacher))
            if trial.metrics:
                own.append(metrics.own_sums(trial.metrics, logits, labels, teacher))
        total = sum_over_workers(torch.stack(parts).sum(0))
        scores = metrics.averages(total, run.teacher is not None)
        if own:
            means = sum_over_workers(torch.stack(own).sum(0)) / len(run.shared.images.val)
            scores |= dict(zip(trial.metrics, means.tolist(), strict=True))
    if not math.isfinite(scores["val_loss"]):
        raise TrainingError(
            f"the validation loss is {scores['val_loss']:g} after epoch {epoch}: a lower "
            "optimizer.lr or clip_grad may help"
        )
    for name in trial.metrics:
        if not math.isfinite(scores[name]):
            raise TrainingError(f"the metric {name} is {scores[name]:g} after epoch {epoch}")
    return scores


def _labels(run: Run) -> Sequence[Tensor]:
    """Return the labels [B] of each validation batch of this worker."""
    index = torch.from_numpy(run.shared.val_index).to(run.shared.device)
    return run.shared.stream.labels["val"][index].split(VAL_BATCH)
