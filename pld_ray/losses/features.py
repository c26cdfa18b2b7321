"""Losses on features: AT, FitNet, PKT, RKD, SP and VID, each beside cross-entropy.

    loss = ATLoss()
    loss.connect(student_features, teacher_features)      # once, before the optimizer is made
    loss(student_logits, labels, student_features, teacher_features)

Weights are those with which the field compares them on CIFAR-100 (the CRD and mdistiller
repositories). What some of them have to learn is part of the loss, never of the student.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pld_ray.losses.parameters import Weight
from pld_ray.losses.registry import register_loss


class Features(NamedTuple):
    """What a network computes on the way to its logits, for a batch of B images."""

    stages: list[Tensor]  # [B, channels, h, w] of each stage but the stem
    pooled: Tensor  # [B, width]: what the last linear layer sees


class FeatureLoss(nn.Module, ABC):
    """ce_weight CE + weight * distance(features of student and teacher), a mean over the batch.

    Teacher features are constants. All is computed in float32. Raises ValueError, in `connect` and
    when called, for features that cannot be compared.
    """

    name = ""  # in YAML; the decorator sets it

    def __init__(self, ce_weight: float) -> None:
        super().__init__()
        self.ce_weight = ce_weight
        self.notes: list[str] = []  # as DistillationLoss has them

    def notice(self, teacher: Tensor) -> None:
        """As DistillationLoss has it; teacher logits do not matter here."""

    def connect(self, student: Features, teacher: Features) -> None:
        """Make what has to be learnt, for features of these shapes."""

    @abstractmethod
    def distance(self, student: Features, teacher: Features) -> Tensor:
        """The weighted distance, a scalar."""

    def forward(
        self, student_logits: Tensor, labels: Tensor, student: Features, teacher: Features
    ) -> Tensor:
        """Student logits [B, C], labels int64 [B] and the features of both to a scalar."""
        distance = self.distance(
            Features([stage.float() for stage in student.stages], student.pooled.float()),
            Features(
                [stage.detach().float() for stage in teacher.stages],
                teacher.pooled.detach().float(),
            ),
        )
        return self.ce_weight * F.cross_entropy(student_logits.float(), labels) + distance

    def _pairs(self, student: Features, teacher: Features) -> list[tuple[Tensor, Tensor]]:
        """Stages side by side, the larger map of each pair pooled to the size of the smaller."""
        if len(student.stages) != len(teacher.stages):
            raise ValueError(
                f"{self.name}: the student has {len(student.stages)} stages and the teacher "
                f"{len(teacher.stages)}: stages can be compared only one by one"
            )
        return [_same_size(*pair) for pair in zip(student.stages, teacher.stages, strict=True)]


def _same_size(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Maps [B, *, h, w], averaged down to the smaller height and width of the two."""
    size = min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3])
    first, second = (
        x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (one, other)
    )
    return first, second


@register_loss("at", label="AT", takes="features")
class ATLoss(FeatureLoss):
    """Attention transfer (Zagoruyko and Komodakis 2017, eq. 2, with p = 2).

    weight * sum over stages of mean (a_s / |a_s| - a_t / |a_t|)^2, where the attention map a is
    the mean over channels of the squared features, flattened.
    """

    def __init__(self, weight: Weight = 1000.0, ce_weight: Weight = 1.0) -> None:
        super().__init__(ce_weight)
        self.weight = weight

    def distance(self, student: Features, teacher: Features) -> Tensor:
        """As FeatureLoss has it."""
        pairs = self._pairs(student, teacher)
        return self.weight * torch.stack([F.mse_loss(_map(s), _map(t)) for s, t in pairs]).sum()


def _map(features: Tensor) -> Tensor:
    """Normalised attention [B, h w] of [B, channels, h, w]."""
    return F.normalize(features.square().mean(1).flatten(1))


@register_loss("fitnet", label="FitNet", takes="features")
class FitNetLoss(FeatureLoss):
    """Hints (Romero et al. 2015, eq. 3): the student's stage, through a learnt convolution.

    weight * mean (r(s) - t)^2 at one stage (from 1). r is a 1x1 convolution; a strided or a
    transposed one where the student's map is a multiple or a fraction of the teacher's.
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
        """As FeatureLoss has it."""
        s, t = self._hint(student), self._hint(teacher)
        up, down = t.shape[2] // s.shape[2], s.shape[2] // t.shape[2]
        if up > 1 and s.shape[2] * up == t.shape[2]:
            self.regressor = nn.ConvTranspose2d(s.shape[1], t.shape[1], up, up)
        elif down > 1 and t.shape[2] * down == s.shape[2]:
            self.regressor = nn.Conv2d(s.shape[1], t.shape[1], down, down)
        else:
            self.regressor = nn.Conv2d(s.shape[1], t.shape[1], 1)

    def distance(self, student: Features, teacher: Features) -> Tensor:
        """As FeatureLoss has it."""
        pair = _same_size(self.regressor(self._hint(student)), self._hint(teacher))
        return self.weight * F.mse_loss(*pair)

    def _hint(self, features: Features) -> Tensor:
        if self.stage > len(features.stages):
            raise ValueError(
                f"fitnet: stage is {self.stage} and a network has {len(features.stages)} stages"
            )
        return features.stages[self.stage - 1]


@register_loss("pkt", label="PKT", takes="features")
class PKTLoss(FeatureLoss):
    """Probabilistic knowledge transfer (Passalis and Tefas 2018) with the cosine kernel.

    weight * mean over i, j of p_ij log(p_ij / q_ij): p and q are the cosine similarities of pooled
    features in the batch, scaled to [0, 1], each row normalised to sum to 1.
    """

    def __init__(self, weight: Weight = 30000.0, ce_weight: Weight = 1.0) -> None:
        super().__init__(ce_weight)
        self.weight = weight

    def distance(self, student: Features, teacher: Features) -> Tensor:
        """As FeatureLoss has it."""
        p, q = _affinities(teacher.pooled), _affinities(student.pooled)
        eps = 1e-7  # a similarity can be 0
        return self.weight * (p * ((p + eps) / (q + eps)).log()).mean()


def _affinities(pooled: Tensor) -> Tensor:
    """Row-normalised similarities [B, B] of [B, width]."""
    unit = F.normalize(pooled)
    similar = (unit @ unit.T + 1) / 2
    return similar / similar.sum(1, keepdim=True)


@register_loss("rkd", label="RKD", takes="features")
class RKDLoss(FeatureLoss):
    """Relational knowledge distillation (Park et al. 2019, sections 3.2.1 and 3.2.2).

    distance_weight * Huber(d_s, d_t) + angle_weight * Huber(a_s, a_t) on pooled features: d_ij is
    |x_i - x_j| over its mean over all pairs, a_ijk the cosine of the angle at j of x_i, x_j, x_k.
    """

    def __init__(
        self, distance_weight: Weight = 25.0, angle_weight: Weight = 50.0, ce_weight: Weight = 1.0
    ) -> None:
        super().__init__(ce_weight)
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    def distance(self, student: Features, teacher: Features) -> Tensor:
        """As FeatureLoss has it."""
        s, t = student.pooled, teacher.pooled
        distances = F.smooth_l1_loss(_distances(s), _distances(t))
        angles = F.smooth_l1_loss(_angles(s), _angles(t))
        return self.distance_weight * distances + self.angle_weight * angles


def _distances(x: Tensor) -> Tensor:
    """Distances [B, B] of [B, width], divided by the mean of those that are not 0."""
    squares = (x[:, None] - x[None]).square().sum(2)
    apart = squares > 0
    distances = squares.where(apart, 1).sqrt().where(apart, 0)  # no infinite slope at 0
    return distances / (distances.sum() / apart.sum().clamp_min(1)).clamp_min(1e-12)


def _angles(x: Tensor) -> Tensor:
    """Cosines [B, B, B] at each x_j between x_i and x_k."""
    unit = F.normalize(x[None] - x[:, None], dim=2)  # [j, i]: from x_j to x_i
    return unit @ unit.transpose(1, 2)


@register_loss("sp", label="SP", takes="features")
class SPLoss(FeatureLoss):
    """Similarity preserving (Tung and Mori 2019, eq. 3).

    weight / B^2 * |G_s - G_t|_F^2 with G the Gram matrix [B, B] of the last feature map, each row
    divided by its norm.
    """

    def __init__(self, weight: Weight = 3000.0, ce_weight: Weight = 1.0) -> None:
        super().__init__(ce_weight)
        self.weight = weight

    def distance(self, student: Features, teacher: Features) -> Tensor:
        """As FeatureLoss has it."""
        return self.weight * F.mse_loss(_gram(student.stages[-1]), _gram(teacher.stages[-1]))


def _gram(features: Tensor) -> Tensor:
    rows = features.flatten(1)
    return F.normalize(rows @ rows.T)


@register_loss("vid", label="VID", takes="features")
class VIDLoss(FeatureLoss):
    """Variational information distillation (Ahn et al. 2019).

    weight * sum over stages of mean [ (t - mu(s))^2 / (2 v) + log(v) / 2 ]: mu is a learnt network
    of three 1x1 convolutions, v = softplus(rho) + eps a learnt variance a channel.
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
        """As FeatureLoss has it."""
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
        """As FeatureLoss has it."""
        parts = []
        for i, (s, t) in enumerate(self._pairs(student, teacher)):
            # torch's gaussian_nll_loss looks at the variances, which would stall a GPU every step
            variance = (F.softplus(self.rho[i]) + self.eps)[:, None, None]
            parts.append(((t - self.means[i](s)).square() / variance + variance.log()).mean() / 2)
        return self.weight * torch.stack(parts).sum()
