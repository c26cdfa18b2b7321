"""Datasets by name, and the order of their samples.

A dataset is two uint8 arrays [N, H, W, channels] in memory, shared by all trials of a node, or two
lists of encoded images that stand for such arrays (encoded.py). Everything random is computed from
(seed, epoch, index) by a hash, never from a generator's running state: so it is the same in every
trial, on every number of workers, and after a resume. What is made of it, batches of augmented
images, stands in stream.py; nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pld_ray.config.trial import Data
from pld_ray.data.builtin import cifar, digits
from pld_ray.data.encoded import EncodedImages
from pld_ray.data.folders import folder, imagenet, list_folder
from pld_ray.data.images import NO_IMAGES, Bytes, Images, Size, Split
from pld_ray.data.parquet import PARQUET, parquet, read_parquet
from pld_ray.data.sampling import order
from pld_ray.errors import InputError, nearest

# ---------------------------------------------------------------- datasets by name


def load(data: Data) -> Images:
    """The dataset `data` names; InputError if it is not there or not usable."""
    kind, path = _kind(data)
    (train, train_labels), (val, val_labels), classes = LOADERS[kind](data, path)
    if data.holdout:
        val, val_labels = train[-data.holdout :], train_labels[-data.holdout :]
        train, train_labels = train[: -data.holdout], train_labels[: -data.holdout]
    train, train_labels = train[: data.limit], train_labels[: data.limit]
    for name, images, labels in (("train", train, train_labels), ("val", val, val_labels)):
        if len(images) == 0:
            raise InputError(f"data {data.name!r}: its {name} split has no images")
        if labels.min() < 0 or labels.max() >= classes:
            raise InputError(
                f"data {data.name!r}: {name} has a label {labels.max()}, expected 0..{classes - 1}"
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
    """Settings with the same key share one copy of the images; augmentation is left out."""
    return data.model_copy(update={"pad": 0, "flip": False}).model_dump_json()


def size(data: Data) -> Size:
    """The size of the dataset `data` names, without decoding an image.

    Raises InputError if it is not there.
    """
    kind, path = _kind(data)
    match kind:
        case "digits":
            found = Size(1437, 360, 10)
        case "cifar10" | "cifar100":
            found = Size(50000, 10000, int(kind[5:]))
        case "imagenet":
            found = Size(1281167, 50000, 1000)
        case "folder":
            train, val, classes = list_folder(data, path)
            found = Size(len(train[1]), len(val[1]), classes)
        case _:
            labels = [read_parquet(data, path, names, ["label"])["label"] for names in PARQUET]
            classes = max(max(x, default=0) for x in labels) + 1
            found = Size(len(labels[0]), len(labels[1]), classes)
    if data.holdout:
        held = min(data.holdout, found.train)
        found = found._replace(train=found.train - held, val=held)
    return found._replace(train=min(found.train, data.limit or found.train))


def _kind(data: Data) -> tuple[str, str]:
    """The key in LOADERS, and what follows the colon."""
    kind, _, path = data.name.partition(":")
    if kind not in LOADERS or (":" in data.name) != (kind in ("folder", "parquet")):
        names = [f"{name}:PATH" if name in ("folder", "parquet") else name for name in LOADERS]
        raise InputError(f"data.name is {data.name!r}: no such dataset; {nearest(kind, names)}")
    return kind, path


def _statistics(images: Bytes) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in [0, 1]; exact, from the histogram."""
    values = np.arange(256) / 255
    counts = np.stack([np.bincount(c.ravel(), minlength=256) for c in np.moveaxis(images, 3, 0)])
    weights = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    mean = weights @ values
    std = np.sqrt(np.maximum(weights @ values**2 - mean**2, 1e-12))
    return tuple(mean.tolist()), tuple(std.tolist())


MEASURED = 1024  # images whose mean and deviation stand for those of a large dataset
LOADERS: dict[str, Callable[[Data, str], tuple[Split, Split, int]]] = {
    "digits": digits,
    "cifar10": cifar,
    "cifar100": cifar,
    "imagenet": imagenet,
    "folder": folder,
    "parquet": parquet,
}
