"""Intermediate features of a network: which stages are compared, and how they are read."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pld_ray.errors import InputError
from pld_ray.losses.features import Features
from pld_ray.models.cifar import CifarNet

# ---------------------------------------------------------------- features


def taps(network: nn.Module) -> list[int]:
    """The stages whose features are compared, as indices for timm's `forward_intermediates`.

    A CIFAR network declares its own. Of timm's, a family that keeps its resolution (a vision
    transformer) gives four blocks at the quarters of its depth; one that lowers it step by step
    gives the last feature map of each resolution below the stem's (half the image's), as
    `feature_info` has them. Raises InputError for a network that gives no features.
    """
    if isinstance(network, CifarNet):
        return network.taps
    name = type(network).__name__
    if not hasattr(network, "forward_intermediates") or not hasattr(network, "feature_info"):
        raise InputError(
            f"model family {name}: timm gives no intermediate features of it; "
            "choose a loss on logits, such as pld, or another network"
        )
    info: Any = network.feature_info
    reductions = [stage["reduction"] for stage in info]
    if len(set(reductions)) == 1:
        depth = len(reductions)
        return sorted({math.ceil(depth * quarter / 4) - 1 for quarter in (1, 2, 3, 4)})
    return [i for i, reduction in enumerate(reductions) if reduction > 2]


class WithFeatures(nn.Module):
    """A network whose forward pass gives its features beside its logits.

    It holds the network itself, whose weights and names stay as they are.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.taps = taps(network)

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        """Images [B, channels, H, W] to logits [B, C] and features."""
        network: Any = self.network
        last, stages = network.forward_intermediates(x, indices=self.taps)
        pooled = network.forward_head(last, pre_logits=True)
        return network.get_classifier()(pooled), Features(stages, pooled)


@torch.no_grad()
def probe_features(network: nn.Module, channels: int, image_size: int) -> Features:
    """Features of the shapes that the network gives, for one image."""
    network.eval()
    weight = next(network.parameters())
    return WithFeatures(network)(weight.new_zeros(1, channels, image_size, image_size))[1]
