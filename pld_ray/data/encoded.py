"""Images that stay encoded, on disk or in memory, until a batch needs them, for large datasets.

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
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pld_ray.data.augmentation import Draws, centre, crop
from pld_ray.data.image_files import open_rgb

AHEAD = 2  # batches that are decoded in advance
_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class EncodedImages:
    """One split of encoded images, with the length and shape of the decoded array.

    All data are arrays, so that the processes of a node share them.

    Attributes:
        paths: The paths of the files, or None if `contents` holds the images.
        contents: The concatenated contents of the files, or None if there are paths.
        ends: The total bytes up to and including each image, int64 [N].
        names: The names of the images: relative paths, or SHA-256 hashes of the contents.
        size: The side of a decoded image in pixels.
        shorter: The shorter side of the whole image before the centre crop of `size`, in pixels.
        told: What error messages call each image, if `names` are hashes.
        begin: The position of the first image in `contents`, in bytes.
    """

    paths: npt.NDArray[np.bytes_] | None
    contents: npt.NDArray[np.uint8] | None
    ends: npt.NDArray[np.int64]
    names: npt.NDArray[np.bytes_]
    size: int
    shorter: int
    told: npt.NDArray[np.bytes_] | None = None
    begin: int = 0

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, rows: slice) -> EncodedImages:
        """Return a contiguous slice of the images."""
        paths = None if self.paths is None else self.paths[rows]
        first = rows.indices(len(self))[0]
        begin = int(self.ends[first - 1]) if first else self.begin
        told = None if self.told is None else self.told[rows]
        return replace(
            self, paths=paths, ends=self.ends[rows], names=self.names[rows], told=told, begin=begin
        )

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the decoded array, (N, size, size, 3)."""
        return len(self), self.size, self.size, 3

    @cached_property
    def digest(self) -> bytes:
        """A hash of names and sizes; hashing the contents could mean reading too many bytes."""
        return hashlib.sha256(self.names.tobytes() + self.ends.tobytes()).digest()

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
        return np.stack(list(_pool().map(self._one, index.tolist(), cuts)))

    def _one(self, i: int, draws: list[list[float]] | None) -> npt.NDArray[np.uint8]:
        """Decode the image with index i, uint8 [size, size, 3]."""
        from PIL.Image import Resampling

        source: str | bytes
        if self.paths is not None:
            source = os.fsdecode(self.paths[i].item())
        else:
            assert self.contents is not None
            start = self.ends[i - 1] if i else self.begin
            source = self.contents[start : self.ends[i]].tobytes()
        picture = open_rgb(source, self._name(i))
        width, height = picture.size
        box = centre(width, height, self.size / self.shorter) if draws is None else None
        box = box or crop(width, height, draws or [])
        side = self.size, self.size
        return np.asarray(picture.resize(side, Resampling.BICUBIC, box=box))

    def _name(self, i: int) -> str:
        """Return what error messages call the image with index i."""
        names = self.names if self.told is None else self.told
        return os.fsdecode(names[i].item())


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
