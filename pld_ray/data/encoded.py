"""Images that stay encoded, on disk or in memory, until a batch needs them: ImageNet's way.

A random resized crop is a pure function of (seed, view, index) like all else that is random; what
of an image it shows is decoded straight to its final size.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pld_ray.data.augmentation import Draws, centre, crop
from pld_ray.errors import InputError

AHEAD = 2  # batches that are decoded before they are asked for
_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class EncodedImages:
    """One split of encoded images, with the length and shape of the decoded array.

    sources: paths, or the contents of the files. names: what tells the images apart and, with
    their bytes, changes when they do. Arrays, so that all processes of a node share them.
    """

    paths: npt.NDArray[np.bytes_] | None
    contents: npt.NDArray[np.uint8] | None  # one after another, where there are no paths
    ends: npt.NDArray[np.int64]  # the total bytes up to and with each image
    names: npt.NDArray[np.bytes_]
    size: int  # pixels of a side when decoded
    shorter: int  # side of the whole image before its centre is cut out
    begin: int = 0  # where the bytes of the first one begin

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, rows: slice) -> EncodedImages:
        """Some images, one after another."""
        paths = None if self.paths is None else self.paths[rows]
        first = rows.indices(len(self))[0]
        begin = int(self.ends[first - 1]) if first else self.begin
        ends, names = self.ends[rows], self.names[rows]
        return EncodedImages(paths, self.contents, ends, names, self.size, self.shorter, begin)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the decoded array."""
        return len(self), self.size, self.size, 3

    @cached_property
    def digest(self) -> bytes:
        """A hash of names and sizes: contents may be too many bytes to read them all."""
        return hashlib.sha256(self.names.tobytes() + self.ends.tobytes()).digest()

    def decode(
        self, index: npt.NDArray[np.int64], draws: Draws | None = None
    ) -> npt.NDArray[np.uint8]:
        """uint8 [B, size, size, 3]; cut as `draws` [B, TRIES, 4] in [0, 1) say, or the centre."""
        cuts: Iterable[Any] = [None] * len(index) if draws is None else draws.tolist()
        return np.stack(list(_pool().map(self._one, index.tolist(), cuts)))

    def _one(self, i: int, draws: list[list[float]] | None) -> npt.NDArray[np.uint8]:
        from PIL import Image

        source: Any
        if self.paths is not None:
            source = os.fsdecode(self.paths[i].item())
        else:
            assert self.contents is not None
            start = self.ends[i - 1] if i else self.begin
            source = io.BytesIO(self.contents[start : self.ends[i]].tobytes())
        try:
            with Image.open(source) as image:
                picture = image.convert("RGB")
        except OSError as error:
            name = os.fsdecode(self.names[i].item())
            raise InputError(f"{name}: cannot be read as an image: {error}") from None
        width, height = picture.size
        box = centre(width, height, self.size / self.shorter) if draws is None else None
        box = box or crop(width, height, draws or [])
        side = self.size, self.size
        return np.asarray(picture.resize(side, Image.Resampling.BICUBIC, box=box))


def prefetch(function: Callable[[_In], _Out], items: Iterable[_In]) -> Iterator[_Out]:
    """map(function, items), AHEAD of them computed beside the caller's own work."""
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
    """As many threads as this process has cores: Ray says it in OMP_NUM_THREADS."""
    return ThreadPoolExecutor(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
