"""The base class of losses on features, and the features that they compare."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from pld_ray.losses.common import LossOfTerms


class Features(NamedTuple):
    """Intermediate features of a network for a batch of B images.

    Attributes:
        stages: Feature maps [B, channels, h, w] of the stages, without the stem.
        pooled: Input of the last linear layer [B, width].
        further: What else a loss asks for, by its name, such as "preact".
    """

    stages: list[Tensor]
    pooled: Tensor
    further: dict[str, list[Tensor]] = {}


class TeacherLayers(NamedTuple):
    """Layers of a frozen teacher, of which a loss may copy constants.

    Attributes:
        network: The name of the teacher, for messages.
        classifier: The last layer, which maps the pooled features [B, width] to logits [B, C]. Its
            weights are bfloat16 if the teacher computes in bfloat16.
        norms: The batch norm before the last ReLU of each stage. Empty if the network has none, or
            if the loss does not ask for "preact".
    """

    network: str
    classifier: nn.Module
    norms: list[nn.Module]


class FeatureLoss(LossOfTerms, ABC):
    """Base class of losses on features: ce_weight CE + distance(student, teacher).

    The loss is a mean over the batch and is computed in float32. Only the student and the learnable
    parts of the loss receive gradients. `borrow`, `connect` and the forward pass raise ValueError
    if the features cannot be compared.

    Args:
        ce_weight: Weight of the cross-entropy with the labels, at least 0.

    Attributes:
        name: The name of the loss in YAML; `register_loss` sets it.
        student_further: Names of what the loss needs in `Features.further` of the student. There is
            "preact", the stages before their last ReLU; "cells2", the logits [B, 2 * 2, C] of the
            2x2 cells of the last feature map, and likewise "cells1", "cells4" and so on; "last",
            the feature map [B, width, h, w] before the pooling.
        teacher_further: The same of the teacher.
        reuses_classifier: Whether the student predicts by the classifier of its teacher. A trial
            then trains a `ReusedClassifier` (pld_ray/models/reused.py).
        takes_labels: Whether `distance` gets the labels as a third argument.
        takes_samples: Whether the loss needs `connect_samples`, and the indices of the samples of
            each batch.
        notes: Messages for the user, as in `DistillationLoss`.
    """

    name = ""
    student_further: frozenset[str] = frozenset()
    teacher_further: frozenset[str] = frozenset()
    reuses_classifier = False
    takes_labels = False
    takes_samples = False

    def __init__(self, ce_weight: float) -> None:
        super().__init__()
        self.ce_weight = ce_weight
        self.notes: list[str] = []

    def notice(self, teacher: Tensor) -> None:
        """Do nothing. Losses on logits inspect the teacher logits here."""

    def borrow(self, teacher: TeacherLayers) -> None:
        """Copy constants of the frozen teacher, before `connect`. By default, there are none.

        Keep them with `constant`, so that they are neither trained nor saved.

        Args:
            teacher: Layers of the teacher.

        Raises:
            ValueError: The teacher has not what the loss needs.
        """

    def constant(self, name: str, value: Tensor) -> None:
        """Keep a float32 copy of a tensor as an attribute that moves with the loss.

        It gets no gradients, and `state_dict` is without it.
        """
        self.register_buffer(name, value.detach().float().clone(), persistent=False)

    def connect(self, student: Features, teacher: Features) -> None:
        """Create the learnable parts of the loss for features of these shapes.

        Args:
            student: Features of the student, for any batch size.
            teacher: Features of the teacher, for the same batch.

        Raises:
            ValueError: The features cannot be compared.
        """

    def connect_samples(self, labels: Tensor) -> None:
        """Create what the loss keeps of each training sample, if `takes_samples` is true.

        It is called once, after `connect`. What the loss keeps belongs in buffers: they are part of
        the checkpoints of a trial, and must be the same on all workers.

        Args:
            labels: The class indices of all training samples, int64 [N].

        Raises:
            ValueError: The loss cannot be used with these samples.
        """

    @abstractmethod
    def distance(self, student: Features, teacher: Features) -> Tensor:
        """Return the weighted distance between the features, a scalar.

        With `takes_labels` there is a further argument `labels`, and with `takes_samples` a last
        argument `index`; `forward` describes both.

        Args:
            student: Features of the student, float32.
            teacher: Features of the teacher, float32, without gradients.
        """

    def logit_distance(self, student_logits: Tensor, teacher: Features) -> Tensor | None:
        """Return a term of the student's logits, a scalar that is added to `distance`, or None.

        Args:
            student_logits: Student logits [B, C], float32.
            teacher: Features of the teacher, float32, without gradients.
        """
        return None

    def forward(
        self,
        student_logits: Tensor,
        labels: Tensor,
        student: Features,
        teacher: Features,
        index: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss.

        Args:
            student_logits: Student logits [B, C].
            labels: Class indices [B], int64, or probabilities of the classes [B, C].
            student: Features of the student.
            teacher: Features of the teacher.
            index: The indices of the samples among all training samples, int64 [B], if
                `takes_samples` is true. With several workers, all have as many indices: those with
                a sample less have the last index twice.

        Returns:
            The mean loss over the batch, a scalar.
        """
        # A caller's autocast would compute the distances, and their gradients, in bfloat16.
        with torch.autocast(student_logits.device.type, enabled=False):
            given: Any = tree_map(Tensor.float, student)
            constant: Any = tree_map(lambda x: x.detach().float(), teacher)
            taken = [labels] if self.takes_labels else []
            taken += [] if index is None else [index]
            distance = self.distance(given, constant, *taken)
            further = self.logit_distance(student_logits.float(), constant)
            if further is not None:
                distance = distance + further
            ce = self.ce_weight * F.cross_entropy(student_logits.float(), labels)
        self.keep_terms(ce, lambda: distance)
        return ce + distance

    def _stages(self, student: Features, teacher: Features) -> list[tuple[Tensor, Tensor]]:
        """Pair the stages."""
        if len(student.stages) != len(teacher.stages):
            raise ValueError(
                f"{self.name}: the student has {len(student.stages)} stages and the teacher has "
                f"{len(teacher.stages)}; expected the same number of stages"
            )
        return list(zip(student.stages, teacher.stages, strict=True))

    def _pairs(self, student: Features, teacher: Features) -> list[tuple[Tensor, Tensor]]:
        """Pair the stages and pool the larger map of each pair to the size of the smaller one."""
        return [same_size(*pair) for pair in self._stages(student, teacher)]


def same_size(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool two maps [B, *, h, w] to the smaller height and width of the two."""
    size = min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3])
    first, second = (x if x.shape[2:] == size else average_pool(x, *size) for x in (one, other))
    return first, second


def average_pool(x: Tensor, height: int, width: int) -> Tensor:
    """Average-pool maps [B, *, h, w] to [B, *, height, width], as `F.adaptive_avg_pool2d` does.

    The backward pass of that function adds in any order on CUDA, so that results are not the same
    each time.
    """
    rows, columns = x.shape[2] // height, x.shape[3] // width
    if (rows * height, columns * width) == x.shape[2:]:
        return F.avg_pool2d(x, (rows, columns))
    down, across = _averages(x.shape[2], height, x), _averages(x.shape[3], width, x)
    return down @ x @ across.T


def _averages(inputs: int, outputs: int, like: Tensor) -> Tensor:
    """Return the weights [outputs, inputs] of an adaptive average pooling along one side."""
    step, place = (torch.arange(n, device=like.device) for n in (outputs, inputs))
    first, last = step * inputs // outputs, -(-(step + 1) * inputs // outputs)
    inside = ((place >= first[:, None]) & (place < last[:, None])).to(like)
    return inside / inside.sum(1, keepdim=True)
