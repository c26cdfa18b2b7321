"""Datasets in parquet files, as Hugging Face writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pld_ray.config.trial import Data
from pld_ray.data.decoding import decode_images, keep_encoded
from pld_ray.data.images import Size, Split
from pld_ray.data.registry import Splits, register_dataset
from pld_ray.data.sampling import Ints
from pld_ray.errors import InputError

# How the file names of each split begin. The first that is there is taken: a test split is used
# for validation only if there is no other.
TRAIN, VAL = ("train",), ("val", "test")


class Rows(NamedTuple):
    """Columns of a split.

    Attributes:
        places: What error messages call each row: its file and its number, from 0.
        columns: The values of each column.
    """

    places: list[str]
    columns: dict[str, list[Any]]


def read_rows(data: Data, path: str, names: tuple[str, ...], columns: list[str]) -> Rows:
    """Read columns of all files of a split, one file after another.

    Raises:
        InputError: There are no such files, or one of them cannot be read or lacks a column.
    """
    import pyarrow.parquet as pq

    folder = Path(path)
    files = next(filter(None, (sorted(folder.glob(f"{name}*.parquet")) for name in names)), [])
    if not files:
        expected = " or ".join(f"{name}*.parquet" for name in names)
        raise InputError(f"data {data.name!r}: expected {expected} in {folder}")
    found = Rows([], {name: [] for name in columns})
    for file in files:
        try:
            there = pq.read_schema(file).names
            table = pq.read_table(file, columns=[name for name in columns if name in there])
        except Exception as error:  # pyarrow raises many types for a broken file
            raise InputError(
                f"{file}: expected a parquet file with columns image and label: {error}"
            ) from None
        if missing := [name for name in columns if name not in there]:
            raise InputError(
                f"{file}: has no column {missing[0]}; its columns are {', '.join(there)}: "
                "expected image and label"
            )
        for name in columns:
            found.columns[name].extend(table[name].to_pylist())
        found.places.extend(f"{file} row {row}" for row in range(len(table)))
    return found


def as_classes(train: Rows, val: Rows) -> tuple[Ints, Ints, int]:
    """Return the labels of both splits as class indices, and the number of classes.

    Words are classes in sorted order.

    Raises:
        InputError: A label is missing or negative, or is neither a whole number nor a word, or a
            word is in the validation split only.
    """
    splits = (train, val)
    words = isinstance(next(iter(train.columns["label"]), 0), str)
    kind = str if words else int
    for rows in splits:
        for place, label in zip(rows.places, rows.columns["label"], strict=True):
            if not isinstance(label, kind) or (isinstance(label, int) and label < 0):
                expected = "a word" if words else "a class index from 0"
                raise InputError(f"{place}: its label is {label!r}: expected {expected}")
    if not words:
        found = [np.asarray(rows.columns["label"], dtype=np.int64) for rows in splits]
        return found[0], found[1], int(max(labels.max(initial=-1) for labels in found)) + 1
    classes = {name: i for i, name in enumerate(sorted(set(train.columns["label"])))}
    for place, label in zip(val.places, val.columns["label"], strict=True):
        if label not in classes:
            raise InputError(f"{place}: its label {label!r} is not a class of the training split")
    one, two = (
        np.array([classes[name] for name in rows.columns["label"]], np.int64) for rows in splits
    )
    return one, two, len(classes)


def parquet_size(data: Data, path: str) -> Size:
    """Count the rows and classes of parquet files."""
    train, val = (read_rows(data, path, names, ["label"]) for names in (TRAIN, VAL))
    return Size(len(train.places), len(val.places), as_classes(train, val)[2])


@register_dataset("parquet", size=parquet_size, has_path=True, encodes=True)
def parquet(data: Data, path: str) -> Splits:
    """Load PATH/train*.parquet and PATH/val*.parquet (or test*).

    The columns are those of Hugging Face: image, a mapping with bytes or the bytes themselves, and
    label, class indices or words.
    """
    train, val = (read_rows(data, path, names, ["image", "label"]) for names in (TRAIN, VAL))
    train_labels, val_labels, classes = as_classes(train, val)
    return _split(data, train, train_labels, path), _split(data, val, val_labels, path), classes


def _split(data: Data, rows: Rows, labels: Ints, path: str) -> Split:
    contents = [
        cell.get("bytes") if isinstance(cell, dict) else cell for cell in rows.columns["image"]
    ]
    for place, content in zip(rows.places, contents, strict=True):
        if not isinstance(content, bytes):
            raise InputError(
                f"{place}: its image is a {type(content).__name__}: expected the bytes of an image "
                "file"
            )
    if data.random_resized_crop:
        return keep_encoded(data, contents, path, rows.places), labels
    return decode_images(data, contents, rows.places), labels
