"""The types of a loaded dataset: images, labels and their statistics."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pld_ray.data.encoded import EncodedImages
from pld_ray.data.sampling import Ints

Bytes = npt.NDArray[np.uint8]
Pixels = Bytes | EncodedImages  # [N, H, W, channels]
Split = tuple[Pixels, Ints]  # images, labels [N]


@dataclass(frozen=True)
class Images:
    """A loaded dataset.

    Attributes:
        train: The training images, uint8 [N, H, W, channels].
        train_labels: The training labels, int64 [N], in [0, classes).
        val: The validation images, uint8 [N, H, W, channels].
        val_labels: The validation labels, int64 [N], in [0, classes).
        classes: The number of classes.
        mean: The mean of each channel, in [0, 1].
        std: The standard deviation of each channel, in [0, 1].
    """

    train: Pixels
    train_labels: Ints
    val: Pixels
    val_labels: Ints
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(classes, channels, image size): the sizes that a network needs."""
        return self.classes, self.train.shape[3], self.train.shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """The hash of images, labels and statistics, as 16 hex digits.

        It does not depend on where the dataset is stored. Encoded images enter by name and size.
        """
        digest = hashlib.sha256(repr((self.classes, self.mean, self.std)).encode())
        for array in (self.train, self.train_labels, self.val, self.val_labels):
            digest.update(str(array.shape).encode())
            if isinstance(array, EncodedImages):
                digest.update(array.digest)
            else:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]


class Size(NamedTuple):
    """The size of a dataset.

    Attributes:
        train: The number of training images.
        val: The number of validation images.
        classes: The number of classes.
    """

    train: int
    val: int
    classes: int


NO_IMAGES = np.zeros((0, 1, 1, 3), np.uint8)
