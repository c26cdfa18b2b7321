"""The teacher's order of the classes: all that a ranking loss needs to sort, and it never changes.

An order holds class indices, the teacher's best class first. It depends on the teacher alone, so
whoever keeps a teacher's logits can keep the order beside them and hand it to the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pld_ray.losses.common import transformed

Array = npt.NDArray[Any]


def teacher_order(
    teacher_logits: Tensor, labels: Tensor | None = None, top_k: int | None = None
) -> Tensor:
    """Teacher logits [..., C] to class indices [..., K], best first; K is C unless `top_k` is less.

    With labels [...] (int64) each one comes first and counts among the K: a loss then has the
    least to do. Equal logits keep the lower class first (with `top_k` the choice among them is
    torch.topk's). The indices come in the smallest of uint8, int16 and int32 that holds them.
    """
    classes = teacher_logits.shape[-1]
    descending = 0 - teacher_logits.detach().reshape(-1, classes)  # never -0.0: it is not < 0.0
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
    """One ranking per sample: the label first, then the classes in the teacher's order."""

    index: Tensor  # int64 [N, M]: label, o_1, o_2, ...
    repeated: bool  # the label may come again in the order, where it is to be passed over
    classes: int

    @property
    def tailed(self) -> bool:
        """Whether classes may be left out: one unordered tail."""
        return self.repeated and self.index.shape[1] <= self.classes

    def take(self, x: Tensor, passed_over: float, overwrite: bool = False) -> Tensor:
        """`x` [N, C] as ranked [N, M], with `passed_over` where the label comes again.

        With `overwrite` that is written into x too, which saves a copy of it.
        """
        if not self.repeated:
            return x.gather(1, self.index)
        label = self.index[:, :1]
        at_label = x.gather(1, label)
        scatter = x.scatter_ if overwrite else x.scatter
        later = scatter(1, label, passed_over).gather(1, self.index[:, 1:])
        return torch.cat([at_label, later], 1)

    def put_(self, x: Tensor, ranked: Tensor) -> Tensor:
        """Overwrite `x` [N, C] with `ranked` [N, M or more]; it keeps its own in the tail."""
        x.scatter_(1, self.index, ranked[:, : self.index.shape[1]])
        return x.scatter_(1, self.index[:, :1], ranked[:, :1]) if self.repeated else x


def rank_in_order(order: Tensor, labels: Tensor, classes: int) -> Ranking:
    """The ranking of an order, integers [N, K], and int64 labels [N]; nothing is sorted."""
    whole = order.shape[1] == classes and order.device.type == "cpu" and not transformed()
    if whole and bool((order[:, 0] == labels).all()):
        return Ranking(order.long(), False, classes)
    return Ranking(torch.cat([labels[:, None], order], 1), True, classes)


def rank_all(teacher: Tensor, labels: Tensor) -> Ranking:
    """The ranking of all classes by teacher logits [N, C]."""
    descending = 0 - teacher
    scatter = descending.scatter if transformed() else descending.scatter_
    descending = scatter(1, labels[:, None], float("-inf"))
    return Ranking(argsort(descending), False, teacher.shape[1])


def argsort(x: Tensor) -> Tensor:
    """Stable ascending argsort of [N, C], which may be overwritten and holds no -0.0, to int64."""
    if x.device.type == "cpu" and x.dtype is not torch.float64 and not transformed():
        return torch.from_numpy(_argsort_by_key(x.float().numpy()))
    return x.argsort(dim=1, stable=True)


def _argsort_by_key(x: Array) -> Array:
    """The same for float32 arrays, by one sort of 64-bit integers.

    A key holds a number's bits in its upper half, turned so that integers ascend where floats do,
    and the class in its lower half. NumPy sorts plain integers with vector instructions: torch's
    stable argsort takes five times as long at 1,000 classes. One thread: others would have to
    share their cores with torch's, which wait for their next work by spinning.
    """
    bits = x.view(np.int32)
    bits ^= (bits >> 31) & np.int32(0x7FFFFFFF)
    keys = bits.astype(np.int64)
    keys <<= 32
    keys |= np.arange(x.shape[1])
    keys.sort(axis=1)
    keys &= 0xFFFFFFFF
    return keys
