"""Check networks and teacher weights before a run, without memory for the networks."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from torch import Tensor, nn

from pld_ray import plugins
from pld_ray.config.parts import Model, Weights
from pld_ray.config.trial import Trial
from pld_ray.errors import InputError
from pld_ray.losses import FeatureLoss, LossParams, create_loss
from pld_ray.models.factory import create_model, student_model, teacher_model
from pld_ray.models.features import check_further, probe_features, teacher_layers
from pld_ray.models.weights import fit_weights

ONE_IMAGE = "more than 1 value per channel"
"""Part of the message of torch's batch norm for one image whose features have one pixel."""


def check_loss(params: LossParams, classes: int) -> None:
    """Compute a loss on logits once, on random logits.

    Args:
        params: The settings of the loss.
        classes: Number of classes.

    Raises:
        InputError: The loss raises an error, is not one finite number, or has no finite gradient
            for the student's logits.
    """
    drawn = torch.randn(2, 4, classes, generator=torch.Generator().manual_seed(0))
    student, teacher = drawn[0].requires_grad_(), drawn[1]
    try:
        module = create_loss(params)
        labels = torch.arange(2).repeat(2) if params.paired else torch.arange(4)
        given = student, teacher if params.needs_teacher else None, labels % classes
        with warnings.catch_warnings(action="ignore"):  # such as of PLD: they are random logits
            loss = module(*given)
        gradient = None
        if isinstance(loss, Tensor) and loss.requires_grad and loss.ndim == 0:
            (gradient,) = torch.autograd.grad(loss, student, allow_unused=True)
    except Exception as error:
        where, reason = plugins.location(error), str(error).strip().partition("\n")[0]
        raise InputError(f"loss {params.name}: {where}{type(error).__name__}: {reason}") from error
    if not isinstance(loss, Tensor) or loss.ndim:
        shown = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(f"loss {params.name} gives {shown}: expected a tensor of one number")
    if not loss.isfinite():
        raise InputError(f"loss {params.name} is {loss.item()} on random logits")
    if gradient is None:
        raise InputError(
            f"loss {params.name} has no gradient for the student's logits: expected a function of "
            "them that torch can differentiate"
        )
    if not gradient.isfinite().all():
        raise InputError(f"loss {params.name} has a gradient that is not finite on random logits")


def check_features(
    trial: Trial,
    classes: int,
    channels: int,
    image_size: int,
    batch: int = 2,
    labels: npt.NDArray[np.int64] | None = None,
) -> None:
    """Check that the loss of a trial can compare the features of student and teacher.

    Args:
        trial: A trial whose loss is a `FeatureLoss`.
        classes: Number of classes.
        channels: Number of image channels.
        image_size: Height and width of the images, in pixels.
        batch: The smallest batch on which the student trains.
        labels: The labels of all training samples, [N], for a loss that keeps a memory of them.

    Raises:
        InputError: The features cannot be compared, or the loss cannot be used with the samples.
    """
    shape = classes, channels, image_size
    models = student_model(trial, *shape), teacher_model(trial, *shape)
    if models[0] != trial.student:
        check_model(models[0], *shape, batch)
    with torch.device("meta"):
        loss = create_loss(trial.loss)
        assert isinstance(loss, FeatureLoss)
        images = torch.zeros(batch, channels, image_size, image_size)
        networks = [create_model(model, *shape) for model in models]
        check_further(loss, *networks)
        asked = loss.student_further, loss.teacher_further
        features: list[Any] = [
            probe_features(*of) for of in zip(networks, [images] * 2, asked, strict=True)
        ]
        try:
            with plugins.errors_told(f"loss {trial.loss.name}"):
                loss.borrow(teacher_layers(networks[1], asked[1]))
                loss.connect(*features)
                if loss.takes_labels:
                    features.append(torch.zeros(batch, dtype=torch.int64))
                if loss.takes_samples:
                    assert labels is not None
                    loss.connect_samples(torch.tensor(labels, device="cpu"))
                    loss.to("meta")
                    features.append(torch.zeros(batch, dtype=torch.int64))
                loss.distance(*features)
        except InputError:
            raise
        except ValueError as error:
            if ONE_IMAGE in str(error):
                raise _one_image_told(f"loss {trial.loss.name}", image_size) from None
            raise InputError(f"{trial.teacher_name} → {trial.student.name}: {error}") from None


def check_model(
    model: Model | Weights, classes: int, channels: int, image_size: int, batch: int = 2
) -> list[str]:
    """Create a network without memory, run it once, and check the weights of a teacher.

    Args:
        model: A network to train, or a teacher with weights.
        classes: Number of classes.
        channels: Number of image channels.
        image_size: Height and width of the images, in pixels.
        batch: The smallest batch on which the network trains.

    Returns:
        Sentences for the user.

    Raises:
        InputError: The network cannot be created, does not take such images or batches, does not
            give one logit per class, or the weights cannot be read or do not fit the network.
    """
    with torch.device("meta"):
        try:
            with plugins.errors_told(f"model {model.name!r}"):
                network = create_model(model, classes, channels, image_size)
        except RuntimeError as error:  # of shapes; without memory, none can be missing
            where = plugins.location(error)
            raise InputError(f"model {model.name!r} cannot be made: {where}{error}") from None
        images = torch.zeros(batch, channels, image_size, image_size)
    notes: list[str] = []
    trains = not isinstance(model, Weights)
    _check_forward(model, network.train(trains), images, classes)
    if isinstance(model, Weights) and model.weights != "pretrained":
        known = len(model.mean or ())
        if known not in (0, channels) and (known, channels) != (3, 1):  # timm averages over colours
            raise InputError(
                f"teacher {model.name!r}: mean and std have {known} numbers: expected {channels}, "
                "one a channel"
            )
        _, notes = fit_weights(model.weights, network, model.name, classes)
    elif isinstance(model, Weights):
        _check_pretrained(model, classes)
    return notes


@torch.no_grad()
def _check_forward(
    model: Model | Weights, network: nn.Module, images: Tensor, classes: int
) -> None:
    """Raise InputError if the network does not turn images on the meta device into logits."""
    batch, channels, size, _ = images.shape
    what = f"model {model.name!r}" + (f" with {model.args}" if model.args else "")
    try:
        logits = network(images)
    except NotImplementedError:
        return  # an operation that torch cannot run without memory: the run will show
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        if where := plugins.location(error):
            reason = f"{where}{type(error).__name__}: {reason}"
        if ONE_IMAGE in reason:
            raise _one_image_told(what, size) from None
        raise InputError(
            f"{what} cannot run on images of {size}x{size} pixels with {channels} channels: "
            f"{reason}"
        ) from None
    shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != [batch, classes]:
        given = shape[-1] if isinstance(shape, list) and len(shape) == 2 else shape
        raise InputError(
            f"{what} gives {given} logits per image, but the data has {classes} classes: expected "
            f"{classes}; num_classes is set from the data"
        )


def _one_image_told(what: str, size: int) -> InputError:
    """Return the error of a batch norm that is given one image at a time, of one pixel each."""
    return InputError(
        f"{what} cannot train on a batch of one image of {size}x{size} pixels, because of its "
        "batch norm, and the last batch of an epoch has one image per worker: set drop_last: true "
        "or another batch_size"
    )


def _check_pretrained(teacher: Weights, classes: int) -> None:
    """Raise InputError if timm has no such weights, or has them for other classes."""
    config = timm.get_pretrained_cfg(teacher.name)
    if config is None or not config.has_weights:
        raise InputError(f"teacher {teacher.name!r} has no pretrained weights in timm")
    if config.num_classes != classes:
        raise InputError(
            f"teacher {teacher.name!r} has {config.num_classes} classes, but the data has "
            f"{classes}; student and teacher must have the same classes"
        )
