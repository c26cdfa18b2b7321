"""The teacher's order of the classes, and the rankings that are made from it.

An order lists class indices, the teacher's best class first. It depends only on the teacher, so it
can be stored beside the teacher's logits and passed to a ranking loss, which then sorts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from pld_ray.losses.common import transformed
from pld_ray.losses.sorting import CLASS, sort_keys

Array = npt.NDArray[Any]


def teacher_order(
    teacher_logits: Tensor, labels: Tensor | None = None, top_k: int | None = None
) -> Tensor:
    """Sort the classes by descending teacher logit.

    Args:
        teacher_logits: Teacher logits [..., C].
        labels: Class indices [...], int64. If given, the label comes first in its order and counts
            as one of the K classes. Losses are fastest with such orders.
        top_k: The number K of classes to return. Default: all C classes.

    Returns:
        Class indices [..., K], best class first, in the smallest of uint8, int16 and int32 that
        holds them. Classes with equal logits are sorted by index; if `top_k` is less than C,
        torch.topk decides between them.
    """
    classes = teacher_logits.shape[-1]
    descending = 0 - teacher_logits.detach().reshape(-1, classes)  # avoids -0.0, see argsort
    if labels is not None:
        descending.scatter_(1, labels.reshape(-1, 1), float("-inf"))
    if top_k is None or top_k >= classes:
        order = argsort(descending)
    else:
        order = descending.topk(top_k, dim=1, largest=False).indices
    small = torch.uint8 if classes <= 2**8 else torch.int16 if classes <= 2**15 else torch.int32
    return order.to(small).reshape(*teacher_logits.shape[:-1], -1)


@dataclass(slots=True)
class Ranking:
    """One ranking per sample: the label first, then the classes in the teacher's order.

    Attributes:
        index: Class indices [N, M], int64: the label, then o_1, o_2, ... of the order.
        repeated: Whether the label may occur a second time, in the order. That step is skipped.
        classes: The number of classes C.
    """

    index: Tensor
    repeated: bool
    classes: int

    @property
    def tailed(self) -> bool:
        """Whether the ranking may leave out classes, which then form one unordered tail."""
        return self.repeated and self.index.shape[1] <= self.classes

    def take(self, x: Tensor, passed_over: float, overwrite: bool = False) -> Tensor:
        """Return the values of `x` in the order of the ranking.

        Args:
            x: Values of the classes [N, C].
            passed_over: The value to return where the label occurs a second time.
            overwrite: Whether `x` may be modified: its value at the label becomes `passed_over`.
                This saves a copy.

        Returns:
            Tensor [N, M].
        """
        if not self.repeated:
            return x.gather(1, self.index)
        label = self.index[:, :1]
        at_label = x.gather(1, label)
        scatter = x.scatter_ if overwrite else x.scatter
        later = scatter(1, label, passed_over).gather(1, self.index[:, 1:])
        return torch.cat([at_label, later], 1)

    def put_(self, x: Tensor, ranked: Tensor) -> Tensor:
        """Write values in the order of the ranking into `x`, in place.

        Args:
            x: Tensor [N, C]. Classes in the tail keep their values.
            ranked: Tensor with at least M columns, of which the first M are used.

        Returns:
            The tensor `x`.
        """
        x.scatter_(1, self.index, ranked[:, : self.index.shape[1]])
        return x.scatter_(1, self.index[:, :1], ranked[:, :1]) if self.repeated else x


def rank_in_order(order: Tensor, labels: Tensor, classes: int) -> Ranking:
    """Make a ranking from an order, without sorting.

    Args:
        order: Class indices [N, K], best class first, of any integer type.
        labels: Labels [N], int64.
        classes: The number of classes C.
    """
    whole = order.shape[1] == classes and order.device.type == "cpu" and not transformed()
    if whole and bool((order[:, 0] == labels).all()):
        return Ranking(order.long(), False, classes)
    return Ranking(torch.cat([labels[:, None], order.long()], 1), True, classes)


def rank_all(teacher: Tensor, labels: Tensor) -> Ranking:
    """Rank all classes by descending teacher logit, after the label.

    Args:
        teacher: Teacher logits [N, C].
        labels: Labels [N], int64.
    """
    descending = 0 - teacher
    scatter = descending.scatter if transformed() else descending.scatter_
    descending = scatter(1, labels[:, None], float("-inf"))
    return Ranking(argsort(descending), False, teacher.shape[1])


def argsort(x: Tensor) -> Tensor:
    """Return the stable ascending argsort of every row.

    Args:
        x: Tensor [N, C], which may be overwritten. It must not contain -0.0, which the fast path
            sorts before 0.0 although both are equal.

    Returns:
        Indices [N, C], int64.
    """
    if x.device.type == "cpu" and x.dtype is not torch.float64 and not transformed():
        return torch.from_numpy(_argsort_by_key(x.float().numpy()))
    return x.argsort(dim=1, stable=True)


def _argsort_by_key(x: Array) -> Array:
    """Do the same as `argsort` for float32 arrays, with one sort of 64-bit integers.

    The sort uses one thread, because more threads would share their cores with torch's threads,
    which spin while they wait for work.
    """
    keys = sort_keys(x)
    keys.sort(axis=1)
    keys &= CLASS
    return keys
