"""Datasets by name: loading and checking them, and finding their size.

A dataset is two uint8 arrays [N, H, W, channels] in memory, which all trials of a node share, or
two lists of encoded images that stand for such arrays.
"""

from __future__ import annotations

import numpy as np

from pld_ray.config.trial import Data
from pld_ray.data import sources  # noqa: F401 - registers the datasets
from pld_ray.data.encoded import EncodedImages
from pld_ray.data.images import NO_IMAGES, Bytes, Images, Size
from pld_ray.data.registry import find_dataset
from pld_ray.data.sampling import order
from pld_ray.errors import InputError

MEASURED = 1024  # images of a large dataset that its mean and deviation are measured on


def load(data: Data) -> Images:
    """Load the dataset that `data` names.

    Raises:
        InputError: It is not there, or it cannot be used.
    """
    dataset, path = find_dataset(data)
    (train, train_labels), (val, val_labels), classes = dataset.load(data, path)
    if data.holdout:
        val, val_labels = train[-data.holdout :], train_labels[-data.holdout :]
        train, train_labels = train[: -data.holdout], train_labels[: -data.holdout]
    train, train_labels = train[: data.limit], train_labels[: data.limit]
    for name, images, labels in (("train", train, train_labels), ("val", val, val_labels)):
        if len(images) == 0:
            raise InputError(f"data {data.name!r}: its {name} split has no images")
        if labels.min() < 0 or labels.max() >= classes:
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise InputError(
                f"data {data.name!r}: {name} has a label {wrong}: expected 0..{classes - 1}"
            )
    if train.shape[1:] != val.shape[1:]:
        raise InputError(
            f"data {data.name!r}: train images are {train.shape[1:]} and val images "
            f"{val.shape[1:]}: set data.image_size"
        )
    channels = train.shape[3]
    for field in ("mean", "std"):
        given = getattr(data, field)
        if given is not None and len(given) != channels:
            raise InputError(f"data.{field} is {given}: expected {channels} numbers, one a channel")
    if isinstance(train, EncodedImages):
        some = order(0, 0, len(train))[:MEASURED]
        sample = train.decode(some) if data.mean is None or data.std is None else NO_IMAGES
    else:
        sample = train
    mean, std = _statistics(sample)
    return Images(train, train_labels, val, val_labels, classes, data.mean or mean, data.std or std)


def sharing_key(data: Data) -> str:
    """Return a key: settings with the same key share one copy of the images.

    Padding and flips are left out, since they change no image in memory.
    """
    return data.model_copy(update={"pad": 0, "flip": False}).model_dump_json()


def size(data: Data) -> Size:
    """Find the size of the dataset that `data` names, without decoding an image.

    Raises:
        InputError: It is not there.
    """
    dataset, path = find_dataset(data)
    found = dataset.size(data, path) if callable(dataset.size) else dataset.size
    if data.holdout:
        held = min(data.holdout, found.train)
        found = found._replace(train=found.train - held, val=held)
    return found._replace(train=min(found.train, data.limit or found.train))


def _statistics(images: Bytes) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in [0, 1], exactly, from the histogram."""
    values = np.arange(256) / 255
    counts = np.stack([np.bincount(c.ravel(), minlength=256) for c in np.moveaxis(images, 3, 0)])
    weights = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    mean = weights @ values
    std = np.sqrt(np.maximum(weights @ values**2 - mean**2, 1e-12))
    return tuple(mean.tolist()), tuple(std.tolist())
