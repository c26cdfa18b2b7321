"""Losses on features: AT, FitNet, PKT, RKD, SP and VID, each combined with cross-entropy.

CRD, which keeps a memory of the training samples, is in `contrastive`.

    loss = ATLoss()
    loss.connect(student_features, teacher_features)  # once, before the optimizer is created
    loss(student_logits, labels, student_features, teacher_features)

The default weights are the usual ones for comparisons on CIFAR-100 (the CRD and mdistiller
repositories). Learnable parts, such as the regressor of FitNet, belong to the loss and not to the
student.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from pld_ray.losses.common import LossOfTerms
from pld_ray.losses.parameters import Weight
from pld_ray.losses.registry import register_loss

ANGLES = 2**25
"""Numbers that RKD holds of one piece of its angles (128 MB). 320 samples are one piece."""


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
        return [_same_size(*pair) for pair in self._stages(student, teacher)]


def _same_size(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
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


@register_loss("at", label="AT", takes="features")
class ATLoss(FeatureLoss):
    """Attention transfer, AT (Zagoruyko and Komodakis 2017), as the authors' code computes it.

        loss = ce_weight CE + weight * sum over stages of mean (a_s / |a_s| - a_t / |a_t|)^2

    The attention map a is the mean over channels of the squared features, flattened. a_s is the
    student's map and a_t is the teacher's. The mean is over the samples and the positions of the
    map. Eq. 2 of the paper has the norm of the difference instead of this mean of squares; the
    default weight belongs to the mean of squares. Both networks need the same number of stages.

    Args:
        weight: Weight of the distance, at least 0. Default: 1000.
        ce_weight: Weight of the cross-entropy with the labels, at least 0. Default: 1.
    """

    def __init__(self, weight: Weight = 1000.0, ce_weight: Weight = 1.0) -> None:
        super().__init__(ce_weight)
        self.weight = weight

    def distance(self, student: Features, teacher: Features) -> Tensor:
        """Return the weighted distance; see `FeatureLoss.distance`."""
        pairs = self._pairs(student, teacher)
        return self.weight * torch.stack([F.mse_loss(_map(s), _map(t)) for s, t in pairs]).sum()


def _map(features: Tensor) -> Tensor:
    """Return the normalised attention [B, h w] of a map [B, channels, h, w]."""
    return F.normalize(features.square().mean(1).flatten(1))


@register_loss("fitnet", label="FitNet", takes="features")
class FitNetLoss(FeatureLoss):
    """FitNet hints (Romero et al. 2015, eq. 3).

        loss = ce_weight CE + weight * mean (r(s) - t)^2

    s and t are the feature maps of student and teacher at one stage. The regressor r is learnt: a
    convolution, batch normalisation and a ReLU, as in the CRD and mdistiller repositories, from
    which the default weight comes. The convolution is 1x1 for maps of the same size. If the
    student's map is f times larger, it has the stride f (3x3 for f = 2); if it is f times smaller,
    it is transposed (4x4 for f = 2). For other sizes, the larger map is average-pooled.

    Args:
        stage: The stage to compare, counted from 1. Default: 2.
        weight: Weight of the distance, at least 0. Default: 100.
        ce_weight: Weight of the cross-entropy with the labels, at least 0. Default: 1.
    """

    def __init__(
        self,
        stage: Annotated[int, Field(ge=1)] = 2,
        weight: Weight = 100.0,
        ce_weight: Weight = 1.0,
    ) -> None:
        super().__init__(ce_weight)
        self.stage = stage
        self.weight = weight
        self.regressor: nn.Module = nn.Identity()

    def connect(self, student: Features, teacher: Features) -> None:
        """Create the regressor; see `FeatureLoss.connect`."""
        s, t = self._hint(student), self._hint(teacher)
        up, down = t.shape[2] // s.shape[2], s.shape[2] // t.shape[2]
        channels = s.shape[1], t.shape[1]
        if up > 1 and s.shape[2] * up == t.shape[2]:
            pad = up // 2
            convolution: nn.Module = nn.ConvTranspose2d(*channels, up + 2 * pad, up, pad)
        elif down > 1 and t.shape[2] * down == s.shape[2]:
            convolution = nn.Conv2d(*channels, 2 * down - 1, down, down - 1)
        else:
            convolution = nn.Conv2d(*channels, 1)
        self.regressor = nn.Sequential(convolution, nn.BatchNorm2d(t.shape[1]), nn.ReLU())

    def distance(self, student: Features, teacher: Features) -> Tensor:
        """Return the weighted distance; see `FeatureLoss.distance`."""
        pair = _same_size(self.regressor(self._hint(student)), self._hint(teacher))
        return self.weight * F.mse_loss(*pair)

    def _hint(self, features: Features) -> Tensor:
        """Return the feature map of the chosen stage."""
        if self.stage > len(features.stages):
            raise ValueError(
                f"fitnet: stage is {self.stage}, but a network has only "
                f"{len(features.stages)} stages"
            )
        return features.stages[self.stage - 1]


@register_loss("pkt", label="PKT", takes="features")
class PKTLoss(FeatureLoss):
    """Probabilistic knowledge transfer, PKT (Passalis and Tefas 2018), with the cosine kernel.

        loss = ce_weight CE + weight * mean over i, j of p_ij log(p_ij / q_ij)

    p (teacher) and q (student) are the cosine similarities between the pooled features of the
    samples i and j of the batch. They are scaled to [0, 1], and each row is normalised to sum to 1.

    Args:
        weight: Weight of the distance, at least 0. Default: 30000.
        ce_weight: Weight of the cross-entropy with the labels, at least 0. Default: 1.
    """

    def __init__(self, weight: Weight = 30000.0, ce_weight: Weight = 1.0) -> None:
        super().__init__(ce_weight)
        self.weight = weight

    def distance(self, student: Features, teacher: Features) -> Tensor:
        """Return the weighted distance; see `FeatureLoss.distance`."""
        p, q = _affinities(teacher.pooled), _affinities(student.pooled)
        eps = 1e-7  # a similarity can be 0
        return self.weight * (p * ((p + eps) / (q + eps)).log()).mean()


def _affinities(pooled: Tensor) -> Tensor:
    """Return the row-normalised similarities [B, B] of features [B, width]."""
    unit = F.normalize(pooled)
    similar = (unit @ unit.T + 1) / 2
    return similar / similar.sum(1, keepdim=True)


@register_loss("rkd", label="RKD", takes="features")
class RKDLoss(FeatureLoss):
    """Relational knowledge distillation, RKD (Park et al. 2019, sections 3.2.1 and 3.2.2).

        loss = ce_weight CE + distance_weight * Huber(d_s, d_t) + angle_weight * Huber(a_s, a_t)

    Both terms use the pooled features x of the batch. d_ij is |x_i - x_j| divided by its mean over
    all pairs i != j. a_ijk is the cosine of the angle at x_j between x_i and x_k. The angles
    [B, B, B] are computed in pieces if they are large, which bounds the memory.

    Args:
        distance_weight: Weight of the distance term, at least 0. Default: 25.
        angle_weight: Weight of the angle term, at least 0. Default: 50.
        ce_weight: Weight of the cross-entropy with the labels, at least 0. Default: 1.
    """

    def __init__(
        self, distance_weight: Weight = 25.0, angle_weight: Weight = 50.0, ce_weight: Weight = 1.0
    ) -> None:
        super().__init__(ce_weight)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    def distance(self, student: Features, teacher: Features) -> Tensor:
        """Return the weighted distance; see `FeatureLoss.distance`."""
        s, t = student.pooled, teacher.pooled
        distances = F.smooth_l1_loss(_distances(s), _distances(t))
        return self.distance_weight * distances + self.angle_weight * _angle_loss(s, t)


def _distances(x: Tensor) -> Tensor:
    """Return the distances [B, B] of x [B, width], divided by their mean over pairs i != j."""
    squares = (x[:, None] - x[None]).square().sum(2)
    apart = squares > 0
    distances = squares.where(apart, 1).sqrt().where(apart, 0)  # avoids the infinite gradient at 0
    pairs = max(len(x) * (len(x) - 1), 1)
    return distances / (distances.sum() / pairs).clamp_min(1e-12)


def _angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean Huber loss between the angles of two sets of features [B, width]."""
    batch = len(student)
    width = max(student.shape[1], teacher.shape[1], batch)
    anchors = max(ANGLES // (batch * width), 1)  # samples at whose angles one piece looks
    if anchors >= batch:
        return F.smooth_l1_loss(_angles(student), _angles(teacher))
    # The backward pass computes each piece again, so that only one is in memory at a time.
    pieces = [
        checkpoint(
            _angle_sum,
            student,
            teacher,
            first,
            anchors,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for first in range(0, batch, anchors)
    ]
    return torch.stack(pieces).sum() / batch**3


def _angle_sum(student: Tensor, teacher: Tensor, first: int, anchors: int) -> Tensor:
    """Return the summed Huber loss of the angles at the samples from `first` on."""
    s, t = (_angles(x, x[first : first + anchors]) for x in (student, teacher))
    return F.smooth_l1_loss(s, t, reduction="sum")


def _angles(x: Tensor, anchors: Tensor | None = None) -> Tensor:
    """Return the cosines [A, B, B] of the angles at each anchor between x_i and x_k."""
    at = x if anchors is None else anchors
    unit = F.normalize(x[None] - at[:, None], dim=2)  # [j, i]: from anchor j to x_i
    return unit @ unit.transpose(1, 2)


@register_loss("sp", label="SP", takes="features")
class SPLoss(FeatureLoss):
    """Similarity-preserving distillation, SP (Tung and Mori 2019, eq. 3).

        loss = ce_weight CE + weight / B^2 * |G_s - G_t|_F^2

    G is the Gram matrix [B, B] of the last feature map, with each row divided by its norm.

    Args:
        weight: Weight of the distance, at least 0. Default: 3000.
        ce_weight: Weight of the cross-entropy with the labels, at least 0. Default: 1.
    """

    def __init__(self, weight: Weight = 3000.0, ce_weight: Weight = 1.0) -> None:
        super().__init__(ce_weight)
        self.weight = weight

    def distance(self, student: Features, teacher: Features) -> Tensor:
        """Return the weighted distance; see `FeatureLoss.distance`."""
        return self.weight * F.mse_loss(_gram(student.stages[-1]), _gram(teacher.stages[-1]))


def _gram(features: Tensor) -> Tensor:
    """Return the row-normalised Gram matrix [B, B] of a map [B, channels, h, w]."""
    rows = features.flatten(1)
    return F.normalize(rows @ rows.T)


@register_loss("vid", label="VID", takes="features")
class VIDLoss(FeatureLoss):
    """Variational information distillation, VID (Ahn et al. 2019).

        loss = ce_weight CE + weight * sum over stages of mean [(t - mu(s))^2 / (2 v) + log(v) / 2]

    s and t are the feature maps of student and teacher. mu is a learnt network of three 1x1
    convolutions. v = softplus(rho) + eps is a learnt variance per channel. Both networks need the
    same number of stages.

    Args:
        weight: Weight of the distance, at least 0. Default: 1.
        ce_weight: Weight of the cross-entropy with the labels, at least 0. Default: 1.
        initial_variance: Initial value of v, above 0. Default: 5.
        eps: Lower bound of v, above 0. Default: 1e-5.
    """

    def __init__(
        self,
        weight: Weight = 1.0,
        ce_weight: Weight = 1.0,
        initial_variance: Annotated[float, Field(gt=0)] = 5.0,
        eps: Annotated[float, Field(gt=0)] = 1e-5,
    ) -> None:
        super().__init__(ce_weight)
        self.weight = weight
        self.initial_variance = initial_variance
        self.eps = eps
        self.means = nn.ModuleList()
        self.rho = nn.ParameterList()

    def connect(self, student: Features, teacher: Features) -> None:
        """Create the networks mu and the variances; see `FeatureLoss.connect`."""
        start = math.log(math.expm1(self.initial_variance - self.eps))
        for s, t in self._pairs(student, teacher):
            inputs, outputs = s.shape[1], t.shape[1]
            first, second, third = (
                nn.Conv2d(channels, outputs, 1, bias=False)
                for channels in (inputs, outputs, outputs)
            )
            self.means.append(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third))
            self.rho.append(nn.Parameter(torch.full((outputs,), start)))

    def distance(self, student: Features, teacher: Features) -> Tensor:
        """Return the weighted distance; see `FeatureLoss.distance`."""
        parts = []
        for i, (s, t) in enumerate(self._pairs(student, teacher)):
            # torch's gaussian_nll_loss checks the variances, which would stall a GPU at every step
            variance = (F.softplus(self.rho[i]) + self.eps)[:, None, None]
            parts.append(((t - self.means[i](s)).square() / variance + variance.log()).mean() / 2)
        return self.weight * torch.stack(parts).sum()
