"""Pack a dataset: each image once with a shorter side of N pixels, in memory-mapped Arrow files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pld_ray.data.encoded import StoredImages
from pld_ray.data.image_files import decode, resize
from pld_ray.data.images import Found, Split, is_drawn
from pld_ray.data.sources.hub import quiet
from pld_ray.errors import InputError

CHUNK = 1024  # images that are encoded at once


def pack(found: Found, folder: str, shorter: int, quality: int) -> tuple[int, int]:
    """Write a dataset as `hf:FOLDER` reads it, with JPEG images.

    Images whose shorter side is at most `shorter` are copied as they are.

    Args:
        found: The dataset, with image files.
        folder: The folder to write. It must not exist.
        shorter: The shorter side of the packed images in pixels.
        quality: The quality of the JPEG files, 1 to 100.

    Returns:
        The bytes of all images before and after.

    Raises:
        InputError: The folder exists, the images are no files, or an image cannot be read.
    """
    try:
        import datasets
    except ImportError:
        raise InputError("data pack needs another package: pip install 'pld-ray[hf]'") from None
    target = Path(folder)
    if os.path.lexists(target):
        raise InputError(f"data pack: {folder} exists already: expected the name of a new folder")
    if isinstance(found.train[0], np.ndarray):
        raise InputError("data pack: the dataset is an array of small images: nothing to pack")
    if any(is_drawn(split[0]) for split in (found.train, found.val) if split is not None):
        raise InputError("data pack: the dataset draws its images: expected image files")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(found.class_names))}
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent)
    except OSError as error:
        raise InputError(f"data pack: {folder}: cannot be written: {error.strerror}") from None
    try:
        with quiet():
            _write(found, work, features, shorter, quality)
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None
    else:
        os.rename(f"{work}/packed", target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    before = sum(_bytes(split[0]) for split in (found.train, found.val) if split is not None)
    return before, sum(file.stat().st_size for file in target.rglob("*.arrow"))


def _write(found: Found, work: str, features: Any, shorter: int, quality: int) -> None:
    """Write WORK/packed."""
    import datasets

    splits = {}
    for name, split in (("train", found.train), ("validation", found.val)):
        if split is not None:
            splits[name] = datasets.Dataset.from_generator(
                _rows,
                features=features,
                cache_dir=f"{work}/cache",
                gen_kwargs={"split": split, "shorter": shorter, "quality": quality},
                fingerprint=name,
            )
    datasets.DatasetDict(splits).save_to_disk(f"{work}/packed")


def _bytes(images: Any) -> int:
    return int(images.sizes.sum())


def _rows(split: Split, shorter: int, quality: int) -> Iterator[dict[str, Any]]:
    images, labels = split
    assert not isinstance(images, np.ndarray) and not is_drawn(images)

    def one(row: int) -> bytes:
        return _packed(images, row, shorter, quality)

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(labels), CHUNK):
            rows = range(start, min(start + CHUNK, len(labels)))
            for row, content in zip(rows, pool.map(one, rows), strict=True):
                yield {"image": {"bytes": content, "path": None}, "label": int(labels[row])}


def _packed(images: StoredImages, row: int, shorter: int, quality: int) -> bytes:
    import simplejpeg

    content = images.read(row)
    image = decode(content, images.name(row))
    height, width = image.shape[:2]
    scale = shorter / min(height, width)
    if scale >= 1:
        return content
    small = resize(image, max(shorter, round(height * scale)), max(shorter, round(width * scale)))
    return simplejpeg.encode_jpeg(np.ascontiguousarray(small), quality=quality)
