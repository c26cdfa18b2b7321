"""Images that stay encoded on the disk until a batch needs them.

A random resized crop is a pure function of (seed, view, index), like all other random choices. The
crop of an image is resized directly to its final size.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from pld_ray.data.augmentation import Draws, centre, crop
from pld_ray.data.image_files import DECODER, decode, resize
from pld_ray.data.sampling import Ints
from pld_ray.errors import InputError

AHEAD = 2  # batches that are decoded in advance
_In = TypeVar("_In")
_Out = TypeVar("_Out")


class StoredImages(Protocol):
    """The image files of one split, wherever they are stored."""

    def __len__(self) -> int: ...

    @property
    def sizes(self) -> Ints:
        """The size of each file in bytes, int64 [N]."""

    def read(self, i: int) -> bytes:
        """Return the content of the file with index i."""

    def name(self, i: int) -> str:
        """Return what error messages call the image with index i."""

    def check_visible(self) -> None:
        """Raise InputError if this machine does not see the files."""


@dataclass(frozen=True)
class EncodedImages:
    """Rows of image files, with the length and shape of the decoded array.

    Attributes:
        files: The image files.
        rows: The indices of the images in `files`, int64 [N].
        size: The side of a decoded image in pixels.
        shorter: The shorter side of the whole image before the centre crop of `size`, in pixels.
        identity: A text that identifies the content of `files`.
    """

    files: StoredImages
    rows: Ints
    size: int
    shorter: int
    identity: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Ints) -> EncodedImages:
        """Return the images with the indices `rows`."""
        return replace(self, rows=self.rows[rows])

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the decoded array, (N, size, size, 3)."""
        return len(self), self.size, self.size, 3

    @cached_property
    def digest(self) -> bytes:
        """A hash of the files, the rows and the way in which they are decoded."""
        said = f"{self.identity} {self.size} {self.shorter} {DECODER}"
        return hashlib.sha256(said.encode() + self.rows.tobytes()).digest()

    def decode(
        self, index: npt.NDArray[np.int64], draws: Draws | None = None
    ) -> npt.NDArray[np.uint8]:
        """Decode a batch of images on several threads.

        Args:
            index: The indices of the images, [B].
            draws: Numbers in [0, 1) for random resized crops, [B, TRIES, 4] (see `crop_draws`);
                None for the centre crop.

        Returns:
            Images, uint8 [B, size, size, 3].

        Raises:
            InputError: A file cannot be read as an image.
        """
        cuts: Iterable[Any] = [None] * len(index) if draws is None else draws.tolist()
        out = np.empty((len(index), *self.shape[1:]), np.uint8)

        def one(slot: int, row: int, cut: Any) -> None:
            out[slot] = self._one(row, cut)

        list(_pool().map(one, range(len(index)), self.rows[index].tolist(), cuts))
        return out

    def _one(self, row: int, draws: list[list[float]] | None) -> npt.NDArray[np.uint8]:
        """Decode the image in a row of `files`, uint8 [size, size, 3]."""
        image = decode(self.files.read(row), self.files.name(row))
        height, width = image.shape[:2]
        part = self.size / self.shorter
        box = centre(width, height, part) if draws is None else crop(width, height, draws)
        return resize(image, self.size, self.size, box)


def decode_all(where: str, files: StoredImages, rows: Ints) -> npt.NDArray[np.uint8]:
    """Decode images at their own size, uint8 [N, H, H, 3].

    Raises:
        InputError: A file is not an image, or the images differ in size or are not square.
    """

    def read(row: int) -> npt.NDArray[np.uint8]:
        return decode(files.read(row), files.name(row))

    images = list(_pool().map(read, rows.tolist()))
    shapes = {image.shape for image in images}
    if len(shapes) > 1 or any(shape[0] != shape[1] for shape in shapes):
        raise InputError(
            f"data {where!r}: its images differ in size or are not square: set data.image_size"
        )
    return np.stack(images)


def resize_array(images: npt.NDArray[np.uint8], size: int | None) -> npt.NDArray[np.uint8]:
    """Resize square images [N, H, H, channels] to `size` pixels; None leaves them as they are."""
    if size is None or size == images.shape[1]:
        return images
    return np.stack([resize(image, size, size) for image in images])


def prefetch(function: Callable[[_In], _Out], items: Iterable[_In]) -> Iterator[_Out]:
    """Apply a function to items in order, and compute AHEAD results in advance on a thread.

    Args:
        function: The function.
        items: Its arguments.

    Yields:
        The result for each item, in order.
    """
    waiting: deque[Any] = deque()
    with ThreadPoolExecutor(1) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@cache
def _pool() -> ThreadPoolExecutor:
    """Return a pool with one thread per core of this process (OMP_NUM_THREADS, set by Ray)."""
    return ThreadPoolExecutor(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of the threads
