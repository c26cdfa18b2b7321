"""Atomic files under one root: a local folder, or a URI that fsspec opens.

A reader sees either the whole file or no file. Local files are written under a temporary name in
the same folder and then renamed. An object store shows an object only when its upload is complete.
If several processes call `create` for the same path, exactly one succeeds: locally by a hard link,
in object stores by a conditional upload.
"""

from __future__ import annotations

import inspect
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import numpy as np
import numpy.typing as npt
from fsspec.implementations.local import LocalFileSystem

from pld_ray.errors import InputError

SETTLED = 2_000_000_000  # nanoseconds after which a file's time tells two writes apart
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "az": "azure"}


class Files:
    """Files by their path relative to a root, such as "trials/ID/record.json".

    Args:
        root: A local folder, or a URI (s3://, gs://, abfs://).

    Raises:
        InputError: The root is not valid, or the package for its protocol is not installed.
    """

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
            else:  # no listings cache, because other processes write to the same root
                self.fs, self.root = fsspec.core.url_to_fs(text, use_listings_cache=False)
                self.uri = text
        except ImportError as error:
            extra = EXTRAS.get(protocol)
            how = f"pip install 'pld-ray[{extra}]'" if extra else str(error)
            raise InputError(
                f"storage {text!r}: {protocol}:// needs a package that is not installed: {how}"
            ) from None
        except (ValueError, OSError, RuntimeError) as error:
            raise InputError(f"storage {text!r}: expected a folder or a URI: {error}") from None
        self.local = isinstance(self.fs, LocalFileSystem)

    def place(self, path: str) -> str:
        """Return the full path of a file, for messages and for other programs that read it."""
        return f"{self.root}/{path}"

    def read(self, path: str) -> bytes | None:
        """Read a file, or return None if it does not exist."""
        with self._told():
            try:
                if self.local:
                    return Path(self.place(path)).read_bytes()
                return self.fs.cat_file(self.place(path))
            except FileNotFoundError:
                return None

    def map(self, path: str) -> npt.NDArray[np.uint8] | None:
        """Read a file as an array of bytes, or return None if it does not exist.

        A local file is memory-mapped instead of read.
        """
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
        """Write a file atomically; an existing file is replaced."""
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
        """Create a file if it does not exist.

        If several processes try at the same time, exactly one succeeds.

        Returns:
            Whether this call created the file.
        """
        place = self.place(path)
        with self._told():
            try:
                if not self.local:
                    self.fs.pipe_file(place, content, mode="create")
                    return True
                part = self._part(place)  # linked when complete, so no reader sees half a file
                try:
                    part.write_bytes(content)
                    os.link(part, place)
                finally:
                    part.unlink(missing_ok=True)
            except FileExistsError:
                return False
        return True

    def delete(self, path: str) -> None:
        """Delete the file if it exists."""
        with self._told(), suppress(FileNotFoundError):
            self.fs.rm_file(self.place(path))

    def read_many(self, paths: Iterable[str]) -> dict[str, bytes]:
        """Read the files that exist; an object store reads them concurrently.

        Returns:
            The content of each file by path; missing files are left out.
        """
        paths = list(paths)
        if self.local or not paths:
            return {path: content for path in paths if (content := self.read(path)) is not None}
        # s3fs asks for the size of each file first, to read large ones in parts; these are small
        takes = inspect.signature(getattr(self.fs, "_cat_file", self.fs.cat_file)).parameters
        whole = {"max_concurrency": 1} if "max_concurrency" in takes else {}
        with self._told():
            found = self.fs.cat([self.place(path) for path in paths], on_error="return", **whole)
        if isinstance(found, bytes):  # `cat` returns plain bytes for a single path
            return {paths[0]: found}
        contents = {path: found.get(self.place(path)) for path in paths}
        for content in contents.values():
            if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                with self._told():
                    raise content
        return {path: content for path, content in contents.items() if isinstance(content, bytes)}

    def stamps(self, folder: str, paths: Iterable[str]) -> dict[str, str]:
        """Return a stamp for each file that exists; it changes when the file is written again.

        The stamp is "" for a local file that was written less than two seconds ago: another write
        could give the same stamp. An object store lists the whole folder, in parallel by the first
        character of names, which should be hex digits.

        Args:
            folder: The folder that holds all the files.
            paths: The paths of the files.
        """
        if self.local:
            found = {}
            for path in paths:
                with suppress(FileNotFoundError, NotADirectoryError):
                    about = os.stat(self.place(path))
                    found[path] = f"{about.st_mtime_ns}:{about.st_ctime_ns}:{about.st_size}"
                    if time.time_ns() - about.st_mtime_ns < SETTLED:
                        found[path] = ""
            return found
        place = self.place(folder)

        def listed(prefix: str) -> dict[str, Any]:
            with self._told(), suppress(FileNotFoundError):
                return self.fs.find(place, detail=True, prefix=prefix)
            return {}

        with ThreadPoolExecutor(16) as pool:
            parts = list(pool.map(listed, "0123456789abcdef"))
        there = {name: about for part in parts for name, about in part.items()}
        places = {path: self.place(path) for path in paths}
        return {path: _tag(there[name]) for path, name in places.items() if name in there}

    def listed(self, folder: str) -> dict[str, int]:
        """List all files below a folder.

        Files whose name starts with a dot are left out: a process may have died while it wrote
        them.

        Returns:
            The size of each file in bytes, by its path relative to the folder.
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

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders in a folder, sorted."""
        place = self.place(folder)
        with self._told():
            try:
                found = self.fs.ls(place, detail=True)
            except FileNotFoundError:
                return []
        return sorted(i["name"].rpartition("/")[2] for i in found if i["type"] == "directory")

    def missing(self, folder: str, paths: list[str]) -> list[str]:
        """Return those of the paths below a folder that do not exist, in the given order."""
        if self.local:
            return [path for path in paths if not os.path.exists(self.place(f"{folder}/{path}"))]
        parents = dict.fromkeys(path.rpartition("/")[0] for path in paths)
        there = {
            f"{parent}/{name}" for parent in parents for name in self.listed(f"{folder}/{parent}")
        }
        return [path for path in paths if path not in there]

    def delete_folder(self, folder: str) -> None:
        """Delete the folder and its files if it exists."""
        with self._told(), suppress(FileNotFoundError):
            self.fs.rm(self.place(folder), recursive=True)

    def free_bytes(self) -> int | None:
        """Return the free bytes on the disk of a local root, or None for other roots."""
        if not self.local:
            return None
        folder = next(p for p in (Path(self.root), *Path(self.root).parents) if p.is_dir())
        return shutil.disk_usage(folder).free

    def _part(self, place: str) -> Path:
        """Return a temporary path in the same folder, and create the folder."""
        folder, _, name = place.rpartition("/")
        os.makedirs(folder, exist_ok=True)
        return Path(folder, f".{name}.{uuid4().hex[:8]}")

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Convert the errors of an object store's library to an OSError of one sentence."""
        try:
            yield
        except Exception as error:
            if self.local:
                raise
            said = str(error).splitlines()
            raise OSError(
                f"storage {self.uri}: {said[0] if said else type(error).__name__}"
            ) from error


def _tag(about: dict[str, Any]) -> str:
    """Return the ETag of an object in a listing; "" if the listing has none."""
    return str(about.get("ETag") or about.get("etag") or "")
