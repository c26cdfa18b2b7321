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
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pld_ray.losses.feature_loss import FeatureLoss, Features, same_size
from pld_ray.losses.parameters import Weight
from pld_ray.losses.registry import register_loss

ANGLES = 2**25
"""Numbers that RKD holds of one piece of its angles (128 MB). 320 samples are one piece."""


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
        pair = same_size(self.regressor(self._hint(student)), self._hint(teacher))
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
