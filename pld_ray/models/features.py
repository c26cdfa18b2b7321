"""Intermediate features of a network: which stages losses compare, and how they are read."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import ResNet
from torch import Tensor, nn

from pld_ray.errors import InputError
from pld_ray.losses.feature_loss import FeatureLoss, Features, TeacherLayers, average_pool
from pld_ray.models import timm_resnet


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


def has_preactivations(network: nn.Module, linear: bool = False) -> bool:
    """Return whether a network gives its stages before their last ReLU.

    Args:
        network: The network.
        linear: Whether stages that end without a ReLU count too, as they are.
    """
    if isinstance(network, ResNet):
        return timm_resnet.is_plain(network)
    return hasattr(network, "has_preactivations") and (linear or bool(network.has_preactivations))


def has_linear_head(network: nn.Module) -> bool:
    """Return whether the logits are a linear layer of the mean of the last map [B, width, h, w]."""
    if isinstance(network, ResNet | EfficientNet):
        pooling: Any = network.global_pool
        return pooling.pool_type == "avg" and isinstance(network.get_classifier(), nn.Linear)
    return bool(getattr(network, "has_linear_head", False))


class WithFeatures(nn.Module):
    """A network whose forward pass returns its features beside its logits.

    Args:
        network: A timm network, or one with the same methods `forward_intermediates`,
            `forward_head` and `get_classifier`. Its weights and their names stay as they are. Its
            classifier is one layer: a linear one, or a convolution of 1x1 pixels.
        further: The features to return beyond `stages` and `pooled`. "preact" needs a ResNet of
            timm, or a network with the attribute `has_preactivations` and the methods
            `forward_preactivations` and `last_norms` of `CifarNet`. "cells2" and the like, and
            "last", need a network with a linear head (see `has_linear_head`).

    Raises:
        InputError: The network gives no intermediate features, or has several classifiers.
    """

    def __init__(self, network: nn.Module, further: frozenset[str] = frozenset()) -> None:
        super().__init__()
        of: Any = network
        self.network = of
        self.stages = feature_stages(network)
        if not isinstance(of.get_classifier(), nn.Module):
            raise InputError(
                f"{_name(network)} has several classifiers, so that its logits are not those of "
                "one layer: expected a loss on logits, such as kd, or a network with one classifier"
            )
        self.further = further
        self.scales = _scales(further)

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        """Return the logits [B, C] and the features of images [B, channels, H, W]."""
        network, further = self.network, {}
        if "preact" in self.further:
            if isinstance(network, ResNet):
                found = timm_resnet.forward_preactivations(network, x, self.stages)
            else:
                found = network.forward_preactivations(x, self.stages)
            last, stages, further["preact"] = found
        else:
            last, stages = network.forward_intermediates(x, indices=self.stages)
        pooled = network.forward_head(last, pre_logits=True)
        classifier: Any = network.get_classifier()
        if isinstance(classifier, nn.Conv2d):  # such as of timm's ResNetV2
            logits = classifier(pooled[:, :, None, None]).flatten(1)
        else:
            logits = classifier(pooled)
        if "last" in self.further:
            further["last"] = [last]
        for scale in self.scales:
            further[f"cells{scale}"] = [_cells(network, last, scale)]
        return logits, Features(stages, pooled, further)


def _scales(further: frozenset[str]) -> list[int]:
    """Return the numbers of "cells2" and the like, in one order in all processes."""
    return sorted(int(name[5:]) for name in further if re.fullmatch("cells[1-9][0-9]*", name))


def _cells(network: Any, last: Tensor, scale: int) -> Tensor:
    """Return the logits of the cells of the last feature map.

    Args:
        network: A network with a linear head.
        last: Its last feature map [B, width, h, w].
        scale: The number m of cells along each side.

    Returns:
        Logits [B, m * m, C]. The mean over the cells is that of the image if m divides h and w.
    """
    cells = average_pool(last, scale, scale).flatten(2).transpose(1, 2)  # [B, m m, width]
    logits: Tensor = network.forward_head(cells.flatten(0, 1)[:, :, None, None])
    return logits.unflatten(0, cells.shape[:2])


def check_further(loss: FeatureLoss, student: nn.Module, teacher: nn.Module) -> None:
    """Check that student and teacher give the further features that a loss needs.

    Raises:
        InputError: They do not, or the loss asks for something else.
    """
    sides = ("student", student, loss.student_further), ("teacher", teacher, loss.teacher_further)
    for side, network, further in sides:
        by_head = {"last", *(f"cells{scale}" for scale in _scales(further))}
        if unknown := sorted(further - {"preact"} - by_head):
            raise InputError(
                f"{loss.name}: {side}_further has {unknown[0]!r}: expected 'preact', 'last', or "
                "'cells2' and the like"
            )
        if by_head & further:
            check_linear_head(loss.name, network)
        if "preact" in further and not has_preactivations(network, linear=side == "student"):
            other = "" if side == "student" else " other than mobilenetv2_cifar"
            raise InputError(
                f"{loss.name} compares the {side}'s feature maps before a ReLU, which "
                f"{_name(network)} does not have: expected a CIFAR network{other}, or a ResNet of "
                "timm with ReLU, such as resnet18"
            )


def check_linear_head(loss: str, network: nn.Module) -> None:
    """Check that a loss can compute logits from the last feature map of a network.

    Args:
        loss: The name of the loss, for the message.
        network: The network.

    Raises:
        InputError: It has no linear head.
    """
    if not has_linear_head(network):
        raise InputError(
            f"{loss} needs networks that end with average pooling and a linear layer, as "
            f"{_name(network)} does not: expected a CIFAR network, or a ResNet, EfficientNet, "
            "MobileNetV1 or MobileNetV2 of timm"
        )


def _name(network: nn.Module) -> str:
    """Return the name that timm knows a network by, or else its class."""
    known = getattr(network, "pretrained_cfg", None) or {}
    return known.get("architecture") or f"model family {type(network).__name__}"


def teacher_layers(network: nn.Module, further: frozenset[str] = frozenset()) -> TeacherLayers:
    """Return the layers of a teacher that losses may copy constants of."""
    of: Any = network
    norms: list[nn.Module] = []
    if "preact" in further:
        stages = feature_stages(network)
        if isinstance(network, ResNet):
            norms = timm_resnet.last_norms(network, stages)
        else:
            norms = of.last_norms(stages)
    return TeacherLayers(_name(network), of.get_classifier(), norms)


@torch.no_grad()
def probe_features(
    network: nn.Module, image: Tensor, further: frozenset[str] = frozenset()
) -> Features:
    """Return the features of one image [1, channels, H, W], without touching batch statistics.

    The network is in evaluation mode meanwhile, and then in the mode in which it was.
    """
    training = network.training
    network.eval()
    try:
        return WithFeatures(network, further)(torch.zeros_like(image))[1]
    finally:
        network.train(training)
