"""What a dataset is once it is loaded: images, labels and their statistics."""

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
    """A dataset: images uint8 [N, H, W, channels], labels int64 [N] in [0, classes)."""

    train: Pixels
    train_labels: Ints
    val: Pixels
    val_labels: Ints
    classes: int
    mean: tuple[float, ...]  # per channel, in [0, 1]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(classes, channels, image size): what a network must be made for."""
        return self.classes, self.train.shape[3], self.train.shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits: the hash of all that the dataset holds, wherever it came from."""
        digest = hashlib.sha256(repr((self.classes, self.mean, self.std)).encode())
        for array in (self.train, self.train_labels, self.val, self.val_labels):
            digest.update(str(array.shape).encode())
            if isinstance(array, EncodedImages):
                digest.update(array.digest)
            else:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]


class Size(NamedTuple):
    """How many images of each split, and how many classes."""

    train: int
    val: int
    classes: int


NO_IMAGES = np.zeros((0, 1, 1, 3), np.uint8)
