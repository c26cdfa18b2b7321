"""The base class of all losses on logits, and helpers that these losses share.

The base class checks the arguments, flattens leading dimensions to rows and reduces the losses.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pld_ray.errors import nearest

REDUCTIONS = ("mean", "sum", "none")


class Options(TypedDict, total=False):
    """Arguments that the constructor of every loss on logits takes in addition to its own.

    Attributes:
        ignore_index: Label of the positions that are ignored; None ignores nothing. Default: -100.
        reduction: "mean", "sum" or "none". Default: "mean".
    """

    ignore_index: int | None
    reduction: str


class LossOfTerms(nn.Module):
    """Base class of losses that may be the sum of ce_weight CE and a term of distillation.

    Class attributes:
        ce_weight: The weight of the cross-entropy with the labels; 0 without such a term.

    Attributes:
        ce_term: The term ce_weight CE of the last loss, reduced as the loss; None if it has no such
            term, and under torch.compile and torch.func.
        kd_term: The rest of the last loss, with `keeps_graphs`; else None.
        keeps_graphs: Whether both terms can be differentiated. By default, `ce_term` is a constant,
            so that it keeps no activations in memory.
    """

    ce_weight: float = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.ce_term: Tensor | None = None
        self.kd_term: Tensor | None = None
        self.keeps_graphs = False

    def learnt(self) -> dict[str, float]:
        """Return numbers that the loss has learnt, by name, for the log of an epoch. Default: none.

        A name must not be that of another metric.
        """
        return {}

    def keep_terms(self, ce: Tensor, rest: Callable[[], Tensor]) -> None:
        """Set `ce_term` and, if it is asked for, `kd_term`."""
        if transformed():  # a tensor must not leave the function that is transformed
            self.ce_term, self.kd_term = None, None
        elif self.keeps_graphs:
            self.ce_term, self.kd_term = ce, rest()
        else:
            self.ce_term = ce.detach()


class DistillationLoss(LossOfTerms, ABC):
    """Base class of losses on student logits [..., C], teacher logits [..., C] and labels [...].

    There can be any number of leading dimensions: [B, C] for images, [B, L, C] for the tokens of a
    sequence. Every position is one sample. float16 and bfloat16 logits give a float32 loss.
    Teacher logits and sample weights are constants: only the student receives gradients.

    Args:
        ignore_index: Positions with this label do not contribute to the loss, whatever finite
            logits they have. None ignores nothing. Default: -100.
        reduction: "mean" returns the mean over the samples, weighted by `sample_weight` if given,
            and 0 if there are no samples. "sum" returns the weighted sum. "none" returns the
            weighted losses [...], which are 0 at ignored positions. Default: "mean".

    Attributes:
        notes: Messages for the user about the data that the loss has seen.

    Raises:
        ValueError: `reduction` is not one of these values.
        TypeError: An argument is unknown, or `ignore_index` is not an integer.
    """

    def __init__(self, **options: Unpack[Options]) -> None:
        super().__init__()
        for option in options.keys() - Options.__annotations__:
            own = [*inspect.signature(type(self).__init__).parameters][1:]
            known = nearest(option, {*own, *Options.__annotations__} - {"options"})
            raise TypeError(f"{type(self).__name__}: unknown argument {option!r}; {known}")
        self.set_options(**options)
        self.notes: list[str] = []
        self._cross_entropy: Tensor | None = None  # ce_weight CE of the samples, in a forward pass

    def set_options(self, **options: Unpack[Options]) -> None:
        """Set `ignore_index` and `reduction`; what is not given becomes the default."""
        self.ignore_index = options.get("ignore_index", -100)
        if type(self.ignore_index) not in (int, type(None)):
            raise TypeError(f"ignore_index is {self.ignore_index!r}: expected an integer or None")
        self.reduction = options.get("reduction", "mean")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {self.reduction!r}: expected one of {REDUCTIONS}")

    def notice(self, teacher: Tensor) -> None:
        """Inspect teacher logits [N, C] and add a message to `notes` if the user should know it.

        By default, this does nothing.
        """

    @abstractmethod
    def losses(
        self, student: Tensor, teacher: Tensor, labels: Tensor, kept: Tensor | None
    ) -> Tensor:
        """Return the loss of every sample.

        Args:
            student: Student logits [N, C].
            teacher: Teacher logits [N, C].
            labels: Labels [N]. They are in [0, C) at ignored samples too.
            kept: bool [N], False at ignored samples; None if all samples count.

        Returns:
            Losses [N]. At ignored samples they may be any finite number.
        """

    def add_cross_entropy(
        self, rest: Tensor, student: Tensor, labels: Tensor, known: Tensor | None = None
    ) -> Tensor:
        """Return rest + ce_weight CE of every sample; `losses` calls it.

        A loss that adds its cross-entropy here has `ce_term`, so that trials report its terms.

        Args:
            rest: What else the loss of every sample is, [N].
            student: Student logits [N, C].
            labels: Labels [N].
            known: The cross-entropy of every sample [N], if it is computed already.
        """
        if self.ce_weight == 0:
            self._cross_entropy = torch.zeros_like(rest)
            return rest
        ce = F.cross_entropy(student, labels, reduction="none") if known is None else known
        self._cross_entropy = self.ce_weight * ce
        return rest + self._cross_entropy

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        labels: Tensor,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            student_logits: Student logits [..., C], floating point.
            teacher_logits: Teacher logits [..., C], or None for a loss that uses no teacher.
            labels: Class indices [...], int64.
            sample_weight: Weights of the samples [...].

        Returns:
            A scalar, or the losses [...] if the reduction is "none".

        Raises:
            ValueError: The shapes or types do not fit, or a label is out of range. Label values
                are checked on the CPU only.
        """
        student, teacher, rows, kept = self._rows(student_logits, teacher_logits, labels)
        losses = self.losses(student, teacher, rows, kept)
        if losses.shape != rows.shape:
            raise ValueError(
                f"{type(self).__name__}.losses gives the shape {list(losses.shape)}: expected one "
                f"loss per sample, {list(rows.shape)}"
            )
        loss = self._reduced(losses, kept, sample_weight, labels)
        self.ce_term, samples, self._cross_entropy = None, self._cross_entropy, None
        if samples is not None:
            ce = self._reduced(samples, kept, sample_weight, labels)
            self.keep_terms(ce, lambda: loss - ce)
        return loss

    def _rows(
        self, student: Tensor, teacher: Any, labels: Tensor
    ) -> tuple[Tensor, Any, Tensor, Tensor | None]:
        """Check the arguments, flatten them to rows, replace ignored labels by 0; add `kept`."""
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
        """Weight and reduce the losses [N] of the rows."""
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
    """Return the type in which the losses of these logits are computed."""
    return torch.promote_types(logits.dtype, torch.float32)


def transformed() -> bool:
    """Return whether torch.compile or torch.func is active: tensors then have no concrete value."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _check_inputs(
    student: Tensor, teacher: Tensor | None, labels: Tensor, ignore_index: int | None
) -> bool:
    """Raise ValueError for invalid inputs; return whether any label may be `ignore_index`.

    Label values are checked on the CPU only, because the check would stall an accelerator at
    every step.
    """
    if student.ndim < 2 or student.numel() == 0:
        raise ValueError(
            f"student_logits: expected shape [batch, classes] or [..., classes] without empty "
            f"dimensions, got {list(student.shape)}"
        )
    if not student.is_floating_point():
        raise ValueError(f"student_logits: expected a floating-point type, got {student.dtype}")
    if teacher is not None and teacher.shape != student.shape:
        raise ValueError(
            f"teacher_logits: expected the student's shape {list(student.shape)}, "
            f"got {list(teacher.shape)} (student and teacher must have the same classes)"
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
    in_range = low >= 0 and high < classes
    ignoring = ignore_index is not None and (not in_range or 0 <= ignore_index < classes)
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
    """Return logits / temperature, without a copy if the temperature is 1."""
    return logits if temperature == 1 else logits / temperature


def standardize_logits(logits: Tensor) -> Tensor:
    """Z-score each row of logits [N, C] (Sun et al. 2024, "Logit standardization in KD", eq. 9)."""
    std, mean = torch.std_mean(logits, -1, keepdim=True)
    return (logits - mean) / (std + 1e-7)


def standardize_pair(student: Tensor, teacher: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Standardize the logits of student and teacher, as `mode` says.

    Args:
        student: Student logits [N, C].
        teacher: Teacher logits [N, C].
        mode: "both", "teacher" (only the teacher's logits) or "none".

    Returns:
        The logits of student and teacher.
    """
    if mode == "both":
        student = standardize_logits(student)
    return student, teacher if mode == "none" else standardize_logits(teacher)
