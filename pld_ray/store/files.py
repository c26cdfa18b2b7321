"""Bytes in named places under one root: a local folder, or a URI that fsspec opens.

A file appears whole or not at all. Locally it is written beside its place and moved there; an
object store shows an object when its upload is complete, and has no move. `create` succeeds for one
of all who try: by O_EXCL locally, by a conditional upload in object stores.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import fsspec
import numpy as np
import numpy.typing as npt
from fsspec.implementations.local import LocalFileSystem

from pld_ray.errors import InputError

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "az": "azure"}


class Files:
    """Files by their path below the root, such as "trials/ID/record.json"."""

    def __init__(self, root: str | Path) -> None:
        text = str(root)
        if not text or "\0" in text:
            raise InputError(f"storage {text!r}: expected a folder or a URI")
        protocol = text.partition("://")[0] if "://" in text else "file"
        try:
            if protocol == "file":
                folder = text.removeprefix("file://")
                self.fs, self.root = LocalFileSystem(), str(Path(folder).expanduser().resolve())
                self.uri = self.root
            else:  # others write there too: what was listed once need not be so any more
                self.fs, self.root = fsspec.core.url_to_fs(text, use_listings_cache=False)
                self.uri = text
        except ImportError as error:
            extra = EXTRAS.get(protocol)
            how = f"pip install 'pld-ray[{extra}]'" if extra else str(error)
            raise InputError(
                f"storage {text!r}: {protocol}:// needs another package: {how}"
            ) from None
        except (ValueError, OSError, RuntimeError) as error:
            raise InputError(f"storage {text!r}: expected a folder or a URI: {error}") from None
        self.local = isinstance(self.fs, LocalFileSystem)

    def place(self, path: str) -> str:
        """Where a file lies, for messages and for programs that read it themselves."""
        return f"{self.root}/{path}"

    # ---- one file

    def read(self, path: str) -> bytes | None:
        """Its content, or None if it is not there."""
        with self._told():
            try:
                if self.local:
                    return Path(self.place(path)).read_bytes()
                return self.fs.cat_file(self.place(path))
            except FileNotFoundError:
                return None

    def map(self, path: str) -> npt.NDArray[np.uint8] | None:
        """Its content as an array, or None; a local file is mapped, not read."""
        if not self.local:
            content = self.read(path)
            return None if content is None else np.frombuffer(content, np.uint8)
        try:
            return np.memmap(self.place(path), np.uint8, "r")
        except FileNotFoundError:
            return None
        except ValueError:  # an empty file cannot be mapped
            return np.zeros(0, np.uint8)

    def write(self, path: str, content: bytes) -> None:
        """Put a file in place, whole, over what was there."""
        place = self.place(path)
        if not self.local:
            with self._told():
                self.fs.pipe_file(place, content)
            return
        part = self._part(place)
        try:
            part.write_bytes(content)
            part.replace(place)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def create(self, path: str, content: bytes) -> bool:
        """Put a file in place if there is none; False if there is. One of all who try succeeds."""
        place = self.place(path)
        with self._told():
            try:
                if not self.local:
                    self.fs.pipe_file(place, content, mode="create")
                    return True
                part = self._part(place)  # a link, unlike an open file, is never seen half-written
                try:
                    part.write_bytes(content)
                    os.link(part, place)
                finally:
                    part.unlink(missing_ok=True)
            except FileExistsError:
                return False
        return True

    def delete(self, path: str) -> None:
        """Delete a file; none there is as good."""
        with self._told(), suppress(FileNotFoundError):
            self.fs.rm_file(self.place(path))

    # ---- many

    def read_many(self, paths: Iterable[str]) -> dict[str, bytes]:
        """The content of those that are there; from an object store many at a time."""
        paths = list(paths)
        if self.local or not paths:
            return {path: content for path in paths if (content := self.read(path)) is not None}
        with self._told():
            found = self.fs.cat([self.place(path) for path in paths], on_error="return")
        if isinstance(found, bytes):  # of a single path
            return {paths[0]: found}
        contents = {path: found.get(self.place(path)) for path in paths}
        for content in contents.values():
            if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                with self._told():
                    raise content
        return {path: content for path, content in contents.items() if isinstance(content, bytes)}

    def listed(self, folder: str) -> dict[str, int]:
        """All files below a folder, by their path below it, and their bytes.

        Files whose name begins with a dot are left out: of a process that died while writing.
        """
        place = self.place(folder)
        with self._told():
            try:
                found = self.fs.find(place, detail=True)
            except FileNotFoundError:
                return {}
        sizes = {
            path.removeprefix(place).lstrip("/"): info["size"] or 0 for path, info in found.items()
        }
        return {path: size for path, size in sizes.items() if not Path(path).name.startswith(".")}

    def missing(self, folder: str, paths: list[str]) -> list[str]:
        """Those of the paths below a folder that are not there, in their order."""
        if self.local:
            return [path for path in paths if not os.path.exists(self.place(f"{folder}/{path}"))]
        parents = dict.fromkeys(path.rpartition("/")[0] for path in paths)
        there = {
            f"{parent}/{name}" for parent in parents for name in self.listed(f"{folder}/{parent}")
        }
        return [path for path in paths if path not in there]

    def delete_folder(self, folder: str) -> None:
        """Delete a folder and all in it; none there is as good."""
        with self._told(), suppress(FileNotFoundError):
            self.fs.rm(self.place(folder), recursive=True)

    def free_bytes(self) -> int | None:
        """The room left on the disk of a local root."""
        if not self.local:
            return None
        folder = next(p for p in (Path(self.root), *Path(self.root).parents) if p.is_dir())
        return shutil.disk_usage(folder).free

    # ----

    def _part(self, place: str) -> Path:
        folder, _, name = place.rpartition("/")
        os.makedirs(folder, exist_ok=True)
        return Path(folder, f".{name}.{uuid4().hex[:8]}")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What an object store's library raises, as an OSError in one sentence."""
        try:
            yield
        except Exception as error:
            if self.local:
                raise
            said = str(error).splitlines()
            raise OSError(
                f"storage {self.uri}: {said[0] if said else type(error).__name__}"
            ) from error
