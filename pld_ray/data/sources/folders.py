"""Datasets of image files in folders, one folder per class."""

from __future__ import annotations

import os
from pathlib import Path

from pld_ray.config.parts import Data
from pld_ray.config.paths import absolute
from pld_ray.data.folder_index import FolderIndex, class_folders, index_folder
from pld_ray.data.images import Found, Size, Split
from pld_ray.data.registry import register_dataset
from pld_ray.data.stored import ImageFiles
from pld_ray.errors import InputError, MissingError

VAL = ("val", "validation", "test")


@register_dataset("folder", has_path=True, encodes=True)
def folder(data: Data, path: str) -> Found:
    """Find PATH/train/CLASS/*.png and PATH/val (or validation, or test)/CLASS/*.png."""
    where, root = f"data {data.name!r}", Path(path)
    if not root.is_dir():
        raise MissingError(f"{where}: the folder {root} does not exist")
    train, val = _existing(root, "train"), _existing(root, *VAL)
    if train is None or (val is None and not data.holdout):
        wanted = "train" if train is None else " or ".join(VAL)
        other = "" if train is None else "; or set data.holdout to validate on training images"
        raise InputError(
            f"{where}: expected a folder {wanted} with one folder per class in {root}{other}"
        )
    indices: dict[Path, FolderIndex] = {}
    faults: list[str] = []
    for split in (train, val):
        if split is not None:
            indices[split], wrong = index_folder(split, where)
            faults += wrong
    splits = {split: _split(split, index) for split, index in indices.items()}
    names, others = (indices[split or train].classes.tolist() for split in (train, val))
    for odd in sorted(set(names) ^ set(others)):
        only = val if odd in others else train
        faults.append(f"{where}: class {os.fsdecode(odd)!r} is in {only} only")
    return Found(
        splits[train],
        splits[val] if val is not None else None,
        tuple(os.fsdecode(name) for name in names),
        "".join(f"{split} {index.state} " for split, index in indices.items()),
        tuple(faults),
    )


def _existing(root: Path, *names: str) -> Path | None:
    """Return the first of these folders that is there and not empty, if it has class folders."""
    for path in (root / name for name in names):
        if path.is_dir() and any(not child.name.startswith(".") for child in path.iterdir()):
            return path if class_folders(path) else None
    return None


def _split(root: Path, index: FolderIndex) -> Split:
    return ImageFiles(str(root), index.names, index.sizes), index.labels


@register_dataset("imagenet", size=Size(1_281_167, 50_000, 1000), encodes=True)
def imagenet(data: Data, path: str) -> Found:
    """Find ImageNet (ILSVRC 2012) as image files in the folder that `root` names."""
    root = absolute(data.root or "imagenet")
    found = folder(data, root)
    if len(found.class_names) != 1000:
        raise InputError(
            f"data 'imagenet': {len(found.class_names)} classes in {root}, expected 1000"
        )
    return found
