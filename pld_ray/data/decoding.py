"""Decodes and resizes image files."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pld_ray.config.trial import Data
from pld_ray.data.encoded import EncodedImages
from pld_ray.data.image_files import open_rgb
from pld_ray.data.images import NO_IMAGES, Bytes
from pld_ray.errors import InputError


def keep_encoded(
    data: Data, sources: list[Any], root: str, rows: list[str] | None = None
) -> EncodedImages:
    """Wrap encoded images, which are decoded later.

    Args:
        data: The settings of the dataset; `image_size` must be set.
        sources: The paths of the files, or their contents.
        root: The folder of the dataset. Paths relative to it are the names of the images.
        rows: With contents, what error messages call each image, such as "FILE row 3".

    Returns:
        The encoded images.
    """
    assert data.image_size is not None
    shorter = math.ceil(data.image_size / data.crop_pct)
    paths = contents = told = None
    if sources and isinstance(sources[0], bytes):
        sizes = [len(content) for content in sources]
        contents = np.frombuffer(b"".join(sources), np.uint8)
        names = [hashlib.sha256(content).digest() for content in sources]
        told = np.array([os.fsencode(row) for row in rows or []])
    else:
        sizes = in_parallel(os.path.getsize, sources)
        paths = np.array([os.fsencode(source) for source in sources])
        names = [os.fsencode(os.path.relpath(source, root)) for source in sources]
    ends = np.cumsum(np.asarray(sizes, np.int64))
    return EncodedImages(paths, contents, ends, np.array(names), data.image_size, shorter, told)


def decode_images(data: Data, sources: list[Any], names: list[str]) -> Bytes:
    """Decode images, and resize them if `data.image_size` is set.

    Args:
        data: The settings of the dataset.
        sources: The paths of the files, or their contents.
        names: The names of the images, for error messages.

    Returns:
        Images, uint8 [N, H, W, 3].

    Raises:
        InputError: A file is not an image, or the images differ in size or are not square.
    """

    def read(item: tuple[Any, str]) -> Bytes:
        return resize_and_crop(np.asarray(open_rgb(*item)), data.image_size)

    images = in_parallel(read, zip(sources, names, strict=True))
    shapes = {image.shape for image in images}
    if len(shapes) > 1 or any(shape[0] != shape[1] for shape in shapes):
        raise InputError(
            f"data {data.name!r}: its images differ in size or are not square: set data.image_size"
        )
    return np.stack(images) if images else NO_IMAGES


def in_parallel(function: Callable[[Any], Any], items: Any) -> Any:
    """Apply a function to all items on several threads, and return the list of results."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, items))


def resize_and_crop(image: Bytes, size: int | None) -> Bytes:
    """Resize the shorter side of an image to `size` (bicubic), and crop the centre.

    Args:
        image: An image, uint8 [H, W, 3] or [H, W].
        size: The side in pixels.

    Returns:
        The image, uint8 [size, size, 3]. It is returned unchanged if `size` is None or if it
        already has this size.
    """
    if size is None or image.shape[:2] == (size, size):
        return image
    from PIL import Image

    height, width = image.shape[:2]
    scale = size / min(height, width)
    new = max(size, round(width * scale)), max(size, round(height * scale))
    picture = Image.fromarray(image).convert("RGB").resize(new, Image.Resampling.BICUBIC)
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    return np.asarray(picture.crop((left, top, left + size, top + size)))
