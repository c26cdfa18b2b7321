"""The registry of datasets: each by its name in YAML.

To add a dataset, write a function in a file of `sources` and decorate it:

    @register_dataset("faces")
    def faces(data: Data, path: str) -> Found:
        return Found((images, labels), (val_images, val_labels), class_names=("ann", "bob"))

It may also return two map-style datasets, for training and validation; None for the second leaves
validation to `data.holdout`. Their items are an image and its label; see `pld_ray.data.drawn`.

Nothing here imports torch, so that a plan can ask for the size of a dataset.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

from pld_ray.config.parts import Data
from pld_ray.config.paths import absolute_dataset
from pld_ray.data.images import Size
from pld_ray.errors import InputError, nearest
from pld_ray.plugins import PROVIDED, provide

Find = Callable[[Data, str], Any]  # Found, or two map-style datasets
_Find = TypeVar("_Find", bound=Find)


@dataclass(frozen=True)
class Dataset:
    """How one kind of dataset is found.

    Attributes:
        name: The name in YAML, without ":PATH".
        find: Finds both splits, and decodes nothing. Its arguments are the settings, and the path
            after the colon.
        size: The size, if it is the same for everybody.
        fixed: Whether the images are the same for everybody. They are then identified by the
            name, and need no fingerprint.
        has_path: Whether the name in YAML is followed by ":PATH".
        encodes: Whether `find` gives image files. A dataset of small images in an array cannot
            have random_resized_crop.
    """

    name: str
    find: Find
    size: Size | None
    fixed: bool
    has_path: bool
    encodes: bool


DATASETS: dict[str, Dataset] = {}
MAY_DOWNLOAD: ContextVar[bool] = ContextVar("MAY_DOWNLOAD", default=True)


def register_dataset(
    name: str,
    *,
    size: Size | None = None,
    fixed: bool = False,
    has_path: bool = False,
    encodes: bool = False,
) -> Callable[[_Find], _Find]:
    """Register a function that finds a dataset; see `Dataset` for the arguments.

    Raises:
        ValueError: Another dataset has this name.
    """

    def register(find: _Find) -> _Find:
        if not find.__module__.startswith("pld_ray."):
            from pld_ray.data import sources  # noqa: F401 - their names come first
        if name in DATASETS:
            raise ValueError(f"dataset {name!r} is registered already")
        DATASETS[name] = Dataset(name, find, size, fixed, has_path, encodes)
        provide("dataset", name, find.__module__, lambda: DATASETS.pop(name))
        return find

    return register


def find_dataset(data: Data) -> tuple[Dataset, str]:
    """Return the dataset that `data` names, and what follows the colon: an absolute path or a name.

    Raises:
        InputError: There is no such dataset, or it cannot be cropped as the settings ask.
    """
    kind, colon, _ = data.name.partition(":")
    found = DATASETS.get(kind)
    if found is None or bool(colon) != found.has_path:
        if found is not None and not colon:
            said = f"expected a path too, {kind}:PATH"
        elif found is not None:
            said = f"expected {kind!r} alone"
            if ("dataset", kind) in PROVIDED:
                said += "; register_dataset(..., has_path=True) lets it have a path"
        else:
            names = [f"{d.name}:PATH" if d.has_path else d.name for d in DATASETS.values()]
            said = f"no such dataset; {nearest(kind, names)}"
        raise InputError(f"data.name is {data.name!r}: {said}")
    if data.random_resized_crop and not found.encodes:
        raise InputError(f"data.random_resized_crop: {kind} has small images: use pad and flip")
    return found, absolute_dataset(data.name).partition(":")[2]
