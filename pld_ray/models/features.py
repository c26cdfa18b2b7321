"""Intermediate features of a network: which stages losses compare, and how they are read."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from pld_ray.errors import InputError
from pld_ray.losses.features import Features


def feature_stages(network: nn.Module) -> list[int]:
    """Return the stages whose features are compared.

    A network may list them in an attribute `taps`, as the CIFAR networks do. Otherwise timm's
    `feature_info` decides. A family that keeps its resolution (vision transformers) gives four
    blocks, at the quarters of its depth. A family that lowers its resolution gives the last
    feature map of each resolution below half the image's.

    Returns:
        Indices for timm's `forward_intermediates`.

    Raises:
        InputError: The network gives no intermediate features.
    """
    if hasattr(network, "taps"):
        return list(network.taps)  # type: ignore[arg-type]
    name = type(network).__name__
    if not hasattr(network, "forward_intermediates") or not hasattr(network, "feature_info"):
        raise InputError(
            f"model family {name}: timm cannot return its intermediate features; "
            "choose a loss on logits, such as pld, or another network"
        )
    info: Any = network.feature_info
    reductions = [stage["reduction"] for stage in info]
    if len(set(reductions)) == 1:
        depth = len(reductions)
        return sorted({math.ceil(depth * quarter / 4) - 1 for quarter in (1, 2, 3, 4)})
    return [i for i, reduction in enumerate(reductions) if reduction > 2]


class WithFeatures(nn.Module):
    """A network whose forward pass returns its features beside its logits.

    Args:
        network: A timm network, or one with the same methods `forward_intermediates`,
            `forward_head` and `get_classifier`. Its weights and their names stay as they are.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.stages = feature_stages(network)

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        """Return the logits [B, C] and the features of images [B, channels, H, W]."""
        network: Any = self.network
        last, stages = network.forward_intermediates(x, indices=self.stages)
        pooled = network.forward_head(last, pre_logits=True)
        return network.get_classifier()(pooled), Features(stages, pooled)


@torch.no_grad()
def probe_features(network: nn.Module, image: Tensor) -> Features:
    """Return the features of one image [1, channels, H, W], without touching batch statistics.

    The network is in evaluation mode meanwhile, and then in the mode in which it was.
    """
    training = network.training
    network.eval()
    try:
        return WithFeatures(network)(torch.zeros_like(image))[1]
    finally:
        network.train(training)
