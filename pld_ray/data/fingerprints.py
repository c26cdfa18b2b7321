"""The fingerprint of a dataset: what it holds, wherever and in whatever files it is stored."""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pld_ray.data.encoded import StoredImages
from pld_ray.data.images import Bytes, Found, is_drawn
from pld_ray.data.sampling import order

if TYPE_CHECKING:
    from pld_ray.data.drawn import DrawnImages  # imports torch

WHOLE_BYTES = 2**28  # splits up to this size are hashed as a whole
DRAWN = 256  # images of a map-style dataset that are hashed
SAMPLED = 1024  # images that are hashed of a larger split


def fingerprint(found: Found) -> str:
    """Return the fingerprint of a dataset, as 16 hex digits.

    It is a hash of the class names and, for both splits, of the labels, the sizes of the image
    files and their contents. For splits above 256 MiB, the contents of 1,024 images stand for all;
    for a map-style dataset, its registered name and 256 images.
    """
    cached = cache_folder() / "fingerprints" / _hex(found.state or "")
    if found.state:
        try:
            kept = cached.read_bytes()
        except OSError:
            kept = b""
        if re.fullmatch(rb"[0-9a-f]{16}", kept):  # else there is none, or it is damaged
            return kept.decode()
    digest = hashlib.sha256(json.dumps(found.class_names).encode())
    for split in (found.train, found.val):
        if split is None:
            digest.update(b"no split")
            continue
        images, labels = split
        digest.update(labels.astype("<i8").tobytes())
        digest.update(_content(images))
    answer = digest.hexdigest()[:16]
    if found.state:
        write_cached(cached, answer.encode())
    return answer


def _content(images: Bytes | StoredImages | DrawnImages) -> bytes:
    """Return a hash of image files, of an array, or of some images of a map-style dataset."""
    if isinstance(images, np.ndarray):
        return _digest(str(images.shape).encode() + np.ascontiguousarray(images).tobytes())
    rows = np.arange(len(images))
    if is_drawn(images):
        from pld_ray.data.drawn import generators_kept

        with generators_kept():
            some = images.draw(np.sort(order(0, 0, len(images))[:DRAWN]), 0, 0).numpy()
        return _digest(
            f"{images.kind} {len(images)} {some.shape} {some.dtype}".encode() + some.tobytes()
        )
    if images.sizes.sum() > WHOLE_BYTES:
        rows = np.sort(order(0, 0, len(images))[:SAMPLED])
    digest = hashlib.sha256(images.sizes.astype("<i8").tobytes())
    for row in rows.tolist():
        if images.sizes[row] >= 0:  # else there is no image, which is reported when it is decoded
            digest.update(_digest(images.read(row)))
    return digest.digest()


def cache_folder() -> Path:
    """Return the folder for what can be computed again: XDG_CACHE_HOME or ~/.cache, /pld-ray."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pld-ray"


def write_cached(path: Path, content: bytes) -> None:
    """Write a file of the cache in one step. A cache that cannot be written is not used."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _hex(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
