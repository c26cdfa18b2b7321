"""The registry of datasets: each by its name in YAML.

To add a dataset, write a function in a file of `sources` and decorate it:

    @register_dataset("faces", size=Size(train=9000, val=1000, classes=40))
    def faces(data: Data, path: str) -> Splits:
        return (train_images, train_labels), (val_images, val_labels), 40

Nothing here imports torch, so that a plan can ask for the size of a dataset.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pld_ray.config.trial import Data
from pld_ray.data.images import Size, Split
from pld_ray.errors import InputError, nearest

Splits = tuple[Split, Split, int]  # training split, validation split, number of classes
Load = Callable[[Data, str], Splits]
_Load = TypeVar("_Load", bound=Load)


@dataclass(frozen=True)
class Dataset:
    """How one kind of dataset is loaded.

    Attributes:
        name: The name in YAML, without ":PATH".
        load: Loads both splits. Its arguments are the settings and the path after the colon.
        size: The size, or a function of the same arguments that finds it without decoding images.
        has_path: Whether the name in YAML is followed by ":PATH".
        encodes: Whether `load` gives encoded images when the settings ask for
            random_resized_crop. Datasets of small images cannot be cropped in this way.
    """

    name: str
    load: Load
    size: Size | Callable[[Data, str], Size]
    has_path: bool
    encodes: bool


DATASETS: dict[str, Dataset] = {}


def register_dataset(
    name: str,
    *,
    size: Size | Callable[[Data, str], Size],
    has_path: bool = False,
    encodes: bool = False,
) -> Callable[[_Load], _Load]:
    """Register a function that loads a dataset; see `Dataset` for the arguments.

    Raises:
        ValueError: Another dataset has this name.
    """

    def register(load: _Load) -> _Load:
        if name in DATASETS:
            raise ValueError(f"dataset {name!r} is registered already")
        DATASETS[name] = Dataset(name, load, size, has_path, encodes)
        return load

    return register


def find_dataset(data: Data) -> tuple[Dataset, str]:
    """Return the dataset that `data` names, and the path after the colon.

    Raises:
        InputError: There is no such dataset, or it cannot be cropped as the settings ask.
    """
    kind, colon, path = data.name.partition(":")
    found = DATASETS.get(kind)
    if found is None or bool(colon) != found.has_path:
        names = [f"{d.name}:PATH" if d.has_path else d.name for d in DATASETS.values()]
        raise InputError(f"data.name is {data.name!r}: no such dataset; {nearest(kind, names)}")
    if data.random_resized_crop and not found.encodes:
        raise InputError(f"data.random_resized_crop: {kind} has small images: use pad and flip")
    return found, path
