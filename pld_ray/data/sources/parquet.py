"""Datasets in parquet files, as Hugging Face writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pld_ray.config.trial import Data
from pld_ray.data.decoding import decode_images, keep_encoded
from pld_ray.data.images import Size
from pld_ray.data.registry import Splits, register_dataset
from pld_ray.errors import InputError

PARQUET = (["train"], ["val", "test"])  # how the file names of each split begin


def read_parquet(
    data: Data, path: str, names: list[str], columns: list[str]
) -> dict[str, list[Any]]:
    """Read columns of all files of a split, one file after another."""
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


def parquet_size(data: Data, path: str) -> Size:
    """Count the rows and classes of parquet files."""
    labels = [read_parquet(data, path, names, ["label"])["label"] for names in PARQUET]
    classes = max(max(x, default=0) for x in labels) + 1
    return Size(len(labels[0]), len(labels[1]), classes)


@register_dataset("parquet", size=parquet_size, has_path=True, encodes=True)
def parquet(data: Data, path: str) -> Splits:
    """Load PATH/train*.parquet and PATH/val*.parquet (or test*).

    The columns are those of Hugging Face: image, a mapping with bytes, and label.
    """
    splits = []
    for names in PARQUET:
        columns = read_parquet(data, path, names, ["image", "label"])
        contents = [image["bytes"] for image in columns["image"]]
        rows = [f"{path} row {i}" for i in range(len(contents))]
        labels = np.asarray(columns["label"], dtype=np.int64)
        encoded = data.random_resized_crop
        images = (
            keep_encoded(data, contents, path) if encoded else decode_images(data, contents, rows)
        )
        splits.append((images, labels))
    train, val = splits
    return train, val, int(max(train[1].max(), val[1].max())) + 1
