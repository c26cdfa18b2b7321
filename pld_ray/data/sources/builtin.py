"""Datasets that are known by name: digits, CIFAR-10 and CIFAR-100."""

from __future__ import annotations

import numpy as np

from pld_ray.config.parts import Data
from pld_ray.config.paths import absolute
from pld_ray.data.fingerprints import cache_folder
from pld_ray.data.images import Found, Size
from pld_ray.data.registry import register_dataset
from pld_ray.errors import MissingError


@register_dataset("digits", size=Size(1437, 360, 10), fixed=True)
def digits(data: Data, path: str) -> Found:
    """Load 1,797 handwritten digits of 8x8 pixels, 10 classes, which scikit-learn ships.

    The last 360 are the validation split. Other people wrote them than the first ones.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    names = tuple(str(digit) for digit in range(10))
    return Found((images[:1437], labels[:1437]), (images[1437:], labels[1437:]), names)


@register_dataset("cifar10", size=Size(50_000, 10_000, 10), fixed=True)
@register_dataset("cifar100", size=Size(50_000, 10_000, 100), fixed=True)
def cifar(data: Data, path: str) -> Found:
    """Load CIFAR-10 or CIFAR-100 (Krizhevsky 2009): images of 32x32 pixels."""
    from torchvision import datasets

    kind = datasets.CIFAR10 if data.name == "cifar10" else datasets.CIFAR100
    root = absolute(data.root) if data.root else cache_folder()
    splits = []
    for train in (True, False):
        try:
            split = kind(root, train=train, download=data.root is None)
        except (OSError, RuntimeError) as error:
            raise MissingError(
                f"data {data.name!r} is not at {root} and could not be downloaded: set data.root "
                f"to the folder that holds {kind.base_folder} ({str(error).splitlines()[0]})"
            ) from None
        splits.append((np.asarray(split.data), np.asarray(split.targets, dtype=np.int64)))
    count = 10 if data.name == "cifar10" else 100
    names = getattr(split, "classes", None) or [str(label) for label in range(count)]
    return Found(splits[0], splits[1], tuple(names))
