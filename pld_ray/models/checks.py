"""Check networks and teacher weights before a run, without memory for the networks."""

from __future__ import annotations

from collections.abc import Mapping

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pld_ray.config.trial import Model, Trial, Weights
from pld_ray.errors import InputError
from pld_ray.losses import FeatureLoss, create_loss
from pld_ray.models.factory import create_model
from pld_ray.models.features import probe_features


def check_features(trial: Trial, classes: int, channels: int, image_size: int) -> None:
    """Check that the loss of a trial can compare the features of student and teacher.

    Args:
        trial: A trial whose loss is a `FeatureLoss`.
        classes: Number of classes.
        channels: Number of image channels.
        image_size: Height and width of the images, in pixels.

    Raises:
        InputError: The features cannot be compared.
    """
    teacher = trial.teacher.student if isinstance(trial.teacher, Trial) else trial.teacher
    assert teacher is not None
    shape = classes, channels, image_size
    with torch.device("meta"):
        features = [
            probe_features(
                create_model(model, *shape), torch.zeros(1, channels, image_size, image_size)
            )
            for model in (trial.student, teacher)
        ]
        loss = create_loss(trial.loss)
        assert isinstance(loss, FeatureLoss)
        try:
            loss.connect(*features)
            loss.distance(*features)
        except ValueError as error:
            raise InputError(f"{teacher.name} → {trial.student.name}: {error}") from None


def check_model(model: Model | Weights, classes: int, channels: int, image_size: int) -> int:
    """Create a network without memory and check the weights of a teacher.

    Args:
        model: A network, or a teacher with weights.
        classes: Number of classes.
        channels: Number of image channels.
        image_size: Height and width of the images, in pixels.

    Returns:
        The number of parameters of the network.

    Raises:
        InputError: The network cannot be created, the weights cannot be read, or they do not fit
            the network or the number of classes.
    """
    with torch.device("meta"):
        network = create_model(model, classes, channels, image_size)
    if isinstance(model, Weights):
        _check_weights(model, network, classes)
    return sum(parameter.numel() for parameter in network.parameters())


def _check_weights(teacher: Weights, network: nn.Module, classes: int) -> None:
    """Raise InputError if the teacher's weights are missing or do not fit the network."""
    if teacher.weights == "pretrained":
        config = timm.get_pretrained_cfg(teacher.name)
        if config is None or not config.has_weights:
            raise InputError(f"teacher {teacher.name!r} has no pretrained weights in timm")
        if config.num_classes != classes:
            raise InputError(
                f"teacher {teacher.name!r} has {config.num_classes} classes, but the data has "
                f"{classes}; student and teacher must have the same classes"
            )
        return
    try:
        stored: Mapping[str, Tensor] = load_file(teacher.weights)
    except Exception as error:  # safetensors raises its own type or OSError
        raise InputError(f"teacher weights {teacher.weights!r} cannot be read: {error}") from None
    wanted = network.state_dict()
    for name in wanted.keys() | stored.keys():
        want = tuple(wanted[name].shape) if name in wanted else None
        got = tuple(stored[name].shape) if name in stored else None
        if want == got:
            continue
        detail = f"tensor {name!r} has shape {got} in the file and {want} in the network"
        if want and got and want[1:] == got[1:]:
            detail += f"; the file seems to be for {got[0]} classes, but the data has {want[0]}"
        raise InputError(
            f"teacher weights {teacher.weights!r} do not fit {teacher.name!r}: {detail}"
        )
