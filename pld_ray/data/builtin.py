"""Datasets that are known by name: digits, CIFAR-10 and CIFAR-100."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pld_ray.config.trial import Data
from pld_ray.data.decoding import in_parallel, resize
from pld_ray.data.images import Split
from pld_ray.errors import InputError


def digits(data: Data, path: str) -> tuple[Split, Split, int]:
    """1797 handwritten digits of 8x8 pixels, 10 classes, shipped by scikit-learn.

    The last 360 are held out: they are written by other people than the first.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    if data.image_size:
        images = np.stack([resize(image[..., 0], data.image_size) for image in images])
        images = images[..., :1]
    labels = digits.target.astype(np.int64)
    return (images[:1437], labels[:1437]), (images[1437:], labels[1437:]), 10


def cifar(data: Data, path: str) -> tuple[Split, Split, int]:
    """CIFAR-10 or CIFAR-100: 50,000 and 10,000 images of 32x32 pixels."""
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
            images = in_parallel(lambda image: resize(image, data.image_size), images)
        splits.append((images, np.asarray(split.targets, dtype=np.int64)))
    return splits[0], splits[1], 10 if data.name == "cifar10" else 100
