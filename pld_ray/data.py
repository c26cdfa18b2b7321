"""Datasets by name, and the order of their samples.

A dataset is two uint8 arrays [N, H, W, channels] in memory, shared by all trials of a node, or two
lists of encoded images that stand for such arrays (encoded.py). Everything random is computed from
(seed, epoch, index) by a hash, never from a generator's running state: so it is the same in every
trial, on every number of workers, and after a resume. What is made of it, batches of augmented
images, stands in stream.py; nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pld_ray.encoded import TRIES, Draws, Encoded
from pld_ray.errors import InputError, nearest
from pld_ray.spec import Data

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Pixels = Bytes | Encoded  # [N, H, W, channels]
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
            if isinstance(array, Encoded):
                digest.update(array.digest)
            else:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]


class Size(NamedTuple):
    """How many images of each split, and how many classes."""

    train: int
    val: int
    classes: int


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
    if isinstance(train, Encoded):
        some = order(0, 0, len(train))[:MEASURED]
        sample = train.decode(some) if data.mean is None or data.std is None else NO_IMAGES
    else:
        sample = train
    mean, std = _statistics(sample)
    return Images(train, train_labels, val, val_labels, classes, data.mean or mean, data.std or std)


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
            train, val, classes = _list_folder(data, path)
            found = Size(len(train[1]), len(val[1]), classes)
        case _:
            labels = [_read_parquet(data, path, names, ["label"])["label"] for names in PARQUET]
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
    train, val, classes = _list_folder(data, path)
    # the folder lists class after class: shuffle by a hash, so that `limit` takes all classes
    order = np.argsort(hashes(0, 0, np.arange(len(train[0])), "limit"))
    train = [train[0][i] for i in order], train[1][order]
    splits = [
        (
            _encoded(data, files, path)
            if data.random_resized_crop
            else _decode(data, files, files),
            labels,
        )
        for files, labels in (train, val)
    ]
    return splits[0], splits[1], classes


def _imagenet(data: Data, path: str) -> tuple[Split, Split, int]:
    """A folder as above, at `root`."""
    train, val, classes = _folder(data, data.root or "imagenet")
    if classes != 1000:
        raise InputError(
            f"data 'imagenet': {classes} classes in {data.root or 'imagenet'}, expected 1000"
        )
    return train, val, classes


def _encoded(data: Data, sources: list[Any], root: str) -> Encoded:
    """Paths below `root`, or the contents of files, as they are."""
    assert data.image_size is not None
    shorter = math.ceil(data.image_size / data.crop_pct)
    paths = contents = None
    if sources and isinstance(sources[0], bytes):
        sizes = [len(content) for content in sources]
        contents = np.frombuffer(b"".join(sources), np.uint8)
        names = [hashlib.sha256(content).digest() for content in sources]
    else:
        sizes = _in_parallel(os.path.getsize, sources)
        paths = np.array([os.fsencode(source) for source in sources])
        names = [os.fsencode(os.path.relpath(source, root)) for source in sources]
    ends = np.cumsum(np.asarray(sizes, np.int64))
    return Encoded(paths, contents, ends, np.array(names), data.image_size, shorter)


Files = tuple[list[str], Ints]  # paths and labels


def _list_folder(data: Data, path: str) -> tuple[Files, Files, int]:
    """Train and val, class after class, both in the order of their names; how many classes."""
    splits: list[Files] = []
    known: list[str] = []
    for names in (["train"], ["val", "validation", "test"]):
        root = _existing(data, path, names)
        classes = sorted(child.name for child in root.iterdir() if child.is_dir())
        odd = sorted(set(classes) ^ set(known or classes))
        if odd:
            where = root if odd[0] in classes else Path(path) / "train"
            raise InputError(f"data {data.name!r}: class {odd[0]!r} is in {where} only")
        known = classes
        files, labels = [], []
        for label, name in enumerate(classes):
            for folder, _, inside in sorted(os.walk(root / name, followlinks=True)):
                found = [f for f in sorted(inside) if Path(f).suffix.lower() in IMAGE_SUFFIXES]
                files += [os.path.join(folder, file) for file in found]
                labels += [label] * len(found)
        if not files:
            raise InputError(f"data {data.name!r}: there are no images in {root}")
        splits.append((files, np.asarray(labels, dtype=np.int64)))
    return splits[0], splits[1], len(known)


def _parquet(data: Data, path: str) -> tuple[Split, Split, int]:
    """Hugging Face style: columns image {bytes} and label, in PATH/train*.parquet and val*."""
    splits = []
    for names in PARQUET:
        columns = _read_parquet(data, path, names, ["image", "label"])
        contents = [image["bytes"] for image in columns["image"]]
        rows = [f"{path} row {i}" for i in range(len(contents))]
        labels = np.asarray(columns["label"], dtype=np.int64)
        encoded = data.random_resized_crop
        images = _encoded(data, contents, path) if encoded else _decode(data, contents, rows)
        splits.append((images, labels))
    train, val = splits
    return train, val, int(max(train[1].max(), val[1].max())) + 1


def _read_parquet(
    data: Data, path: str, names: list[str], columns: list[str]
) -> dict[str, list[Any]]:
    """The columns of all files of a split, one after another."""
    import pyarrow.parquet as pq

    folder = Path(path)
    files = sorted(f for name in names for f in folder.glob(f"{name}*.parquet"))
    if not files:
        raise InputError(
            f"data {data.name!r}: expected {' or '.join(f'{n}*.parquet' for n in names)} "
            f"in {folder}"
        )
    found: dict[str, list[Any]] = {name: [] for name in columns}
    for file in files:
        try:
            table = pq.read_table(file, columns=columns)
            for name in columns:
                found[name] += table[name].to_pylist()
        except Exception as error:  # pyarrow raises many types for a broken file
            raise InputError(
                f"{file}: expected a parquet file with columns image and label: {error}"
            ) from None
    return found


MEASURED = 1024  # images whose mean and deviation stand for those of a large dataset
NO_IMAGES = np.zeros((0, 1, 1, 3), np.uint8)
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
PARQUET = (["train"], ["val", "test"])  # how the files of a split begin
LOADERS: dict[str, Callable[[Data, str], tuple[Split, Split, int]]] = {
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "imagenet": _imagenet,
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
    return np.stack(images) if images else NO_IMAGES


def _in_parallel(function: Callable[[Any], Any], items: Any) -> Any:
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


# ---------------------------------------------------------------- order and randomness


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


def crop_draws(seed: int, view: int, index: Ints) -> Draws:
    """Numbers [B, TRIES, 4] in [0, 1) for the random resized crops of some images."""
    bits = np.stack([hashes(seed, view, index, f"crop{i}") for i in range(TRIES)], 1)
    fields = bits[..., None] >> (np.arange(4, dtype=np.uint64) * np.uint64(16))
    return (fields & np.uint64(0xFFFF)).astype(np.float64) / 2**16


def order(seed: int, epoch: int, size: int) -> Ints:
    """The order of `size` samples in an epoch: a permutation of 0 .. size - 1."""
    return np.argsort(hashes(seed, epoch, np.arange(size), "order"), kind="stable")


def batches(order: Ints, batch_size: int, drop_last: bool) -> Iterator[Ints]:
    """Global batches of an order; the last may be smaller unless it is dropped."""
    end = len(order) // batch_size * batch_size if drop_last else len(order)
    for start in range(0, end, batch_size):
        yield order[start : start + batch_size]
