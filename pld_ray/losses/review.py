"""ReviewKD: deep stages of the student help its shallow ones to match the teacher's."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pld_ray.losses.feature_loss import FeatureLoss, Features, average_pool
from pld_ray.losses.parameters import Weight
from pld_ray.losses.registry import register_loss

LEVELS = 4, 2, 1  # sides of the pooled maps that HCL compares beside the whole ones
WIDEST = 512  # channels of the fused maps, at most


@register_loss("reviewkd", label="ReviewKD", takes="features")
class ReviewKDLoss(FeatureLoss):
    """Knowledge review, ReviewKD (Chen et al. 2021, CVPR).

        loss = ce_weight CE + warmup weight * sum over levels of HCL(out, t)

    The levels are the stages and the pooled features, which are a map of one pixel. t is the
    teacher's map before the last ReLU of a stage. out is learnt, by the attention based fusion of
    the paper, from the student's map of this level and all deeper ones: x = BN(conv1x1(s)) has as
    many channels as the pooled features, at most 512. At all levels but the deepest,
    w = sigmoid(conv1x1([x, y])) are two maps, where y is the fused map of the next deeper level,
    resized, and x becomes w_0 x + w_1 y. Then x is resized to the teacher's map, and
    out = BN(conv3x3(x)). Maps are resized to the nearest pixel.

    HCL, the hierarchical context loss, is the weighted mean of the mean squared differences of the
    maps (weight 1) and of the maps that are average-pooled to 4x4 (1/2), 2x2 (1/4) and 1x1 (1/8).
    Of a map that is not higher than 4, only the smaller ones count, with the first weights.

    The factor warmup is min((epoch + 1) / W, 1) with W = `warmup_epochs`, and 1 if W is 0. The
    mdistiller repository counts the epochs in this way; the authors' code begins with 0 / W.

    The teacher needs maps before a last ReLU, which mobilenetv2_cifar does not have.

    Args:
        weight: Weight of the distance, at least 0. The authors use on CIFAR-100: 0.6 (resnet56 to
            resnet20), 1 (resnet110 to resnet32), 5 (pairs of Wide ResNets, resnet32x4 to resnet8x4,
            teachers of shufflenetv1) and 8 (resnet32x4 to shufflenetv2); on ImageNet 1 (resnet34 to
            resnet18) and 8 (resnet50 to mobilenetv1). Default: 1.
        ce_weight: Weight of the cross-entropy with the labels, at least 0. Default: 1.
        warmup_epochs: Epochs W over which the weight of the distance rises, at least 0. The
            authors use 1 on ImageNet. Default: 20.
        student_preact: Whether the maps of the student are those before the last ReLU too, as the
            authors have it on ImageNet. Default: False.
    """

    teacher_further = frozenset({"preact"})

    def __init__(
        self,
        weight: Weight = 1.0,
        ce_weight: Weight = 1.0,
        warmup_epochs: Annotated[int, Field(ge=0)] = 20,
        student_preact: bool = False,
    ) -> None:
        super().__init__(ce_weight)
        self.weight = weight
        self.warmup_epochs = warmup_epochs
        self.student_further = frozenset({"preact"} if student_preact else ())
        self.fusions = nn.ModuleList()  # of the levels, the shallowest first
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Set the current epoch, counted from 0, for the warm-up."""
        self.warmup = min((epoch + 1) / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0

    def connect(self, student: Features, teacher: Features) -> None:
        """Create the layers that fuse the maps; see `FeatureLoss.connect`."""
        self._pairs(student, teacher)  # they must be as many
        ours, theirs = _levels(student), _levels(teacher)
        width = min(WIDEST, student.pooled.shape[1])
        for s, t in zip(ours, theirs, strict=True):
            self.fusions.append(Fusion(s.shape[1], width, t.shape[1], deepest=s is ours[-1]))

    def distance(self, student: Features, teacher: Features) -> Tensor:
        """Return the weighted distance; see `FeatureLoss.distance`."""
        distances, deeper = [], None
        levels = zip(self.fusions, _levels(student), _levels(teacher), strict=True)
        for fusion, s, t in reversed(list(levels)):
            out, deeper = fusion(s, deeper, t.shape[2:])
            distances.append(hierarchical_context(out, t))
        return self.warmup * self.weight * torch.stack(distances).sum()


class Fusion(nn.Module):
    """The attention based fusion (ABF) of one level.

    Args:
        inputs: Number of channels of the student's map.
        width: Number of channels of the fused maps.
        outputs: Number of channels of the teacher's map.
        deepest: Whether there is no deeper level to fuse with.
    """

    def __init__(self, inputs: int, width: int, outputs: int, deepest: bool) -> None:
        super().__init__()
        self.first = _conv_bn(inputs, width, 1)
        self.attention = None if deepest else nn.Conv2d(2 * width, 2, 1)
        self.last = _conv_bn(width, outputs, 3)

    def forward(self, s: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Fuse a map of the student with what is fused of deeper ones.

        Args:
            s: Map of the student [B, inputs, h, w].
            deeper: The fused map of the next deeper level; None at the deepest.
            size: Height and width of the teacher's map.

        Returns:
            The map to compare with the teacher's, and the fused map for the next level.
        """
        x = self.first(s)
        if self.attention is not None:
            assert deeper is not None
            y = _resized(deeper, x.shape[2:])
            weights = torch.sigmoid(self.attention(torch.cat([x, y], 1)))
            x = x * weights[:, :1] + y * weights[:, 1:]
        x = _resized(x, size)
        return self.last(x), x


def _conv_bn(inputs: int, outputs: int, size: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def _resized(x: Tensor, size: torch.Size) -> Tensor:
    """Return a map of this height and width, from the nearest pixels."""
    return x if x.shape[2:] == size else F.interpolate(x, (size[0], size[1]), mode="nearest")


def _levels(features: Features) -> list[Tensor]:
    """Return the maps of the stages, before the last ReLU if they are known, and of one pixel."""
    stages = features.further.get("preact", features.stages)
    return [*stages, features.pooled[:, :, None, None]]


def hierarchical_context(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the hierarchical context loss (HCL) between two maps [B, channels, h, w]."""
    total, weight, weights = F.mse_loss(student, teacher), 1.0, 1.0
    for side in LEVELS:
        if side < student.shape[2]:
            size = side, min(side, student.shape[3])
            s, t = (average_pool(x, *size) for x in (student, teacher))
            weight /= 2
            total = total + weight * F.mse_loss(s, t)
            weights += weight
    return total / weights
