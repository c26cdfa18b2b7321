"""ResNets of timm: their stages before the last ReLU, which timm does not return.

timm computes this ReLU in place. The blocks are written out here, so that the map before it stays,
without a copy and without hooks, which `torch.compile` cannot see through.
"""

from __future__ import annotations

from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torch.nn import functional as F


def is_plain(network: ResNet) -> bool:
    """Return whether each stage ends with a block that is known here, and with a ReLU."""
    last = [layer[-1] for layer in _layers(network)]
    return all(
        (type(block) is BasicBlock and isinstance(block.act2, nn.ReLU))
        or (type(block) is Bottleneck and isinstance(block.act3, nn.ReLU))
        for block in last
    )


def forward_preactivations(
    network: ResNet, x: Tensor, indices: list[int]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Compute what `forward_intermediates` does, and the stages before their last ReLU.

    Args:
        network: A network for which `is_plain` is true.
        x: Images [B, channels, H, W].
        indices: Indices of the stages, counted from 1; 0 is the stem.

    Returns:
        The last feature map, the outputs of the stages, and the same maps before the last ReLU.
    """
    of: Any = network
    x = of.maxpool(of.act1(of.bn1(of.conv1(x))))
    before, stages = [], []
    for layer in _layers(network):
        *blocks, last = layer
        for block in blocks:
            x = block(x)
        before.append(_before_relu(last, x))
        x = F.relu(before[-1])
        stages.append(x)
    return x, [stages[i - 1] for i in indices], [before[i - 1] for i in indices]


def last_norms(network: ResNet, indices: list[int]) -> list[nn.Module]:
    """Return the batch norm that ends the main branch of the last block of each stage."""
    last = [layer[-1] for layer in _layers(network)]
    norms = [block.bn2 if type(block) is BasicBlock else block.bn3 for block in last]
    return [norms[i - 1] for i in indices]


def _layers(network: Any) -> list[Any]:
    return [network.layer1, network.layer2, network.layer3, network.layer4]


def _before_relu(block: Any, x: Tensor) -> Tensor:
    """Return the sum of a residual block before its last ReLU."""
    shortcut = x if block.downsample is None else block.downsample(x)
    x = block.bn1(block.conv1(x))
    if type(block) is BasicBlock:
        x = block.aa(block.act1(block.drop_block(x)))
        x = block.bn2(block.conv2(x))
    else:
        x = block.bn2(block.conv2(block.act1(x)))
        x = block.aa(block.act2(block.drop_block(x)))
        x = block.bn3(block.conv3(x))
    if block.se is not None:
        x = block.se(x)
    if block.drop_path is not None:
        x = block.drop_path(x)
    return x + shortcut
