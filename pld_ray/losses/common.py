"""What every loss has in common: its arguments checked, any leading dimensions, the reduction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn

REDUCTIONS = ("mean", "sum", "none")


class Options(TypedDict, total=False):
    """Arguments that every loss's constructor takes beside its own."""

    ignore_index: int | None
    reduction: str


class DistillationLoss(nn.Module, ABC):
    """A loss of student logits [..., C], teacher logits [..., C] and int64 labels [...].

    The leading dimensions are as many as there are: [B, C] for images, [B, L, C] for the tokens of
    a sequence; every position is a sample. Positions whose label is `ignore_index` (None: there
    are none) take no part, whatever finite logits they have. `reduction`: "mean" is the mean over
    the samples, weighted by `sample_weight` if given, and 0 if there is none; "sum" the weighted
    sum; "none" the weighted losses [...], 0 where ignored. float16 and bfloat16 logits give a
    float32 loss. Teacher and weights are constants: gradients go to the student alone.
    """

    def __init__(self, **options: Unpack[Options]) -> None:
        super().__init__()
        self.ignore_index = options.get("ignore_index", -100)
        self.reduction = options.get("reduction", "mean")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {self.reduction!r}: expected one of {REDUCTIONS}")
        self.notes: list[str] = []  # what a user should know of the data that was seen

    def notice(self, teacher: Tensor) -> None:
        """Look at teacher logits [N, C] for what a user should be told, and add it to `notes`."""

    @abstractmethod
    def losses(
        self, student: Tensor, teacher: Tensor, labels: Tensor, kept: Tensor | None
    ) -> Tensor:
        """[N, C], [N, C], [N] to the losses [N]; `kept`: bool [N], or None if all samples count.

        Labels are in [0, C) at ignored samples too, and the losses there may be any finite number.
        """

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Student and teacher logits [..., C], labels and weights [...] to a scalar, or [...].

        Raises ValueError for shapes, types or (on the CPU) label values that do not fit.
        """
        student, teacher, rows, kept = self._rows(student_logits, teacher_logits, labels)
        losses = self.losses(student, teacher, rows, kept)
        return self._reduced(losses, kept, sample_weight, labels)

    def _rows(
        self, student: Tensor, teacher: Any, labels: Tensor
    ) -> tuple[Tensor, Any, Tensor, Tensor | None]:
        """Arguments checked and flattened to rows, ignored labels replaced by 0; and `kept`."""
        ignoring = _check_inputs(student, teacher, labels, self.ignore_index)
        if student.ndim != 2:
            classes = student.shape[-1]
            student, labels = student.reshape(-1, classes), labels.reshape(-1)
            teacher = teacher.reshape(-1, classes) if teacher is not None else None
        student = student.to(at_least_float32(student))
        if teacher is not None:
            teacher = teacher.detach().to(at_least_float32(teacher))
        if not ignoring:
            return student, teacher, labels, None
        kept = torch.ne(labels, cast(int, self.ignore_index))
        return student, teacher, labels.where(kept, 0), kept

    def _reduced(
        self, losses: Tensor, kept: Tensor | None, weight: Tensor | None, labels: Tensor
    ) -> Tensor:
        """Losses [N] of rows, weighted and reduced."""
        if kept is not None:
            losses = losses.where(kept, 0)
        if weight is not None:
            if weight.shape != labels.shape:
                raise ValueError(
                    f"sample_weight: expected the labels' shape {list(labels.shape)}, "
                    f"got {list(weight.shape)}"
                )
            weight = weight.detach().reshape(-1).to(losses.dtype)
            losses = losses * weight
        if self.reduction == "none":
            return losses.reshape(labels.shape)
        if self.reduction == "sum":
            return losses.sum()
        if weight is None and kept is None:
            return losses.mean()
        counted = torch.ones_like(losses) if weight is None else weight
        if kept is not None:
            counted = counted * kept
        total = counted.sum()
        return losses.sum() / total.where(total > 0, 1)


def at_least_float32(logits: Tensor) -> torch.dtype:
    """The type in which losses of these logits are computed."""
    return torch.promote_types(logits.dtype, torch.float32)


def transformed() -> bool:
    """Whether torch.compile or torch.func is at work: tensors then have no values to look at."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _check_inputs(
    student: Tensor, teacher: Tensor | None, labels: Tensor, ignore_index: int | None
) -> bool:
    """Raise ValueError for what does not fit; return whether any label may be `ignore_index`.

    Label values are looked at on the CPU only: on an accelerator that would stall every step.
    """
    if student.ndim < 2 or student.numel() == 0:
        raise ValueError(
            f"student_logits: expected shape [batch, classes] or [..., classes], none of them 0, "
            f"got {list(student.shape)}"
        )
    if not student.is_floating_point():
        raise ValueError(f"student_logits: expected floating point, got {student.dtype}")
    if teacher is not None and teacher.shape != student.shape:
        raise ValueError(
            f"teacher_logits: expected the student's shape {list(student.shape)}, "
            f"got {list(teacher.shape)} (student and teacher must share their classes)"
        )
    if labels.shape != student.shape[:-1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels: expected int64 of shape {list(student.shape[:-1])}, "
            f"got {labels.dtype} of shape {list(labels.shape)}"
        )
    if labels.device.type != "cpu" or transformed():
        return ignore_index is not None
    classes = student.shape[-1]
    low, high = int(labels.min()), int(labels.max())
    ignoring = ignore_index is not None and not (low >= 0 and high < classes)
    if ignoring:
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= classes))]
        low, high = (int(wrong[0]),) * 2 if len(wrong) else (0, 0)
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels: expected classes in [0, {classes})"
            + (f" or {ignore_index} to ignore" if ignore_index is not None else "")
            + f", got {low if low < 0 else high}"
        )
    return ignoring


def soften(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature; without a copy at temperature 1."""
    return logits if temperature == 1 else logits / temperature


def standardize_logits(logits: Tensor) -> Tensor:
    """Z-score each row of [N, C] (Sun et al. 2024, "Logit standardization in KD", eq. 9)."""
    std, mean = torch.std_mean(logits, -1, keepdim=True)
    return (logits - mean) / (std + 1e-7)


def standardize_pair(student: Tensor, teacher: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Standardize both logits, the teacher's alone, or none, as `mode` says."""
    if mode == "both":
        student = standardize_logits(student)
    return student, teacher if mode == "none" else standardize_logits(teacher)
