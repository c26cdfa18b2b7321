"""Image files where they are stored: in folders, or in the cells of Arrow tables."""

from __future__ import annotations

import os
import platform
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from pld_ray.data.sampling import Ints
from pld_ray.errors import InputError


@dataclass(frozen=True)
class ImageFiles:
    """Image files below a folder. All data are arrays, which the processes of a node share.

    Attributes:
        root: The absolute path of the folder.
        names: The paths of the files relative to it, as bytes, [N].
        sizes: The size of each file in bytes, int64 [N].
    """

    root: str
    names: npt.NDArray[np.bytes_]
    sizes: Ints

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        """Return the path of a file."""
        return os.path.join(self.root, os.fsdecode(self.names[i].item()))

    def read(self, i: int) -> bytes:
        """Return the content of a file.

        Raises:
            InputError: It cannot be read, or it is not the file that was found at the start.
        """
        try:
            with open(self.name(i), "rb") as file:
                content = file.read()
        except OSError as error:
            raise InputError(f"{self.name(i)}: cannot be read: {error.strerror}") from None
        if len(content) != self.sizes[i]:
            raise InputError(
                f"{self.name(i)}: has {len(content)} bytes, and had {self.sizes[i]} when the run "
                "started: data must not change while trials use it"
            )
        return content

    def check_visible(self) -> None:
        """Raise InputError if this machine does not see the folder."""
        _check_visible(self.root)


@dataclass(frozen=True)
class ImageCells:
    """Cells of a Hugging Face dataset, which stays memory-mapped.

    Attributes:
        dataset: The dataset.
        column: The name of the column that holds the images.
        split: The name of the split, for error messages.
        sources: The parquet files from which the dataset was made, one after another, and the
            number of rows in them; empty if it was made from something else.
    """

    dataset: Any
    column: str
    split: str
    sources: tuple[tuple[str, int], ...] = ()

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def _chunks(self) -> tuple[list[int], list[tuple[Any, Any]]]:
        """The first row of each chunk, and the contents and paths in the chunk."""
        import pyarrow as pa

        starts, parts, start = [], [], 0
        for chunk in self.dataset.data.column(self.column).chunks:
            starts.append(start)
            start += len(chunk)
            if pa.types.is_struct(chunk.type):
                fields = [chunk.type.field(i).name for i in range(chunk.type.num_fields)]
                # `field` ignores the rows that are null as a whole; `flatten` does not.
                found = dict(zip(fields, chunk.flatten(), strict=True))
                contents = found.get("bytes")
                if contents is not None and pa.types.is_null(contents.type):
                    contents = None
                parts.append((contents, found.get("path")))
            else:
                parts.append((chunk, None))
        return starts, parts

    @property
    def complete(self) -> bool:
        """Whether the cells themselves hold the images, not paths of files."""
        contents = [contents for contents, _ in self._chunks[1]]
        return all(each is not None and not each.null_count for each in contents)

    @cached_property
    def sizes(self) -> Ints:
        """The size of each file in bytes, int64 [N]; -1 where a cell has no image."""
        import pyarrow.compute as pc

        found = [np.zeros(0, np.int64)]
        for contents, paths in self._chunks[1]:
            if contents is None or (paths is not None and contents.null_count):
                count = len(contents if contents is not None else paths)
                first = sum(map(len, found))
                found.append(np.array([self._size(first + i) for i in range(count)], np.int64))
            else:
                sizes = pc.fill_null(pc.binary_length(contents), -1)
                found.append(sizes.to_numpy(zero_copy_only=False).astype(np.int64))
        return np.concatenate(found)

    def _size(self, i: int) -> int:
        content, path = self._cell(i)
        if content is not None:
            return len(content)
        try:
            return os.path.getsize(path) if path and os.path.isabs(path) else -1
        except OSError:
            return -1

    def _cell(self, i: int) -> tuple[Any, str | None]:
        """Return the content of a cell as a buffer, and its path."""
        starts, parts = self._chunks
        chunk = bisect_right(starts, i) - 1
        contents, paths = parts[chunk]
        row = i - starts[chunk]
        content = None if contents is None else contents[row].as_buffer()
        return content, None if paths is None else paths[row].as_py()

    def read(self, i: int) -> bytes:
        """Return the content of the image in a row.

        Raises:
            InputError: The row has no image, or the file that it names cannot be read.
        """
        content, path = self._cell(i)
        if content is not None:
            return content.to_pybytes()
        if not path:
            raise InputError(f"{self.name(i)}: has no image")
        if not os.path.isabs(path):
            raise InputError(
                f"{self.name(i)}: its image is the relative path {path!r}: expected the content of "
                "the image, or an absolute path"
            )
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None

    def name(self, i: int) -> str:
        """Return the file, split and number of a row, from 0."""
        for file, count in self.sources:
            if i < count:
                return f"{file} row {i}"
            i -= count
        _, path = self._cell(i)
        return path if path and os.path.isabs(path) else f"{self.split} row {i}"

    def check_visible(self) -> None:
        """Raise InputError if this machine does not see the files of the dataset."""
        for file in self.dataset.cache_files:
            _check_visible(file["filename"])


def _check_visible(path: str) -> None:
    if not os.path.exists(path):
        raise InputError(
            f"{path}: not on the machine {platform.node()}: put the data on a path that all "
            "machines of the cluster see"
        )
