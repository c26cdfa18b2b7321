"""Datasets that are known by name: digits, CIFAR-10 and CIFAR-100."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pld_ray.config.trial import Data
from pld_ray.data.decoding import in_parallel, resize_and_crop
from pld_ray.data.images import Size
from pld_ray.data.registry import Splits, register_dataset
from pld_ray.errors import InputError


@register_dataset("digits", size=Size(1437, 360, 10))
def digits(data: Data, path: str) -> Splits:
    """Load 1,797 handwritten digits of 8x8 pixels, 10 classes, which scikit-learn ships.

    The last 360 are the validation split. Other people wrote them than the first ones.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    if data.image_size and data.image_size != images.shape[1]:
        images = np.stack([resize_and_crop(image[..., 0], data.image_size) for image in images])
        images = images[..., :1]
    labels = digits.target.astype(np.int64)
    return (images[:1437], labels[:1437]), (images[1437:], labels[1437:]), 10


@register_dataset("cifar10", size=Size(50_000, 10_000, 10))
@register_dataset("cifar100", size=Size(50_000, 10_000, 100))
def cifar(data: Data, path: str) -> Splits:
    """Load CIFAR-10 or CIFAR-100 (Krizhevsky 2009): images of 32x32 pixels."""
    from torchvision import datasets

    kind = datasets.CIFAR10 if data.name == "cifar10" else datasets.CIFAR100
    root = Path(data.root or "~/.cache/pld-ray").expanduser()
    splits = []
    for train in (True, False):
        try:
            split = kind(root, train=train, download=data.root is None)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"data {data.name!r} is not at {root} and could not be downloaded: set data.root "
                f"to the folder that holds {kind.base_folder} ({str(error).splitlines()[0]})"
            ) from None
        images = np.asarray(split.data)
        if data.image_size and data.image_size != images.shape[1]:
            images = in_parallel(lambda image: resize_and_crop(image, data.image_size), images)
        splits.append((images, np.asarray(split.targets, dtype=np.int64)))
    return splits[0], splits[1], 10 if data.name == "cifar10" else 100
