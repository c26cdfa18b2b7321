"""Find the image files of a folder with one folder per class, and remember what was found.

A large folder takes minutes to list on a network disk. The list is therefore kept in the cache. A
kept list is used only if the folder has not changed: the times of all folders are compared, and
the size and time of every file, or of 2,000 files if there are more than 100,000.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pld_ray.data.fingerprints import cache_folder, write_cached
from pld_ray.data.image_files import NOT_READ, READ
from pld_ray.data.sampling import Ints, order
from pld_ray.errors import InputError

COMPARED_WHOLE = 100_000  # up to this many files, each is compared with what was found before
COMPARED = 2_000  # files that are compared of more
Names = npt.NDArray[np.bytes_]


@dataclass(frozen=True)
class FolderIndex:
    """The image files of one split.

    Attributes:
        names: The paths of the files relative to the folder, in sorted order per class, [N].
        sizes: Their sizes in bytes, int64 [N].
        times: The times at which they were last changed (ctime) in nanoseconds, int64 [N]. Unlike
            the time of modification, it cannot be set by programs.
        labels: The index of the class of each file, int64 [N].
        classes: The names of the classes, sorted, [C].
        folders: All folders with their times: paths [F] and int64 [F].
    """

    names: Names
    sizes: Ints
    times: Ints
    labels: Ints
    classes: Names
    folders: Names
    folder_times: Ints

    @property
    def state(self) -> str:
        """A hash of everything that was found. It changes when a file changes."""
        digest = hashlib.sha256()
        for array in (self.names, self.sizes, self.times, self.labels, self.classes):
            digest.update(f"{array.shape}{array.dtype}".encode() + array.tobytes())
        return digest.hexdigest()


def index_folder(root: Path, where: str) -> tuple[FolderIndex, list[str]]:
    """Find the images in ROOT/CLASS and in all folders below it, class after class.

    Hidden files and folders, whose names start with a dot, are left out.

    Args:
        root: The absolute path of the folder of a split.
        where: The dataset, for error messages.

    Returns:
        The images, and sentences about classes without images, or with images that are not read.

    Raises:
        InputError: A folder or the size of a file cannot be read.
    """
    cached = cache_folder() / "folders" / f"{hashlib.sha256(os.fsencode(root)).hexdigest()}.npz"
    kept = _read(cached)
    if kept is not None and _unchanged(kept, root):
        return kept, []
    try:
        found, faults = _search(root, where)
    except OSError as error:
        raise InputError(f"{where}: {error.filename}: cannot be read: {error.strerror}") from None
    if not faults:
        buffer = io.BytesIO()
        np.savez(buffer, **vars(found))
        write_cached(cached, buffer.getvalue())
    return found, faults


def class_folders(root: Path) -> list[str]:
    """Return the names of the folders in a folder that are not hidden, sorted."""
    found = []
    with os.scandir(root) as entries:
        for entry in entries:
            if _hidden(entry):
                continue
            if entry.is_dir():
                found.append(entry.name)
            elif entry.is_symlink() and _ending(entry) not in READ:
                entry.stat()  # a broken link is an error: it may be that of a class
    return sorted(found)


def _hidden(entry: os.DirEntry[str]) -> bool:
    return entry.name.startswith(".")


def _ending(entry: os.DirEntry[str]) -> str:
    return os.path.splitext(entry.name)[1].lower()


def _search(root: Path, where: str) -> tuple[FolderIndex, list[str]]:
    faults: list[str] = []
    names: list[bytes] = []
    numbers: list[tuple[int, int, int]] = []
    folders = [(b"", os.stat(root).st_ctime_ns)]
    classes = class_folders(root)
    with os.scandir(root) as there:
        loose = [e.name for e in there if not _hidden(e) and _ending(e) in READ | NOT_READ]
    if loose := [name for name in loose if name not in classes]:
        faults.append(
            f"{where}: {root} has {len(loose)} images outside the folders of its classes, such as "
            f"{min(loose)}: move or remove them"
        )
    for label, name in enumerate(classes):
        files: list[tuple[str, int, int]] = []
        not_read: list[str] = []
        for folder, time, entries in _walk(root / name):
            folders.append((os.fsencode(os.path.relpath(folder, root)), time))
            for entry in entries:
                if _ending(entry) in READ:
                    found = entry.stat()
                    if not stat.S_ISREG(found.st_mode):
                        faults.append(f"{where}: {entry.path}: is not a regular file")
                        continue
                    files.append((entry.path, found.st_size, found.st_ctime_ns))
                elif _ending(entry) in NOT_READ:
                    not_read.append(entry.name)
                elif entry.is_symlink():
                    entry.stat()  # a broken link is an error: it may be that of a folder
        faults += _faults(where, root / name, len(files), not_read)
        cut = len(os.fspath(root)) + 1
        files.sort()
        names += [os.fsencode(path[cut:]) for path, _, _ in files]
        numbers += [(size, time, label) for _, size, time in files]
    columns = np.array(numbers, np.int64).reshape(-1, 3)
    index = FolderIndex(
        names=np.array(names, np.bytes_),
        sizes=columns[:, 0].copy(),
        times=columns[:, 1].copy(),
        labels=columns[:, 2].copy(),
        classes=np.array([os.fsencode(name) for name in classes], np.bytes_),
        folders=np.array([name for name, _ in folders], np.bytes_),
        folder_times=np.array([time for _, time in folders], np.int64),
    )
    return index, faults


def _walk(folder: Path | str) -> Iterator[tuple[str, int, list[os.DirEntry[str]]]]:
    """Yield every folder that is not hidden: its path, its time and its files."""
    time = os.stat(folder).st_ctime_ns  # before it is read, so that a later change is noticed
    with os.scandir(folder) as found:
        entries = [entry for entry in found if not _hidden(entry)]
    below = [entry.path for entry in entries if entry.is_dir()]
    yield str(folder), time, [entry for entry in entries if not entry.is_dir()]
    for path in sorted(below):
        yield from _walk(path)


def _faults(where: str, folder: Path, count: int, not_read: list[str]) -> list[str]:
    """Return what is wrong with the folder of a class."""
    read = f"files with these endings are read: {', '.join(sorted(READ))}"
    if not_read:
        return [
            f"{where}: {folder} has {len(not_read)} images that cannot be read, such as "
            f"{min(not_read)}: convert or remove them; {read}"
        ]
    return [] if count else [f"{where}: the class {folder} has no images; {read}"]


def _read(cached: Path) -> FolderIndex | None:
    try:
        with np.load(cached, allow_pickle=False) as arrays:
            return FolderIndex(**arrays)
    except Exception:  # there is none, or it is damaged: numpy raises many types
        return None


def _unchanged(index: FolderIndex, root: Path) -> bool:
    """Return whether the files of an index are still the same."""
    rows = np.arange(len(index.names))
    if len(rows) > COMPARED_WHOLE:
        rows = order(0, 0, len(rows))[:COMPARED]

    def now(name: Any) -> os.stat_result:
        return os.stat(os.path.join(root, os.fsdecode(name)))

    try:
        for name, time in zip(index.folders.tolist(), index.folder_times.tolist(), strict=True):
            if now(name).st_ctime_ns != time:
                return False
        for row in rows.tolist():
            found = now(index.names[row].item())
            if (found.st_size, found.st_ctime_ns) != (index.sizes[row], index.times[row]):
                return False
    except OSError:
        return False
    return True
