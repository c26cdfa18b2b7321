"""ShuffleNet V1 and V2 for small images, as in the CRD and mdistiller repositories.

The stem is a 1x1 convolution that keeps the image size, and no max-pooling follows. The three
stages halve height and width. The first weights are torch's default, as there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pld_ray.models.networks.cifar import CifarNet, conv_bn, register

STEM = 24
DEPTHS = 4, 8, 4  # units of the stages


class Shuffle(nn.Module):
    """Channel shuffle: the channels of the groups take turns.

    Args:
        groups: Number of groups.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels, h, w] to the same shape; channel i of group g comes at i groups + g."""
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


class UnitV1(nn.Module):
    """A unit of ShuffleNet V1 (Zhang et al. 2018, figure 2) with three groups.

    As in the CRD repository, a ReLU follows the 3x3 convolution; the paper has none there. The
    first convolution has one group if its input is the stem's.

    Args:
        inputs: Number of input channels.
        outputs: Number of output channels.
        stride: 1: the input is added. 2: the input is average-pooled, and its channels follow those
            of the main branch.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        width = outputs if stride == 1 else outputs - inputs
        middle, groups = width // 4, 1 if inputs == STEM else 3
        self.main = nn.Sequential(
            *[*conv_bn(inputs, middle, 1, groups=groups), nn.ReLU(), Shuffle(groups)],
            *[*conv_bn(middle, middle, 3, stride, groups=middle), nn.ReLU()],
            *conv_bn(middle, width, 1, groups=3),
        )
        self.pool = None if stride == 1 else nn.AvgPool2d(3, stride, padding=1)
        self.act = nn.ReLU()

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the joined branches before the last ReLU, and the output."""
        main = self.main(x)
        joined = main + x if self.pool is None else torch.cat([main, self.pool(x)], dim=1)
        return joined, self.act(joined)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, h, w] to [B, outputs, h / stride, w / stride]."""
        return self.both(x)[1]


class UnitV2(nn.Module):
    """A unit of ShuffleNet V2 (Ma et al. 2018, figure 3): two branches, whose channels take turns.

    Args:
        inputs: Number of input channels.
        outputs: Number of output channels.
        stride: 1: each branch gets one half of the channels, and the left one keeps them as they
            are. 2: each branch gets all of them.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.left = None
        if stride == 2:
            self.left = nn.Sequential(
                *conv_bn(inputs, inputs, 3, stride, groups=inputs),
                *[*conv_bn(inputs, half, 1), nn.ReLU()],
            )
        self.right = nn.Sequential(
            *[*conv_bn(half if stride == 1 else inputs, half, 1), nn.ReLU()],
            *conv_bn(half, half, 3, stride, groups=half),
            *[*conv_bn(half, half, 1), nn.ReLU()],
        )

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the joined branches before the last ReLU and the shuffle, and the output."""
        left, right = self._branches(x)
        *modules, relu = self.right
        for module in modules:
            right = module(right)
        return torch.cat([left, right], dim=1), self._shuffled(left, relu(right))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, h, w] to [B, outputs, h / stride, w / stride]."""
        left, right = self._branches(x)
        return self._shuffled(left, self.right(right))

    def _branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output of the left branch and the input of the right one."""
        if self.left is None:
            left, right = x.chunk(2, dim=1)
            return left, right
        return self.left(x), x

    @staticmethod
    def _shuffled(left: Tensor, right: Tensor) -> Tensor:
        """Return the channel shuffle of the branches, without a copy that joins them first."""
        return torch.stack([left, right], dim=2).flatten(1, 2)


def _network(
    unit: type[UnitV1] | type[UnitV2],
    widths: tuple[int, ...],
    end: int | None,
    num_classes: int,
    in_chans: int,
) -> CifarNet:
    """Create a ShuffleNet; `end` is the width of a 1x1 convolution after the last stage."""
    stages: list[nn.Module] = []
    inputs = STEM
    for width, depth in zip(widths, DEPTHS, strict=True):
        units = [unit(inputs, width, 2), *(unit(width, width, 1) for _ in range(depth - 1))]
        stages.append(nn.Sequential(*units))
        inputs = width
    stem = nn.Sequential(*conv_bn(in_chans, STEM, 1), nn.ReLU())
    head = nn.Sequential(*conv_bn(inputs, end, 1), nn.ReLU()) if end else nn.Identity()
    return CifarNet(stem, stages, head, end or inputs, num_classes, he_normal=False)


def _v1(num_classes: int, in_chans: int) -> CifarNet:
    """Create ShuffleNet V1 with three groups."""
    return _network(UnitV1, (240, 480, 960), None, num_classes, in_chans)


def _v2(*widths: int, num_classes: int, in_chans: int) -> CifarNet:
    """Create ShuffleNet V2 from the widths of its stages and of its last convolution."""
    return _network(UnitV2, widths[:3], widths[3], num_classes, in_chans)


register("shufflenetv1", "ShuffleNet V1 with three groups, for 32x32 images.", _v1)
register("shufflenetv2_x0_5", "ShuffleNet V2 x0.5 for 32x32 images.", _v2, 48, 96, 192, 1024)
register("shufflenetv2", "ShuffleNet V2 x1 for 32x32 images.", _v2, 116, 232, 464, 1024)
register("shufflenetv2_x1_5", "ShuffleNet V2 x1.5 for 32x32 images.", _v2, 176, 352, 704, 1024)
register(
    "shufflenetv2_x2_0",
    """ShuffleNet V2 x2 for 32x32 images.

    Its widths are those of the CRD repository; the paper has 244 channels in the first stage.
    """,
    _v2,
    *(224, 488, 976, 2048),
)
