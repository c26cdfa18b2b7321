"""OFD: maps before the last ReLU, compared only where the ReLU or a margin lets it matter."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pld_ray.losses.feature_loss import FeatureLoss, Features, TeacherLayers, average_pool
from pld_ray.losses.parameters import Weight
from pld_ray.losses.registry import register_loss

RARE = 0.001  # probability of a negative value below which the margin is -3 standard deviations


@register_loss("ofd", label="OFD", takes="features")
class OFDLoss(FeatureLoss):
    """Overhaul of feature distillation, OFD (Heo et al. 2019, ICCV).

        loss = ce_weight CE + weight * sum over stages i of 2^(i - n) d(r_i, max(t_i, m_i))

    s_i and t_i are the feature maps of student and teacher at stage i of n, before the last ReLU of
    the stage. r_i = BN(conv(s_i)) is learnt: a 1x1 convolution to the width of the teacher, and
    batch normalisation. t_i is average-pooled to the size of s_i. d sums the squared differences
    over channels and positions, and is the mean over the samples. It leaves out the elements where
    the teacher is not positive and the student is below: the partial L2 distance of the paper.

    The margin m of a channel is the mean of a normal variable given that it is negative. Its mean
    and standard deviation are the bias and the absolute weight of the batch norm before the ReLU.
    The margin is -3 standard deviations if fewer than 0.1% of the values are negative, as in the
    authors' code.

    The networks need maps before a last ReLU. The stages of mobilenetv2_cifar end without a ReLU;
    as a student, it is compared by them as they are. The teacher needs a batch norm before the
    ReLU: a CIFAR ResNet, Wide ResNet or VGG, or a ResNet of timm.

    The paper lets the batch norms of the teacher use the statistics of the batch. Here the teacher
    is frozen as for all losses, and they use those of its training.

    Args:
        weight: Weight of the distance, at least 0. The mdistiller repository uses 1e-3 on CIFAR-100
            and 1e-4 on ImageNet. Default: 0.001.
        ce_weight: Weight of the cross-entropy with the labels, at least 0. Default: 1.
    """

    student_further = teacher_further = frozenset({"preact"})

    def __init__(self, weight: Weight = 0.001, ce_weight: Weight = 1.0) -> None:
        super().__init__(ce_weight)
        self.weight = weight
        self.connectors = nn.ModuleList()

    def borrow(self, teacher: TeacherLayers) -> None:
        """Compute the margins from the batch norms of the teacher; see `FeatureLoss.borrow`."""
        if not all(_is_affine(norm) for norm in teacher.norms) or not teacher.norms:
            raise ValueError(
                f"ofd: {teacher.network} has no batch norm before the last ReLU of its stages: "
                "expected a CIFAR ResNet, Wide ResNet or VGG, or a ResNet of timm, as the teacher"
            )
        for i, norm in enumerate(teacher.norms):
            margins = batch_norm_margins(norm.weight, norm.bias)  # type: ignore[arg-type]
            self.constant(f"margin_{i}", margins[:, None, None])

    def connect(self, student: Features, teacher: Features) -> None:
        """Create the connectors; see `FeatureLoss.connect`."""
        for s, t in self._pairs(student, teacher):
            convolution = nn.Conv2d(s.shape[1], t.shape[1], 1, bias=False)
            nn.init.normal_(convolution.weight, std=math.sqrt(2 / t.shape[1]))
            self.connectors.append(nn.Sequential(convolution, nn.BatchNorm2d(t.shape[1])))

    def distance(self, student: Features, teacher: Features) -> Tensor:
        """Return the weighted distance; see `FeatureLoss.distance`."""
        distances: list[Tensor] = []
        maps = zip(self.connectors, *(x.further["preact"] for x in (student, teacher)), strict=True)
        for i, (connector, s, t) in enumerate(maps):
            target = t if t.shape[2:] == s.shape[2:] else average_pool(t, s.shape[2], s.shape[3])
            partial = partial_squares(connector(s), target, self.get_buffer(f"margin_{i}"))
            share = 2.0 ** (i + 1 - len(self.connectors))
            distances.append(share * partial.sum((1, 2, 3)).mean())
        return self.weight * torch.stack(distances).sum()


def _is_affine(norm: nn.Module) -> bool:
    return isinstance(norm, nn.BatchNorm2d) and norm.affine


def batch_norm_margins(weight: Tensor, bias: Tensor) -> Tensor:
    """Return the margins [channels] of a batch norm with this weight and bias [channels]."""
    mean, std = bias.detach().double(), weight.detach().double().abs()
    ratio = mean / std.clamp_min(1e-30)  # a channel can have the weight 0
    negative = torch.special.ndtr(-ratio)
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    return torch.where(negative > RARE, mean - std * density / negative, -3 * std)


def partial_squares(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Return the squared differences [B, channels, h, w] that count, and 0 elsewhere."""
    target = torch.maximum(teacher, margin)
    counts = (student > target) | (teacher > 0)
    return (student - target).square().where(counts, 0)
