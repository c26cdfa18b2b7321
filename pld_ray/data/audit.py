"""Read a whole dataset, and say what it holds and what is wrong with it."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pld_ray.data.encoded import StoredImages
from pld_ray.data.fingerprints import fingerprint
from pld_ray.data.image_files import decode
from pld_ray.data.images import Bytes, Found, Split, is_drawn
from pld_ray.errors import InputError

if TYPE_CHECKING:
    from pld_ray.data.drawn import DrawnImages  # imports torch

PLAIN = ("RGB", "L", "P", "1")  # modes of images that are common and lose nothing as RGB


class Seen(NamedTuple):
    """What one image is.

    Attributes:
        digest: The SHA-256 of its content.
        width: Its width in pixels.
        height: Its height in pixels.
        kind: Its format and mode, such as "JPEG RGB".
        fault: Why it cannot be read, or "".
    """

    digest: bytes
    width: int = 0
    height: int = 0
    kind: str = ""
    fault: str = ""


@dataclass
class Audit:
    """What a dataset holds.

    Attributes:
        fingerprint: The fingerprint of the dataset.
        class_names: The names of the classes.
        splits: For each split, its images and the number of images per class [C].
        faults: Sentences about what a run would refuse.
        warnings: Sentences about what a run accepts, but results may suffer from.
    """

    fingerprint: str
    class_names: tuple[str, ...]
    splits: dict[str, tuple[list[Seen], Any]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def audit(found: Found, progress: Any = lambda items, total: items) -> Audit:
    """Read every image of a dataset.

    Args:
        found: The dataset.
        progress: Wraps the iterable of images, of which it also gets the number.
    """
    try:
        known = fingerprint(found)
    except InputError:  # an image that it needs cannot be drawn; the walk below says which
        known = "unknown"
    result = Audit(known, found.class_names, faults=list(found.faults))
    first_seen: dict[bytes, tuple[str, str, int]] = {}
    same: Counter[tuple[str, str]] = Counter()
    examples: dict[Any, str] = {}
    for name, split in (("train", found.train), ("val", found.val)):
        if split is None:
            result.warnings.append("there is no validation split: set data.holdout")
            continue
        seen = list(progress(_walk(split), len(split[1])))
        counts = np.bincount(split[1][split[1] >= 0], minlength=len(found.class_names))
        result.splits[name] = seen, counts
        result.faults += [image.fault for image in seen if image.fault]
        for row, (image, label) in enumerate(zip(seen, split[1].tolist(), strict=True)):
            if image.fault:
                continue
            place = _name(split[0], name, row)
            other = first_seen.setdefault(image.digest, (name, place, label))
            if other[1] != place:
                pair = other[0], name
                same[pair] += 1
                examples.setdefault(pair, f"{place}, which is {other[1]}")
                if other[2] != label:
                    same["labels", name] += 1
                    examples.setdefault(("labels", name), f"{place}, which is {other[1]}")
        _tell_classes(result, name, counts)
        odd = Counter(i.kind for i in seen if i.kind and i.kind.split()[1] not in PLAIN)
        result.warnings += [
            f"{name}: {kind} is converted to RGB with 8 bits per channel (images: {count:,})"
            for kind, count in sorted(odd.items())
        ]
    for pair, count in sorted(same.items()):
        what = {
            ("train", "train"): "train has images more than once",
            ("val", "val"): "val has images more than once",
            ("train", "val"): "images of val are also in train: validation is not independent",
        }.get(pair, f"images of {pair[1]} are equal to one with another label")
        result.warnings.append(f"{what} (images: {count:,}), such as {examples[pair]}")
    return result


def _walk(split: Split) -> Iterable[Seen]:
    """Look at every image, on several threads."""
    images = split[0]
    if is_drawn(images):
        yield from _drawn(images)
        return
    with ThreadPoolExecutor() as pool:
        yield from pool.map(lambda row: _look(images, row), range(len(images)))


def _drawn(images: DrawnImages) -> Iterator[Seen]:
    """Draw every image of a map-style dataset, without threads: they share the generators."""
    from pld_ray.data.drawn import generators_kept

    for row in range(len(images)):
        try:
            with generators_kept():
                image = images.draw(np.array([row]), 0, 0)[0].numpy()
        except InputError as error:
            yield Seen(str(row).encode(), fault=str(error))
            continue
        height, width, channels = image.shape
        digest = hashlib.sha256(image.tobytes()).digest()
        yield Seen(digest, width, height, f"item {'L' if channels == 1 else 'RGB'}")


def _look(images: Bytes | StoredImages, row: int) -> Seen:
    if isinstance(images, np.ndarray):
        height, width, channels = images[row].shape
        digest = hashlib.sha256(images[row].tobytes()).digest()
        return Seen(digest, width, height, f"array {'L' if channels == 1 else 'RGB'}")
    from PIL import Image

    try:
        content = images.read(row)
    except InputError as error:
        return Seen(str(row).encode(), fault=str(error))
    digest = hashlib.sha256(content).digest()
    try:
        height, width, _ = decode(content, images.name(row)).shape
        with Image.open(io.BytesIO(content)) as image:
            return Seen(digest, width, height, f"{image.format} {image.mode}")
    except InputError as error:
        return Seen(digest, fault=str(error))


def _name(images: Bytes | StoredImages | DrawnImages, split: str, row: int) -> str:
    if isinstance(images, np.ndarray) or is_drawn(images):
        return f"{split} {row}"
    return images.name(row)


def _tell_classes(result: Audit, split: str, counts: Any) -> None:
    empty = [result.class_names[i] for i in np.flatnonzero(counts == 0)]
    if empty:
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        result.warnings.append(f"{split}: no images of {len(empty)} of the classes: {shown}")
