"""The teachers and the students of trials on the validation images, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pld_ray.data.sampling import batches
from pld_ray.distill import metrics
from pld_ray.distill.bank_format import VAL_BATCH
from pld_ray.distill.device import autocast
from pld_ray.distill.running import Run, Shared, TrainingError, sum_over_workers

ON_DEVICE = 2**28
"""Bytes of the teacher's logits that stay on the device; more are kept in the host's memory."""
PIXELS = 2**16
"""Pixels per forward pass of the student on a CPU, such as 64 images of 32 x 32: the activations of
more do not fit its caches."""


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
    for logits, labels in zip(_teacher_logits(run), _labels(shared), strict=True):
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
def evaluate_batch(run: Run, number: int, images: Tensor, labels: Tensor) -> None:
    """Evaluate the student of a trial, in evaluation mode, on a validation batch.

    Args:
        run: The trial.
        number: The number of the batch, from 0.
        images: The images [B, channels, H, W].
        labels: Their labels [B].
    """
    device = run.shared.device
    with run.clock.host("validation"):
        with autocast(device, run.distiller.precision):
            logits = _student_logits(run.best_student, images).float()
        teacher = None if run.teacher_val is None else run.teacher_val[number].to(device)
        run.val_sums.append(metrics.sums(logits, labels, teacher))
        if own := run.trial.metrics:
            run.own_sums.append(metrics.own_sums(own, logits, labels, teacher))


def _student_logits(student: nn.Module, images: Tensor) -> Tensor:
    """Return the student's logits [B, C] of images [B, channels, H, W]; on a CPU in parts."""
    whole = images.device.type != "cpu"
    size = len(images) if whole else max(8, PIXELS // images[0, 0].numel())
    return torch.cat([student(part) for part in images.split(size)])


def scores(run: Run) -> dict[str, float]:
    """Return the metrics of a trial on the validation images of all workers.

    Raises:
        TrainingError: A metric is not finite.
    """
    trial, epoch = run.trial, len(run.history) + 1
    with run.clock.host("validation"):
        total = sum_over_workers(torch.stack(run.val_sums).sum(0))
        found = metrics.averages(total, run.teacher is not None)
        if trial.metrics:
            means = sum_over_workers(torch.stack(run.own_sums).sum(0)) / len(run.shared.images.val)
            found |= dict(zip(trial.metrics, means.tolist(), strict=True))
    run.val_sums, run.own_sums = [], []
    if not math.isfinite(found["val_loss"]):
        raise TrainingError(
            f"the validation loss is {found['val_loss']:g} after epoch {epoch}: a lower "
            "optimizer.lr or clip_grad may help"
        )
    for name in trial.metrics:
        if not math.isfinite(found[name]):
            raise TrainingError(f"the metric {name} is {found[name]:g} after epoch {epoch}")
    return found | run.teacher_scores


def val_batches(shared: Shared) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images and labels of each validation batch of this worker."""
    shares = list(batches(shared.val_index, VAL_BATCH, False))
    yield from zip(shared.stream.val(shares), _labels(shared), strict=True)


def _labels(shared: Shared) -> Sequence[Tensor]:
    """Return the labels [B] of each validation batch of this worker."""
    index = torch.from_numpy(shared.val_index).to(shared.device)
    return shared.stream.labels["val"][index].split(VAL_BATCH)
