"""Datasets in parquet files, as Hugging Face writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pld_ray.config.trial import Data
from pld_ray.data.decoding import decode_images, keep_encoded
from pld_ray.data.images import Split
from pld_ray.errors import InputError


def parquet(data: Data, path: str) -> tuple[Split, Split, int]:
    """Hugging Face style: columns image {bytes} and label, in PATH/train*.parquet and val*."""
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


def read_parquet(
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


PARQUET = (["train"], ["val", "test"])  # how the files of a split begin
