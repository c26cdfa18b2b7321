"""Datasets by name: finding, identifying, checking and loading them.

    settings -> found where it is stored -> fingerprint, size
             -> loaded: a part (limit, holdout), its mean and deviation

Small images are decoded into one uint8 array [N, H, W, channels] in memory, which all trials of a
machine share. Others stay encoded until a batch needs them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pld_ray import plugins
from pld_ray.config.parts import AUGMENTS, ON_THE_FLY, Data
from pld_ray.data import (
    sources,  # noqa: F401 - registers the datasets
    subsets,
)
from pld_ray.data.encoded import EncodedImages, StoredImages, decode_all, resize_array
from pld_ray.data.fingerprints import DRAWN, fingerprint
from pld_ray.data.images import Bytes, Found, Images, Size, Split, is_drawn
from pld_ray.data.registry import MAY_DOWNLOAD, find_dataset
from pld_ray.data.sampling import Ints, order
from pld_ray.errors import InputError, MissingError

if TYPE_CHECKING:
    from pld_ray.data.drawn import DrawnImages  # imports torch

MEASURED = 1024  # images of a large dataset that its mean and deviation are measured on
IN_MEMORY = 2**30  # bytes; decoded datasets above this size stay encoded


@contextmanager
def without_downloads() -> Iterator[None]:
    """Find only datasets that are on this machine, such as for a plan."""
    token = MAY_DOWNLOAD.set(False)
    try:
        yield
    finally:
        MAY_DOWNLOAD.reset(token)


def find(data: Data, strict: bool = True) -> Found:
    """Find the dataset that `data` names, and decode nothing.

    Args:
        data: The settings of the dataset.
        strict: Whether faults of the dataset are errors.

    Raises:
        MissingError: It is not on this machine.
        InputError: It cannot be used.
    """
    dataset, path = find_dataset(data)
    # Trials that differ only in these fields share the images.
    stored = data.model_copy(update={f: Data.model_fields[f].default for f in ON_THE_FLY})
    own = ("dataset", dataset.name) in plugins.PROVIDED
    try:
        with plugins.errors_told(f"data {data.name!r}"):
            found = _found(data, dataset.find(stored, path))
    except OSError as error:
        if own and isinstance(error, FileNotFoundError):  # results can be shown without the data
            said = f"data {data.name!r}: {error.filename or error} is not there"
            raise MissingError(said) from None
        place = f"{error.filename}: " if error.filename else ""
        raise InputError(
            f"data {data.name!r}: {place}cannot be read: {error.strerror or error}"
        ) from None
    if own:  # its state says when files change, and not when the code does
        found = replace(found, state=None)
    if strict and found.faults:
        raise InputError(found.faults[0])
    for split, (images, _) in (("train", found.train), ("val", found.val or found.train)):
        if len(images) == 0:
            raise InputError(f"data {data.name!r}: its {split} split has no images")
    return found


def _found(data: Data, given: Any) -> Found:
    """Return what a registered function gives as `Found`, after a check of its types.

    Raises:
        InputError: It is neither `Found` nor map-style datasets, or its parts do not fit.
    """
    if isinstance(given, Found):
        found = given
    elif isinstance(given, tuple) and len(given) == 2:
        from pld_ray.data.drawn import class_names, drawn_split

        train = drawn_split(data, given[0], "train")
        val = None if given[1] is None else drawn_split(data, given[1], "val")
        found = Found(
            train, val, class_names(given[0], int(train[1].max()) + 1, f"data {data.name!r}")
        )
        counts = np.bincount(train[1].clip(0), minlength=len(found.class_names))
        if len(empty := np.flatnonzero(counts == 0)):
            raise InputError(
                f"data {data.name!r}: no training image has the label {empty[0]}: expected images "
                f"of all {len(counts)} classes"
            )
    else:
        raise InputError(
            f"data {data.name!r}: its function gives a {type(given).__name__}: expected Found, or "
            "a training and a validation dataset"
        )
    if found.val is None and not data.holdout:
        raise InputError(f"data {data.name!r}: it has no validation split: set data.holdout")
    for split in (found.train, found.val):
        if split is not None and not found.faults:
            _check_split(data, *split, len(found.class_names))
    return found


def _check_split(data: Data, images: Any, labels: Any, classes: int) -> None:
    """Raise InputError if images and labels do not fit each other."""
    if (
        not hasattr(images, "read")
        and not hasattr(images, "draw")
        and not isinstance(images, np.ndarray)
    ):
        raise InputError(
            f"data {data.name!r}: its images are {type(images).__name__}: expected a uint8 array "
            "[N, H, W, channels]; or return two map-style datasets instead of Found"
        )
    if isinstance(images, np.ndarray) and (images.dtype != np.uint8 or images.ndim != 4):
        raise InputError(
            f"data {data.name!r}: its images are {images.dtype} {list(images.shape)}: expected "
            "uint8 [N, H, W, channels]"
        )
    if not isinstance(labels, np.ndarray) or labels.dtype != np.int64:
        said = getattr(labels, "dtype", type(labels).__name__)
        raise InputError(f"data {data.name!r}: its labels are {said}: expected an int64 array")
    if labels.shape != (len(images),):
        raise InputError(
            f"data {data.name!r}: there are {len(images)} images and labels of the shape "
            f"{list(labels.shape)}"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise InputError(
            f"data {data.name!r}: its labels are {labels.min()} to {labels.max()}, and it has "
            f"{classes} classes: expected 0 to {classes - 1}"
        )


def identify(data: Data) -> str | None:
    """Return the fingerprint of the dataset that `data` names; None if its name identifies it.

    Raises:
        MissingError: It is not on this machine.
        InputError: It cannot be used, or `data` names another fingerprint.
    """
    if find_dataset(data)[0].fixed:
        return None
    return _checked(data, find(data))


def _checked(data: Data, found: Found) -> str:
    """Return the fingerprint of a dataset; InputError if `data` names another one."""
    answer = fingerprint(found)
    if data.fingerprint not in (None, answer):
        raise InputError(
            f"data {data.name!r}: its fingerprint is {answer}, and data.fingerprint is "
            f"{data.fingerprint}: the data has changed; expected the same data, or no "
            "data.fingerprint"
        )
    return answer


def load(data: Data) -> Images:
    """Load the dataset that `data` names.

    Raises:
        InputError: It is not there, or it cannot be used.
    """
    found = find(data)
    identity = data.name if find_dataset(data)[0].fixed else _checked(data, found)
    (train, train_labels), kept, (val, val_labels), held = _parts(data, found)
    images = [_pixels(data, split, rows, identity) for split, rows in ((train, kept), (val, held))]
    if images[0].shape[1:] != images[1].shape[1:]:
        raise InputError(
            f"data {data.name!r}: train images are {images[0].shape[1:]} and val images "
            f"{images[1].shape[1:]}: set data.image_size"
        )
    kinds = ["floating-point" if getattr(each, "floats", False) else "uint8" for each in images]
    if kinds[0] != kinds[1]:
        raise InputError(
            f"data {data.name!r}: train images are {kinds[0]} and val images {kinds[1]}: expected "
            "the same"
        )
    check_augmentation(data, images[0])
    mean, std = _statistics(data, images[0])
    return Images(
        train=images[0],
        train_labels=train_labels[kept],
        val=images[1],
        val_labels=val_labels[held],
        classes=len(found.class_names),
        mean=mean,
        std=std,
        class_names=found.class_names,
    )


def check_augmentation(
    data: Data, train: Bytes | EncodedImages | DrawnImages, field: str = "data.augment"
) -> None:
    """Check that training images can be augmented as the settings say.

    Args:
        data: The settings.
        train: The training images.
        field: The field that names the transforms, for messages.

    Raises:
        InputError: They cannot.
    """
    if not isinstance(train, (np.ndarray, EncodedImages)):
        from pld_ray.data import drawn

        drawn.check_augmentation(data, train, field)
    elif "own" in data.augment:
        raise InputError(
            f"data.augment is own: {data.name} has no transform of its own; accepted: "
            f"{', '.join(sorted(set(AUGMENTS) - {'own'}))}"
        )
    channels = train.shape[3]
    uncoloured = "own", "random_erasing", "cutout"
    coloured = [name for name in data.augment if name not in uncoloured]
    if coloured and channels not in (1, 3):
        raise InputError(
            f"{field} is {coloured[0]}: the images of {data.name} have {channels} channels: "
            "expected grey or colour images, or random_erasing or cutout"
        )


def _parts(data: Data, found: Found) -> tuple[Split, Ints, Split, Ints]:
    """Return both splits, each followed by the rows that `holdout` and `limit` leave of it."""
    train, val = found.train, found.val
    kept = np.arange(len(train[1]))
    if data.holdout:
        if is_drawn(train[0]) and train[0].random:
            raise InputError(
                f"{train[0].name}: its images take random numbers, and validation images must not: "
                "expected no data.holdout, and a validation dataset"
            )
        most = len(kept) - len(np.unique(train[1]))
        if data.holdout > most:
            raise InputError(
                f"data.holdout is {data.holdout}: expected at most {most}, which leaves one "
                "training image per class"
            )
        kept, held = subsets.hold_out(train[1], data.holdout)
        val = train
    else:
        assert val is not None  # `find` refuses it
        held = np.arange(len(val[1]))
    if data.limit:
        kept = kept[subsets.draw(train[1][kept], data.limit)]
    return train, kept, val, held


def _pixels(
    data: Data, images: Bytes | StoredImages | DrawnImages, rows: Ints, identity: str
) -> Bytes | EncodedImages | DrawnImages:
    """Return rows of the images: decoded, or encoded if they are cropped at random or large."""
    if isinstance(images, np.ndarray):
        return resize_array(images[rows], data.image_size)
    if is_drawn(images):
        if data.image_size not in (None, images.image[0]):
            raise InputError(
                f"data.image_size is {data.image_size}: {data.name} gives images of "
                f"{images.image[0]} pixels; expected no image_size: resize in its transform"
            )
        return replace(images[rows], identity=identity)
    if len(empty := rows[images.sizes[rows] < 0]):
        images.read(int(empty[0]))  # says what is missing
    if data.image_size is None:
        return decode_all(data.name, images, rows)
    shorter = math.ceil(data.image_size / data.crop_pct)
    encoded = EncodedImages(images, rows, data.image_size, shorter, identity)
    if data.random_resized_crop or math.prod(encoded.shape) > IN_MEMORY:
        return encoded
    return encoded.decode(np.arange(len(rows)))


def describe(data: Data, images: Images) -> dict[str, Any]:
    """Return what a program needs to use a student of these images; records hold it.

    Returns:
        The fingerprint, mean and std per channel in [0, 1], the names of the classes, the number
        of channels and the image size in pixels, and the number of training and validation images.
    """
    _, channels, size = images.shape
    return {
        "fingerprint": data.fingerprint,
        "mean": list(images.mean),
        "std": list(images.std),
        "class_names": list(images.class_names),
        "channels": channels,
        "image_size": size,
        "train": len(images.train),
        "val": len(images.val),
    }


def sharing_key(data: Data) -> str:
    """Return a key: settings with the same key share one copy of the images.

    Augmentation that changes no image in memory is left out.
    """
    return data.model_dump_json(exclude=set(ON_THE_FLY))


def size(data: Data) -> Size:
    """Find the size of the dataset that `data` names, without decoding an image.

    Raises:
        InputError: It is not there.
    """
    found = find_dataset(data)[0].size
    if found is None:
        there = find(data)
        val = 0 if there.val is None else len(there.val[1])
        found = Size(len(there.train[1]), val, len(there.class_names))
    if data.holdout:
        held = min(data.holdout, found.train)
        found = found._replace(train=found.train - held, val=held)
    return found._replace(train=min(found.train, data.limit or found.train))


def _statistics(
    data: Data, train: Bytes | EncodedImages | DrawnImages
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel: those of `data`, else measured."""
    channels = train.shape[3]
    for field in ("mean", "std"):
        given = getattr(data, field)
        if given is not None and len(given) != channels:
            raise InputError(f"data.{field} is {given}: expected {channels} numbers, one a channel")
    if data.mean is not None and data.std is not None:
        return data.mean, data.std
    some = order(0, 0, len(train))
    if isinstance(train, EncodedImages):
        mean, std = measure(train.decode(some[:MEASURED]))
    elif isinstance(train, np.ndarray):
        mean, std = measure(train)
    elif train.floats:
        x = train.draw(some[:DRAWN], 0, 0)
        if data.mean is None and data.std is None and not 0 <= x.min() <= x.max() <= 1:
            raise InputError(
                f"{train.name}: its images have values from {x.min():.3g} to {x.max():.3g}: "
                "set data.mean and data.std to those with which its transform normalises"
            )
        mean, std = (0.0,) * channels, (1.0,) * channels
    else:
        mean, std = measure(train.draw(some[:MEASURED], 0, 0).numpy())
    return data.mean or mean, data.std or std


def measure(images: Bytes) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in [0, 1], exactly, from the histogram."""
    values = np.arange(256) / 255
    counts = np.stack([np.bincount(c.ravel(), minlength=256) for c in np.moveaxis(images, 3, 0)])
    weights = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    mean = weights @ values
    std = np.sqrt(np.maximum(weights @ values**2 - mean**2, 1e-12))
    return tuple(mean.tolist()), tuple(std.tolist())
