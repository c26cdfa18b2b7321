"""The index of a store: a copy of the small files of many trials, one Parquet file for each kind.

    ROOT/index/record.json.parquet   one row per trial: its id, the stamp of the file, its content

The index is only a cache. A row is used if its stamp is that of the trial's own file (time and size
on a disk, the ETag in an object store); otherwise the file itself is read. Without the index, or
with a damaged one, everything is read from the trials, and the index is written again.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from pld_ray.store.files import Files

if TYPE_CHECKING:
    import pyarrow as pa

LOG = logging.getLogger(__name__)
FEW = 200  # files that are read faster one by one


class Row(NamedTuple):
    """A file in the index.

    Attributes:
        stamp: The stamp of the file when it was read.
        content: The bytes of the file.
    """

    stamp: str
    content: bytes


def path(name: str) -> str:
    """Return the path of the index of the files with a name, such as "record.json"."""
    return f"index/{name}.parquet"


def read_many(
    files: Files, trial_ids: Iterable[str], sound: Mapping[str, Callable[[bytes], bool]]
) -> dict[str, bytes]:
    """Read files of many trials, with the help of the index.

    Args:
        files: The files of the store.
        trial_ids: The ids of the trials.
        sound: The names of the files in the folder of a trial, and for each a check of its content.

    Returns:
        The content of each file by its path, trials/ID/NAME. Files that are missing or damaged are
        left out.
    """
    names = {f"trials/{key}/{name}": (key, name) for key in trial_ids for name in sound}

    def read(paths: Iterable[str]) -> dict[str, bytes]:
        found = files.read_many(paths)
        return {path: content for path, content in found.items() if sound[names[path][1]](content)}

    if len(names) <= FEW:
        return read(names)
    stamps = files.stamps("trials", names)
    there: dict[str, dict[str, str]] = {name: {} for name in sound}
    for each in stamps:
        key, name = names[each]
        there[name][key] = each
    found: dict[str, bytes] = {}
    for name, by_id in there.items():
        known = _load(files, name) if len(by_id) > FEW else {}
        for key, each in by_id.items():
            if key in known and stamps[each] and known[key].stamp == stamps[each]:
                found[each] = known[key].content
        fresh = read(each for each in by_id.values() if each not in found)
        found |= fresh
        if len(fresh) > FEW:
            rows = {names[each][0]: Row(stamps[each], content) for each, content in fresh.items()}
            _write(files, name, {k: r for k, r in (known | rows).items() if r.stamp})
    return found


def _load(files: Files, name: str) -> dict[str, Row]:
    """Return the rows of an index by trial id; none if it is missing or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        content = files.read(path(name))
        if content is None:
            return {}
        file = pq.ParquetFile(pa.BufferReader(content), page_checksum_verification=True)
        table = file.read()  # `pq.read_table` would import pyarrow.dataset, which takes a second
        columns = [table.column(column).to_pylist() for column in ("id", "stamp", "content")]
    except (pa.ArrowException, OSError, KeyError) as error:
        LOG.info("%s: %s; it is written again", files.place(path(name)), error)
        return {}
    rows = zip(*columns, strict=True)
    return {key: Row(stamp, content) for key, stamp, content in rows if content is not None}


def _write(files: Files, name: str, rows: dict[str, Row]) -> None:
    """Write an index. A store that cannot be written to is read without one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, pa.Array] = {
        "id": pa.array(rows.keys(), pa.string()),
        "stamp": pa.array([row.stamp for row in rows.values()], pa.string()),
        "content": pa.array([row.content for row in rows.values()], pa.large_binary()),
    }
    content = io.BytesIO()
    pq.write_table(
        pa.table(columns), content, compression="zstd", use_dictionary=False,
        write_page_checksum=True, write_statistics=False,
    )  # fmt: skip
    try:
        files.write(path(name), content.getvalue())
    except OSError as error:
        LOG.info("%s: %s", files.place(path(name)), error)
