"""Networks by name: `create_model` for students and teachers."""

from __future__ import annotations

import timm
from safetensors.torch import load_file
from torch import nn

from pld_ray.config.trial import Model, Weights
from pld_ray.errors import InputError, nearest

# ---------------------------------------------------------------- by name


def create_model(
    model: Model | Weights, classes: int, channels: int, image_size: int, pretrained: bool = False
) -> nn.Module:
    """The network `model` names, for images [channels, image_size, image_size].

    Raises InputError for a name timm does not know or arguments the network does not take.
    """
    base = model.name.split(".")[0]
    if not timm.is_model(model.name):
        hint = nearest(base, timm.list_models())
        raise InputError(f"model {model.name!r} is not known to timm; {hint}")
    args = {"num_classes": classes, "in_chans": channels, **model.args}
    config = timm.get_pretrained_cfg(model.name)
    if config is not None and config.fixed_input_size:  # a vision transformer's position table
        args.setdefault("img_size", image_size)
    try:
        return timm.create_model(model.name, pretrained=pretrained, **args)
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(
            f"model {model.name!r} cannot be made with {args}: {error or 'unsupported size'}"
        ) from None


def load_teacher(teacher: Weights, classes: int, channels: int, image_size: int) -> nn.Module:
    """A teacher from timm's pretrained weights or a safetensors file."""
    if teacher.weights == "pretrained":
        return create_model(teacher, classes, channels, image_size, pretrained=True)
    model = create_model(teacher, classes, channels, image_size)
    model.load_state_dict(load_file(teacher.weights))
    return model


def pretrained_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation a channel, in [0, 1], with which timm's weights were trained."""
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    return config.mean, config.std
