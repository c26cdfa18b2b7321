"""What every loss does first: check its arguments, standardize the logits."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from pld_ray.losses import REGISTRY


def check_params(loss: str, **params: Any) -> None:
    """Raise ValueError unless `params` are what the registry accepts for `loss`."""
    try:
        REGISTRY[loss](name=loss, **params)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{loss}: {field} is {first['input']!r}: {first['msg']}") from None


def check_inputs(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor) -> None:
    """Raise ValueError unless logits are [B, C] floats and labels [B] integers in [0, C).

    Label values are looked at on the CPU only: on an accelerator that would stall every step.
    """
    if student_logits.ndim != 2 or student_logits.numel() == 0:
        raise ValueError(
            f"student_logits: expected shape [batch, classes], neither of them 0, "
            f"got {list(student_logits.shape)}"
        )
    if not student_logits.is_floating_point():
        raise ValueError(f"student_logits: expected floating point, got {student_logits.dtype}")
    if teacher_logits is not None and teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits: expected the student's shape {list(student_logits.shape)}, "
            f"got {list(teacher_logits.shape)} (student and teacher must share their classes)"
        )
    if labels.shape != student_logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels: expected int64 of shape {list(student_logits.shape[:1])}, "
            f"got {labels.dtype} of shape {list(labels.shape)}"
        )
    if labels.device.type == "cpu":
        low, high = int(labels.min()), int(labels.max())
        classes = student_logits.shape[1]
        if low < 0 or high >= classes:
            raise ValueError(
                f"labels: expected classes in [0, {classes}), got {low if low < 0 else high}"
            )


def standardize_logits(logits: Tensor) -> Tensor:
    """Z-score each row of [B, C] (Sun et al. 2024, "Logit standardization in KD", eq. 9)."""
    mean = logits.mean(-1, keepdim=True)
    return (logits - mean) / (logits.std(-1, keepdim=True) + 1e-7)


def standardize_pair(student: Tensor, teacher: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Standardize both logits, the teacher's alone, or none, as `mode` says."""
    if mode == "both":
        student = standardize_logits(student)
    return student, teacher if mode == "none" else standardize_logits(teacher)
