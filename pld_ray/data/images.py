"""The types of a dataset: as it is found, and as trials see it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from typing_extensions import TypeIs

from pld_ray.data.encoded import EncodedImages, StoredImages
from pld_ray.data.sampling import Ints

if TYPE_CHECKING:
    from pld_ray.data.drawn import DrawnImages  # imports torch

Bytes = npt.NDArray[np.uint8]
Split = tuple["Bytes | StoredImages | DrawnImages", Ints]  # images and labels [N]


def is_drawn(images: Any) -> TypeIs[DrawnImages]:
    """Return whether images are those of a map-style dataset."""
    return not isinstance(images, np.ndarray) and not hasattr(images, "sizes")


@dataclass(frozen=True)
class Found:
    """A dataset where it is stored. Nothing is decoded yet.

    Attributes:
        train: The training images, and their labels, int64 [N], in [0, C). Images are a uint8
            array [N, H, W, channels], image files (`StoredImages`), or a map-style dataset
            (`DrawnImages`).
        val: The same for the validation images; None if the dataset has no validation split.
        class_names: The names of the C classes, in the order of the labels.
        state: A text that changes when the files change, such as their sizes and times. The
            fingerprint is cached by it. None: the fingerprint is not cached.
        faults: Sentences that say what is wrong with the dataset. It cannot be used if there are
            any.
    """

    train: Split
    val: Split | None
    class_names: tuple[str, ...]
    state: str | None = None
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Images:
    """A dataset as trials see it, after `holdout`, `limit` and `image_size`.

    Attributes:
        train: The training images, uint8 [N, H, W, channels].
        train_labels: The training labels, int64 [N], in [0, classes).
        val: The validation images, uint8 [N, H, W, channels].
        val_labels: The validation labels, int64 [N], in [0, classes).
        classes: The number of classes.
        mean: The mean of each channel, in [0, 1].
        std: The standard deviation of each channel, in [0, 1].
        class_names: The names of the classes.
    """

    train: Bytes | EncodedImages | DrawnImages
    train_labels: Ints
    val: Bytes | EncodedImages | DrawnImages
    val_labels: Ints
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(classes, channels, image size): the sizes that a network needs."""
        return self.classes, self.train.shape[3], self.train.shape[1]

    def check_visible(self) -> None:
        """Raise InputError if this machine does not see the files of images that stay encoded."""
        for images in (self.train, self.val):
            if isinstance(images, EncodedImages):
                images.files.check_visible()

    @cached_property
    def digest(self) -> str:
        """The hash of images, labels and statistics, as 16 hex digits.

        It does not depend on where the dataset is stored. Teacher logits are stored under it.
        """
        digest = hashlib.sha256(repr((self.classes, self.mean, self.std)).encode())
        for array in (self.train, self.train_labels, self.val, self.val_labels):
            digest.update(str(array.shape).encode())
            if isinstance(array, np.ndarray):
                digest.update(np.ascontiguousarray(array).data)
            else:
                digest.update(array.digest)
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
