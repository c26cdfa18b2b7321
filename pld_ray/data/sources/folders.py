"""Datasets of image files in folders, one folder per class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from pld_ray.config.trial import Data
from pld_ray.data.decoding import decode_images, keep_encoded
from pld_ray.data.image_files import NOT_READ, READ
from pld_ray.data.images import Size
from pld_ray.data.registry import Splits, register_dataset
from pld_ray.data.sampling import Ints, random_bits
from pld_ray.errors import InputError

Files = tuple[list[str], Ints]  # paths and labels


def list_folder(data: Data, path: str) -> tuple[Files, Files, int]:
    """List the files and labels of both splits, class after class, and count the classes.

    Classes and files are in the order of their names. Hidden files and folders, whose names start
    with a dot, are left out.

    Raises:
        InputError: A split is missing, its classes differ from those of the other split, or a
            class has no images or has images that cannot be read.
    """
    splits: list[Files] = []
    known: list[str] = []
    for names in (["train"], ["val", "validation", "test"]):
        root = _existing(data, path, names)
        classes = sorted(child.name for child in root.iterdir() if _is_class(child))
        odd = sorted(set(classes) ^ set(known or classes))
        if odd:
            where = root if odd[0] in classes else Path(path) / "train"
            raise InputError(f"data {data.name!r}: class {odd[0]!r} is in {where} only")
        known = classes
        files, labels = [], []
        for label, name in enumerate(classes):
            found = _images(data, root / name)
            files += found
            labels += [label] * len(found)
        splits.append((files, np.asarray(labels, dtype=np.int64)))
    return splits[0], splits[1], len(known)


def _existing(data: Data, path: str, names: list[str]) -> Path:
    for name in names:
        folder = Path(path) / name
        if folder.is_dir() and any(_is_class(child) for child in folder.iterdir()):
            return folder
    raise InputError(
        f"data {data.name!r}: expected a folder {' or '.join(names)} with a folder a class "
        f"in {path}"
    )


def _is_class(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _images(data: Data, folder: Path) -> list[str]:
    """List the images of a class, in the folder and in all folders below it."""
    files: list[tuple[str, str]] = []
    not_read: list[tuple[str, str]] = []
    for place, below, inside in os.walk(folder, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        for name in inside:
            suffix = os.path.splitext(name)[1].lower()
            if not name.startswith(".") and (suffix in READ or suffix in NOT_READ):
                (files if suffix in READ else not_read).append((place, name))
    read = f"files with these endings are read: {', '.join(sorted(READ))}"
    if not_read:
        raise InputError(
            f"data {data.name!r}: {folder} has {len(not_read)} images that cannot be read, such as "
            f"{min(not_read)[1]}: convert or remove them; {read}"
        )
    if not files:
        raise InputError(f"data {data.name!r}: the class {folder} has no images; {read}")
    return [os.path.join(*file) for file in sorted(files)]


def folder_size(data: Data, path: str) -> Size:
    """Count the images and classes of a folder."""
    train, val, classes = list_folder(data, path)
    return Size(len(train[1]), len(val[1]), classes)


@register_dataset("folder", size=folder_size, has_path=True, encodes=True)
def folder(data: Data, path: str) -> Splits:
    """Load PATH/train/CLASS/*.png and PATH/val (or validation, or test)/CLASS/*.png."""
    train, val, classes = list_folder(data, path)
    # The folder lists class after class. A shuffle by a hash lets `limit` keep all classes.
    order = np.argsort(random_bits(0, 0, np.arange(len(train[0])), "limit"))
    train = [train[0][i] for i in order], train[1][order]
    splits = [
        (
            keep_encoded(data, files, path)
            if data.random_resized_crop
            else decode_images(data, files, files),
            labels,
        )
        for files, labels in (train, val)
    ]
    return splits[0], splits[1], classes


@register_dataset("imagenet", size=Size(1_281_167, 50_000, 1000), encodes=True)
def imagenet(data: Data, path: str) -> Splits:
    """Load a folder like the above, which `root` names. It must have 1,000 classes."""
    train, val, classes = folder(data, data.root or "imagenet")
    if classes != 1000:
        raise InputError(
            f"data 'imagenet': {classes} classes in {data.root or 'imagenet'}, expected 1000"
        )
    return train, val, classes
