"""Create students and teachers by their timm names, and load the weights of teachers."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

from pld_ray import plugins
from pld_ray.config.parts import Model, Weights
from pld_ray.config.trial import Trial
from pld_ray.errors import InputError, nearest
from pld_ray.losses import create_loss
from pld_ray.models.reused import map_shapes
from pld_ray.models.weights import fit_weights

# arguments of timm.create_model that decide with which weights a network begins
WEIGHTS_ARGS = set(
    ["pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"]
)
# what networks raise for wrong arguments; too little memory is a RuntimeError
MADE_WRONG = (TypeError, ValueError, AssertionError, ArithmeticError, LookupError, AttributeError)


def create_model(
    model: Model | Weights, classes: int, channels: int, image_size: int, pretrained: bool = False
) -> nn.Module:
    """Create a network by its timm name.

    Args:
        model: The name of the network and further arguments for `timm.create_model`.
        classes: Number of classes.
        channels: Number of image channels.
        image_size: Height and width of the images, in pixels.
        pretrained: Whether to load timm's pretrained weights.

    Raises:
        InputError: timm does not know the name, or the network does not accept the arguments.
    """
    base = model.name.split(".")[0]
    if not timm.is_model(model.name):
        hint = nearest(base, timm.list_models())
        raise InputError(f"model {model.name!r} is not known to timm; {hint}")
    if taken := sorted(WEIGHTS_ARGS & model.args.keys()):
        raise InputError(
            f"model {model.name!r}: args.{taken[0]} is not accepted: students are trained from "
            "scratch, and a teacher has weights: pretrained or a file"
        )
    args = {"num_classes": classes, "in_chans": channels, **model.args}
    try:
        config = timm.get_pretrained_cfg(model.name)
    except RuntimeError:
        known = timm.list_models(f"{base}.*", pretrained=True)
        hint = nearest(model.name, known) if known else "it has none in timm"
        raise InputError(f"model {model.name!r}: no such pretrained weights; {hint}") from None
    if config is not None and config.fixed_input_size:  # such as a vision transformer
        args.setdefault("img_size", image_size)
    try:
        return timm.create_model(model.name, pretrained=pretrained, **args)
    except MADE_WRONG as error:
        where = plugins.location(error)
        kind = f"{type(error).__name__}: " if where else ""
        raise InputError(
            f"model {model.name!r} cannot be made with {args}: {where}{kind}"
            f"{error or 'unsupported size'}"
        ) from None


def student_model(trial: Trial, classes: int, channels: int, image_size: int) -> Model:
    """Return the network that a trial trains, evaluates and keeps.

    That is the student of the trial, unless its loss makes another network of it.

    Args:
        trial: The trial.
        classes: Number of classes.
        channels: Number of image channels.
        image_size: Height and width of the images, in pixels.

    Raises:
        InputError: A network cannot be made, or the loss cannot use it.
    """
    if not trial.loss.needs_features:
        return trial.student
    shape = classes, channels, image_size
    with torch.random.fork_rng(devices=[]), torch.device("meta"):  # draws no number of the trial's
        loss = create_loss(trial.loss)
        if not loss.reuses_classifier:
            return trial.student
        student, teacher = (
            create_model(each, *shape) for each in (trial.student, teacher_model(trial, *shape))
        )
        images = torch.zeros(1, channels, image_size, image_size)
        inputs, width, size = map_shapes(student, teacher, images)
    own = {"student": trial.student.name, "student_args": trial.student.args, "inputs": inputs}
    own |= {"width": width, "size": list(size), "factor": loss.factor}
    return Model(name="reused_classifier", args=own)


def teacher_model(trial: Trial, classes: int, channels: int, image_size: int) -> Model | Weights:
    """Return the network of the teacher of a trial, which has one; see `student_model`."""
    if isinstance(trial.teacher, Trial):
        return student_model(trial.teacher, classes, channels, image_size)
    assert trial.teacher is not None
    return trial.teacher


def create_student(trial: Trial, classes: int, channels: int, image_size: int) -> nn.Module:
    """Create the network that a trial trains, evaluates and keeps; see `student_model`."""
    shape = classes, channels, image_size
    return create_model(student_model(trial, *shape), *shape)


def load_teacher(teacher: Weights, classes: int, channels: int, image_size: int) -> nn.Module:
    """Load a teacher from timm's pretrained weights or from a file.

    Args:
        teacher: The name of the network and its weights.
        classes: Number of classes.
        channels: Number of image channels.
        image_size: Height and width of the images, in pixels.
    """
    if teacher.weights == "pretrained":
        return create_model(teacher, classes, channels, image_size, pretrained=True)
    model = create_model(teacher, classes, channels, image_size)
    state, _ = fit_weights(teacher.weights, model, teacher.name, classes)
    model.load_state_dict(state)
    return model


class Renormalize(nn.Module):
    """Images normalised by one mean and standard deviation to images normalised by another.

    Args:
        mean: Mean of each channel of the incoming images, in [0, 1].
        std: Their standard deviation.
        to_mean: Mean of each channel that the network was trained with.
        to_std: Its standard deviation. With one channel in and three here (timm sums its weights
            over the channels for grey images) their averages are used.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        to_mean: tuple[float, ...],
        to_std: tuple[float, ...],
    ) -> None:
        super().__init__()
        ours, theirs = (
            [torch.tensor(x) for x in pair] for pair in ((mean, std), (to_mean, to_std))
        )
        if len(ours[0]) != len(theirs[0]):
            theirs = [x.mean(0, keepdim=True) for x in theirs]
        scale, shift = ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]
        self.register_buffer("scale", scale[:, None, None], persistent=False)
        self.register_buffer("shift", shift[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return images [B, channels, H, W] under the other normalisation."""
        return x * self.scale + self.shift


def pretrained_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the image normalisation that timm's pretrained weights were trained with.

    Args:
        name: The timm name of the network.

    Returns:
        Mean and standard deviation per channel, for pixel values in [0, 1].
    """
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    return config.mean, config.std
