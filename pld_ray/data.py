"""Datasets by name, and the stream: images as a pure function of (seed, epoch, index).

A dataset is two uint8 arrays [N, H, W, channels] in memory, shared by all trials of a node.
Which samples form a batch, and how each is cropped and flipped, is computed from
(seed, epoch, index) by a hash, never from a generator's running state: so it is the same in every
trial, on every number of workers, and after a resume.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pld_ray.errors import InputError, nearest
from pld_ray.spec import Data

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Split = tuple[Bytes, Ints]  # images [N, H, W, channels], labels [N]


@dataclass(frozen=True)
class Images:
    """A dataset in memory: images uint8 [N, H, W, channels], labels int64 [N] in [0, classes)."""

    train: Bytes
    train_labels: Ints
    val: Bytes
    val_labels: Ints
    classes: int
    mean: tuple[float, ...]  # per channel, in [0, 1]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(classes, channels, image size): what a network must be made for."""
        return self.classes, self.train.shape[3], self.train.shape[1]


# ---------------------------------------------------------------- datasets by name


def load(data: Data) -> Images:
    """The dataset `data` names; InputError if it is not there or not usable."""
    kind, _, path = data.name.partition(":")
    if kind not in LOADERS or (":" in data.name) != (kind in ("folder", "parquet")):
        names = [f"{name}:PATH" if name in ("folder", "parquet") else name for name in LOADERS]
        raise InputError(f"data.name is {data.name!r}: no such dataset; {nearest(kind, names)}")
    (train, train_labels), (val, val_labels), classes = LOADERS[kind](data, path)
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
    mean, std = _statistics(train)
    return Images(train, train_labels, val, val_labels, classes, data.mean or mean, data.std or std)


def _statistics(images: Bytes) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in [0, 1]; exact, from the histogram."""
    values = np.arange(256) / 255
    counts = np.stack([np.bincount(c.ravel(), minlength=256) for c in np.moveaxis(images, 3, 0)])
    weights = counts / counts.sum(1, keepdims=True)
    mean = weights @ values
    std = np.sqrt(np.maximum(weights @ values**2 - mean**2, 1e-12))
    return tuple(mean.tolist()), tuple(std.tolist())


def _digits(data: Data, path: str) -> tuple[Split, Split, int]:
    """1797 handwritten digits of 8x8 pixels, 10 classes, shipped by scikit-learn.

    The last 360 are held out: they are written by other people than the first.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    if data.image_size:
        images = np.stack([_resize(image[..., 0], data.image_size) for image in images])
        images = images[..., :1]
    labels = digits.target.astype(np.int64)
    return (images[:1437], labels[:1437]), (images[1437:], labels[1437:]), 10


def _cifar(data: Data, path: str) -> tuple[Split, Split, int]:
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
            images = _in_parallel(lambda image: _resize(image, data.image_size), images)
        splits.append((images, np.asarray(split.targets, dtype=np.int64)))
    return splits[0], splits[1], 10 if data.name == "cifar10" else 100


def _folder(data: Data, path: str) -> tuple[Split, Split, int]:
    """PATH/train/CLASS/*.png and PATH/val (or validation, or test)/CLASS/*.png."""
    from torchvision.datasets import ImageFolder

    train = ImageFolder(_existing(data, path, ["train"]))
    val = ImageFolder(_existing(data, path, ["val", "validation", "test"]))
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise InputError(
            f"data {data.name!r}: class {odd[0]!r} is in one of {train.root}, {val.root} only"
        )

    def read(split: ImageFolder) -> Split:
        files = [file for file, _ in split.samples]
        labels = np.asarray([label for _, label in split.samples], dtype=np.int64)
        return _decode(data, files, files), labels

    # the folder lists class after class: shuffle by a hash, so that `limit` takes all classes
    images, labels = read(train)
    order = np.argsort(hashes(0, 0, np.arange(len(labels)), "limit"))
    return (images[order], labels[order]), read(val), len(train.classes)


def _parquet(data: Data, path: str) -> tuple[Split, Split, int]:
    """Hugging Face style: columns image {bytes} and label, in PATH/train*.parquet and val*."""
    import pyarrow.parquet as pq

    def read(names: list[str]) -> Split:
        folder = Path(path)
        files = sorted(f for name in names for f in folder.glob(f"{name}*.parquet"))
        if not files:
            raise InputError(
                f"data {data.name!r}: expected {' or '.join(f'{n}*.parquet' for n in names)} "
                f"in {folder}"
            )
        columns: list[Any] = []
        for file in files:
            try:
                columns += pq.read_table(file, columns=["image", "label"]).to_pylist()
            except Exception as error:  # pyarrow raises many types for a broken file
                raise InputError(
                    f"{file}: expected a parquet file with columns image and label: {error}"
                ) from None
        contents = [row["image"]["bytes"] for row in columns]
        names_of_rows = [f"{path} row {i}" for i in range(len(columns))]
        labels = np.asarray([row["label"] for row in columns], dtype=np.int64)
        return _decode(data, contents, names_of_rows), labels

    train, val = read(["train"]), read(["val", "test"])
    return train, val, int(max(train[1].max(), val[1].max())) + 1


LOADERS: dict[str, Callable[[Data, str], tuple[Split, Split, int]]] = {
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "folder": _folder,
    "parquet": _parquet,
}


def _existing(data: Data, path: str, names: list[str]) -> Path:
    for name in names:
        folder = Path(path) / name
        if folder.is_dir() and any(child.is_dir() for child in folder.iterdir()):
            return folder
    raise InputError(
        f"data {data.name!r}: expected a folder {' or '.join(names)} with a folder a class "
        f"in {path}"
    )


def _decode(data: Data, sources: list[Any], names: list[str]) -> Bytes:
    """Files or their contents to uint8 [N, H, W, 3], resized where image_size is set."""
    from PIL import Image

    def read(item: tuple[Any, str]) -> Bytes:
        source, name = item
        try:
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
                return _resize(np.asarray(image.convert("RGB")), data.image_size)
        except (OSError, TypeError) as error:
            raise InputError(f"{name}: cannot be read as an image: {error}") from None

    images = _in_parallel(read, zip(sources, names, strict=True))
    shapes = {image.shape for image in images}
    if len(shapes) > 1 or any(shape[0] != shape[1] for shape in shapes):
        raise InputError(f"data {data.name!r}: its images differ in size: set data.image_size")
    return np.stack(images) if images else np.zeros((0, 1, 1, 3), np.uint8)


def _in_parallel(function: Callable[[Any], Bytes], items: Any) -> Any:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, items))


def _resize(image: Bytes, size: int | None) -> Bytes:
    """Bicubic resize of the shorter side to `size`, centre crop; [H, W(, 3)] to [size, size, 3]."""
    if size is None or image.shape[:2] == (size, size):
        return image
    from PIL import Image

    height, width = image.shape[:2]
    scale = size / min(height, width)
    new = max(size, round(width * scale)), max(size, round(height * scale))
    picture = Image.fromarray(image).convert("RGB").resize(new, Image.Resampling.BICUBIC)
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))


# ---------------------------------------------------------------- the stream


def hashes(seed: int, epoch: int, index: Ints, purpose: str) -> Hashes:
    """64 random bits for each index: splitmix64 over (seed, epoch, purpose, index)."""
    key = np.uint64(int.from_bytes(purpose.encode()[:8], "little"))
    with np.errstate(over="ignore"):
        for part in (np.uint64(seed), np.uint64(epoch)):
            key = _mix(np.atleast_1d(key ^ _mix(np.atleast_1d(part))))[0]
        return _mix(index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key)


def _mix(x: Hashes) -> Hashes:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def order(seed: int, epoch: int, size: int) -> Ints:
    """The order of `size` samples in an epoch: a permutation of 0 .. size - 1."""
    return np.argsort(hashes(seed, epoch, np.arange(size), "order"), kind="stable")


def batches(order: Ints, batch_size: int, drop_last: bool) -> Iterator[Ints]:
    """Global batches of an order; the last may be smaller unless it is dropped."""
    end = len(order) // batch_size * batch_size if drop_last else len(order)
    for start in range(0, end, batch_size):
        yield order[start : start + batch_size]


class Stream:
    """Batches of a dataset on a device, normalised, channels last in memory.

    On an accelerator the whole uint8 array is moved there once; on the CPU it stays shared.
    """

    def __init__(self, images: Images, data: Data, seed: int, device: torch.device) -> None:
        self.seed, self.data, self.device = seed, data, device
        self.arrays = {"train": images.train, "val": images.val}
        self.labels = {
            "train": torch.from_numpy(images.train_labels.copy()).to(device),
            "val": torch.from_numpy(images.val_labels.copy()).to(device),
        }
        self.on_device = (
            {
                split: torch.from_numpy(array.copy()).to(device)
                for split, array in self.arrays.items()
            }
            if device.type != "cpu"
            else {}
        )
        mean, std = torch.tensor(images.mean), torch.tensor(images.std)
        self.scale = (1 / (255 * std)).to(device)
        self.shift = (-mean / std).to(device)

    def train(self, index: Ints, epoch: int) -> tuple[Tensor, Tensor]:
        """Augmented images [B, channels, H, W] float32 and labels [B] of the given samples."""
        images, where = self._gather("train", index)
        pad = self.data.pad
        if pad or self.data.flip:
            bits = hashes(self.seed, epoch, index, "augment")
            top = _below(bits, 0, 2 * pad + 1)
            left = _below(bits, 24, 2 * pad + 1)
            flip = _below(bits, 48, 2) if self.data.flip else np.zeros_like(top)
            images = crop_and_flip(images, pad, *(self._put(x) for x in (top, left, flip)))
        return self._normalise(images), self.labels["train"][where]

    def val(self, index: Ints) -> Tensor:
        """Validation images [B, channels, H, W] float32, not augmented."""
        return self._normalise(self._gather("val", index)[0])

    def _gather(self, split: str, index: Ints) -> tuple[Tensor, Tensor]:
        where = self._put(index)
        if split in self.on_device:
            return self.on_device[split][where], where
        return torch.from_numpy(self.arrays[split][index]), where

    def _put(self, x: Ints) -> Tensor:
        return torch.from_numpy(x).to(self.device, non_blocking=True)

    def _normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, channels] to float32 [B, channels, H, W], the memory as it was."""
        return (images * self.scale + self.shift).permute(0, 3, 1, 2)


def _below(bits: Hashes, shift: int, limit: int) -> Ints:
    """A number in [0, limit) from the bits above `shift`."""
    field = (bits >> np.uint64(shift)) & np.uint64(0xFFFF)
    return (field % np.uint64(limit)).astype(np.int64)


def crop_and_flip(images: Tensor, pad: int, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Zero-pad by `pad`, crop at (top, left), mirror where flip is 1.

    images uint8 [B, H, W, channels]; top, left in [0, 2 pad], flip in {0, 1}: int64 [B].
    """
    batch, height, width, _ = images.shape
    rows = top[:, None] + torch.arange(height, device=images.device)  # [B, H]
    columns = torch.arange(width, device=images.device)
    columns = torch.where(flip[:, None] == 1, width - 1 - columns, columns) + left[:, None]
    padded = torch.nn.functional.pad(images, (0, 0, pad, pad, pad, pad))
    sample = torch.arange(batch, device=images.device)[:, None, None]
    return padded[sample, rows[:, :, None], columns[:, None, :]]
