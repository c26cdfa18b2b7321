"""Map-style datasets of users: an image is drawn when a batch needs it.

Its transforms may draw from the generators of torch, numpy and Python. All three are seeded from
(seed, view, row) before an image is drawn, so that the image is a pure function of them.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pld_ray import plugins
from pld_ray.config.parts import Data
from pld_ray.data.sampling import Ints, random_bits
from pld_ray.errors import InputError

_RANDOM = "set data.augment to own, and each epoch has new ones"
MOST_CLASSES = 10**6
TRIED = 8  # images of each split that are drawn several times, to see whether they stay the same


@dataclass(frozen=True)
class DrawnImages:
    """Rows of a map-style dataset, with the length and shape of an array of its images.

    Attributes:
        dataset: The dataset; `dataset[i]` is an image and its label.
        rows: The indices of the images in the dataset, int64 [N].
        labels: The label of each image, int64 [N].
        name: What error messages call it.
        kind: The name under which the dataset is registered.
        image: The shape of each image, (H, W, channels).
        floats: Whether images are floating-point numbers. They are then used as they are.
        random: Whether drawing an image takes random numbers.
        identity: A text that identifies the content of the dataset.
    """

    dataset: Any
    rows: Ints
    labels: Ints
    name: str
    kind: str
    image: tuple[int, int, int]
    floats: bool
    random: bool = False
    identity: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Ints) -> DrawnImages:
        """Return the images with the indices `rows`."""
        return replace(self, rows=self.rows[rows], labels=self.labels[rows])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of an array of all images, (N, H, W, channels)."""
        return len(self), *self.image

    @property
    def digest(self) -> bytes:
        """A hash of the dataset and the rows."""
        return hashlib.sha256(self.identity.encode() + self.rows.tobytes()).digest()

    def draw(self, index: Ints, seed: int, view: int) -> Tensor:
        """Draw images.

        Args:
            index: The indices of the images, [B].
            seed: The random seed.
            view: The index of the augmentation.

        Returns:
            Images, uint8 or float32 [B, H, W, channels].

        Raises:
            InputError: An image cannot be drawn, it has another shape or type than the first, its
                label is not that of the dataset, or it is random and the first ones are not.
        """
        kind = torch.float32 if self.floats else torch.uint8
        out = torch.empty(len(index), *self.image, dtype=kind)
        rows, labels = self.rows[index], self.labels[index].tolist()
        # The same for all seeds and views if nothing is random.
        seeds = image_seeds(seed, view, rows, "own") if self.random else [0] * len(rows)
        for slot, (row, bits, label) in enumerate(zip(rows.tolist(), seeds, labels, strict=True)):
            image, drawn = draw_one(self.dataset, row, bits, self.name)
            if not self.random and _positions() != _SEEDED:
                raise InputError(
                    f"{self.name}: image {row} takes random numbers, and the first ones do not: "
                    + _RANDOM
                )
            _check_label(drawn, label, f"{self.name}: item {row}")
            if image.shape != self.image or image.dtype != kind:
                raise InputError(
                    f"{self.name}: image {row} is {image.dtype} {list(image.shape)}, and the first "
                    f"is {kind} {list(self.image)} (height, width, channels): expected one shape "
                    "and type; resize in its transform"
                )
            out[slot] = image
        return out


def image_seeds(seed: int, view: int, index: Ints, purpose: str) -> list[int]:
    """Return the seed of each image, for `seed_everything`; see `random_bits`."""
    return random_bits(seed, view, index, purpose).tolist()


def seed_everything(bits: int) -> None:
    """Seed the generators of torch, numpy and Python for one image."""
    torch.default_generator.manual_seed(bits >> 1)  # torch takes 63 bits
    np.random.seed(bits & 0xFFFFFFFF)
    random.seed(bits)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the generators of torch, numpy and Python at the end of the `with` block."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _positions() -> tuple[int, int, int]:
    """Return where the generators of torch, numpy and Python are in their sequences."""
    state = torch.default_generator.get_state()
    torch_left = int(state[8:16].numpy().view(np.int64)[0])  # numbers until the next block
    numpy_state: Any = np.random.get_state(legacy=False)
    return torch_left, numpy_state["state"]["pos"], random.getstate()[1][-1]


with generators_kept():
    seed_everything(0)
    _SEEDED = _positions()  # after any seed, before the first number


def draw_one(dataset: Any, row: int, bits: int, name: str) -> tuple[Tensor, Any]:
    """Draw an image [H, W, channels] and its label; `bits` is the seed.

    Raises:
        InputError: The dataset raises an error, or gives something else.
    """
    seed_everything(bits)
    try:
        item = dataset[row]
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{name}: image {row}: {plugins.location(error)}{type(error).__name__}: {said}"
        ) from error
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        raise InputError(
            f"{name}: item {row} is a {type(item).__name__}: expected an image and its label"
        )
    return _pixels(item[0], f"{name}: image {row}"), item[1]


def _pixels(image: Any, where: str) -> Tensor:
    """Return an image as a tensor [H, W, channels]."""
    if hasattr(image, "convert") and hasattr(image, "mode"):  # of Pillow
        if image.mode.startswith(("I", "F")):
            raise InputError(
                f"{where} has the mode {image.mode}, more than 8 bits per channel: expected L or "
                "RGB; scale it in the dataset"
            )
        image = np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        found = torch.from_numpy(np.array(image))
        found = found[..., None] if found.ndim == 2 else found
    elif (
        isinstance(image, Tensor)
        and image.ndim in (2, 3)
        and image.layout == torch.strided
        and not image.is_meta
    ):
        found = image.detach().as_subclass(Tensor)
        found = found[..., None] if found.ndim == 2 else found.permute(1, 2, 0)
        found = found.float() if found.is_floating_point() else found
    else:
        found = torch.empty(0, dtype=torch.int64)
    if found.dtype not in (torch.uint8, torch.float32):
        said = f"{image.dtype} {list(image.shape)}" if hasattr(image, "shape") else type(image)
        raise InputError(
            f"{where} is {said}: expected an image of Pillow, a uint8 array [H, W, channels], or a "
            "dense tensor [channels, H, W] of uint8 or floating-point numbers"
        )
    if 0 in found.shape:
        raise InputError(f"{where} is empty: its height, width and channels are {[*found.shape]}")
    if found.shape[0] != found.shape[1]:
        raise InputError(
            f"{where} has {found.shape[1]}x{found.shape[0]} pixels: expected a square; crop it in "
            "the transform of the dataset"
        )
    if found.dtype == torch.float32 and not found.isfinite().all():
        raise InputError(f"{where} has values that are not finite")
    return found


def drawn_split(data: Data, dataset: Any, split: str) -> tuple[DrawnImages, Ints]:
    """Return the images and labels of a map-style dataset, after trying some of its images.

    Args:
        data: The settings of the dataset.
        dataset: The dataset.
        split: "train" or "val".

    Raises:
        InputError: It is not such a dataset, or its images are not a pure function of the seeds.
    """
    name = f"data {data.name!r}, {split}"
    try:
        count = len(dataset)
    except (TypeError, ValueError, OverflowError):
        raise InputError(
            f"{name}: {type(dataset).__name__} has no length: expected a map-style dataset"
        ) from None
    if count == 0:
        raise InputError(f"data {data.name!r}: its {split} split has no images")
    with generators_kept():
        first, _ = draw_one(dataset, 0, 0, name)
        floats = first.dtype == torch.float32
        height, width, channels = first.shape
        labels = _labels(dataset, count, name)
        shape, kind = (height, width, channels), data.name.partition(":")[0]
        images = DrawnImages(dataset, np.arange(count), labels, name, kind, shape, floats)
        random_ones = _try(images, labels)
    if random_ones and split == "val":
        raise InputError(
            f"{name}: its images take random numbers, and validation images must not: expected a "
            "dataset without randomness"
        )
    return replace(images, random=random_ones), labels


def check_augmentation(data: Data, images: DrawnImages, field: str = "data.augment") -> None:
    """Check the augmentation of a map-style dataset.

    Args:
        data: The settings.
        images: The images of the dataset.
        field: The field that names the transforms, for messages.

    Raises:
        InputError: Its images are random and `augment` does not say so, or they are
            floating-point numbers and would be augmented.
    """
    if images.random and "own" not in data.augment:
        raise InputError(f"{images.name}: its images are random: {_RANDOM}")
    further = [name for name in data.augment if name != "own"]
    if images.floats and (data.pad or data.flip or further):
        field = "data.pad" if data.pad else "data.flip" if data.flip else field
        raise InputError(
            f"{field}: {images.name} gives floating-point images, which are used as they are: "
            "expected images of uint8, or the augmentation in the dataset's own transform"
        )


def _labels(dataset: Any, count: int, name: str) -> Ints:
    """Return the labels: the `targets` or `labels` of the dataset, or those of its items."""
    try:
        found = _targets(dataset)
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{name}: the labels of its images cannot be found: {error}") from None
    if found is None:
        found = [draw_one(dataset, row, 0, name)[1] for row in range(count)]
    try:
        labels = np.asarray(found)
    except ValueError:  # of different lengths
        labels = np.empty(0)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise InputError(
            f"{name}: its labels are {labels.dtype} {list(labels.shape)}: expected one class index "
            f"for each of {count} images"
        )
    for row in np.flatnonzero((labels < 0) | (labels > MOST_CLASSES))[:1]:
        raise InputError(
            f"{name}: item {row} has the label {labels[row]}: expected a class index from 0 to "
            f"{MOST_CLASSES}"
        )
    return labels.astype(np.int64)


def class_names(dataset: Any, count: int, name: str) -> tuple[str, ...]:
    """Return the `classes` of a dataset, or of the dataset of which it is a part, else numbers.

    Args:
        dataset: The dataset.
        count: The number of classes, where the dataset does not name them.
        name: What error messages call the dataset.
    """
    while isinstance(dataset, torch.utils.data.Subset):
        dataset = dataset.dataset
    known = getattr(dataset, "classes", None)
    if known is None or (isinstance(known, Sized) and len(known) == 0):
        known = range(count)
    if not isinstance(known, (Sequence, np.ndarray)) or isinstance(known, str):
        raise InputError(
            f"{name}: its classes are {known!r}: expected a list of names, in the order of labels"
        )
    return tuple(map(str, known))


def _targets(dataset: Any) -> Any:
    """Return the labels that a dataset knows without drawing, or None."""
    if isinstance(dataset, torch.utils.data.Subset):
        inner = _targets(dataset.dataset)
        return None if inner is None else np.asarray(inner)[np.asarray(dataset.indices)]
    if isinstance(dataset, torch.utils.data.TensorDataset):
        return dataset.tensors[1]
    return getattr(dataset, "targets", getattr(dataset, "labels", None))


def _try(images: DrawnImages, labels: Ints) -> bool:
    """Draw some images twice. Return whether they are random.

    They are random if drawing one takes numbers from a generator. Comparing images would miss a
    transform that seldom changes an image.

    Raises:
        InputError: An image or its label differs with the same seeds, or a label is random.
    """
    rows = np.unique(np.linspace(0, len(images) - 1, TRIED).astype(int))
    seeds = image_seeds(0, 0, rows, "own"), image_seeds(0, 1, rows, "own")
    pairs = list(zip(rows.tolist(), *seeds, strict=True))
    first: dict[int, Tensor] = {}
    random_ones = False
    for row, bits, other in pairs:
        for seed in (other, bits):
            first[row], label = draw_one(images.dataset, row, seed, images.name)
            random_ones |= _positions() != _SEEDED
            _check_label(label, int(labels[row]), f"{images.name}: item {row}")
    for row, bits, _ in pairs[::-1]:
        second, _ = draw_one(images.dataset, row, bits, images.name)
        if first[row].shape != second.shape or not torch.equal(first[row], second):
            raise InputError(
                f"{images.name}: image {row} differs when it is drawn twice with the same seeds: "
                "expected a dataset that draws only from torch, numpy.random and random, and keeps "
                "no state between images"
            )
    return random_ones


def _check_label(drawn: Any, label: int, where: str) -> None:
    """Raise InputError if the label of an item is not the one that the dataset has for it."""
    try:
        same = int(drawn) == label
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"{where} has the label {drawn!r}: expected a class index, such as {label}"
        ) from None
    if not same:
        raise InputError(
            f"{where} has the label {int(drawn)}, and the targets of the dataset say {label}: "
            "expected labels that are not random"
        )
