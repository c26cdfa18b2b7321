"""VGG with batch normalisation for small images (Simonyan and Zisserman 2015).

They are the networks of the CRD and mdistiller repositories, which call them vgg8 to vgg19: global
average pooling and one linear layer take the place of the three linear layers, so they have two
weighted layers fewer than the name says. timm's vgg11 to vgg19 are the ImageNet networks.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from pld_ray.models.networks.cifar import CifarNet, register

WIDTHS = 64, 128, 256, 512, 512


class PoolOfLargeImages(nn.Module):
    """Max-pooling that leaves the maps of small images as they are.

    Three poolings come before it, so the maps of 32x32 images are 4x4 and stay 4x4, and those of
    64x64 images are halved.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, channels, h, w] to half of h and w, rounded up, if h is 8 or more."""
        return F.max_pool2d(x, 2, ceil_mode=True) if x.shape[2] >= 8 else x


def _block(inputs: int, width: int, depth: int) -> list[nn.Module]:
    """Create `depth` 3x3 convolutions with bias, batch normalisation and ReLU."""
    modules: list[nn.Module] = []
    for _ in range(depth):
        modules += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
    return modules


def _vgg(*depths: int, num_classes: int, in_chans: int) -> CifarNet:
    """Create VGG from the number of convolutions of its five blocks.

    The first block is the stem. As in the CRD repository, losses compare the outputs of the other
    four, before they are pooled.
    """
    stages: list[nn.Module] = []
    for i in range(1, 5):
        # Rounding up keeps maps of one pixel and gives the sizes that strided convolutions give.
        pool = PoolOfLargeImages() if i == 4 else nn.MaxPool2d(2, ceil_mode=True)
        stages.append(nn.Sequential(pool, *_block(WIDTHS[i - 1], WIDTHS[i], depths[i])))
    stem = nn.Sequential(*_block(in_chans, WIDTHS[0], depths[0]))
    network = CifarNet(stem, stages, nn.Identity(), WIDTHS[-1], num_classes)
    nn.init.normal_(network.fc.weight, std=0.01)
    nn.init.zeros_(network.fc.bias)
    return network


register("vgg8_cifar", "VGG-8 for 32x32 images.", _vgg, 1, 1, 1, 1, 1)
register("vgg11_cifar", "VGG-11 for 32x32 images.", _vgg, 1, 1, 2, 2, 2)
register("vgg13_cifar", "VGG-13 for 32x32 images.", _vgg, 2, 2, 2, 2, 2)
register("vgg16_cifar", "VGG-16 for 32x32 images.", _vgg, 2, 2, 3, 3, 3)
register("vgg19_cifar", "VGG-19 for 32x32 images.", _vgg, 2, 2, 4, 4, 4)
