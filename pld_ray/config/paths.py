"""Paths in experiments: each is made absolute before it is used.

A relative path in a YAML file is relative to the folder of that file. On the command line it is
relative to the working folder. `~` and environment variables are expanded.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

HUBS = ("hf",)  # kinds of datasets whose name can be that of a hub instead of a path


def absolute(path: str, folder: str | Path = "") -> str:
    """Return a path as an absolute path.

    Args:
        path: The path; it may contain `~` and environment variables.
        folder: The folder to which a relative path is relative; by default the working folder.
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    return os.path.abspath(os.path.join(folder, expanded))


def absolute_dataset(name: str, folder: str | Path = "") -> str:
    """Return the name of a dataset, such as "folder:PATH", with an absolute path.

    The part after "hf:" is a path if it begins like one ("/", ".", "~", "$") or if there is such a
    folder. Otherwise it is a name on the hub.
    """
    kind, colon, path = name.partition(":")
    if not colon or not path:
        return name
    found = absolute(path, folder)
    if kind in HUBS and path[0] not in "/.~$" and not os.path.isdir(found):
        return name
    return f"{kind}:{found}"


def absolute_plugin(source: str, folder: str | Path = "") -> str:
    """Return the absolute path of a plug-in; the name of an installed package stays as it is."""
    return absolute(source, folder) if source.endswith(".py") or os.sep in source else source


def absolute_paths(value: Any, folder: Path, field: tuple[str, ...] = ()) -> Any:
    """Return settings with absolute paths: `data.name`, `data.root`, `teacher.weights`, `plugins`.

    Args:
        value: The value of a field, or a mapping of fields. The name of a field may be dotted, or
            be several fields separated by commas, as in a grid.
        folder: The folder to which relative paths are relative.
        field: The names of the field, from the outermost.

    Returns:
        A copy of `value`.
    """
    if isinstance(value, dict):
        return {key: _entry(str(key), part, folder, field) for key, part in value.items()}
    if isinstance(value, list):
        return [absolute_paths(part, folder, field) for part in value]
    if not isinstance(value, str):
        return value
    if field == ("plugins",):
        return absolute_plugin(value, folder)
    if field[-1:] == ("data",) or field[-2:] == ("data", "name"):
        return absolute_dataset(value, folder)
    weights = field[-2:] == ("teacher", "weights") and value not in ("", "train", "pretrained")
    return absolute(value, folder) if weights or field[-2:] == ("data", "root") else value


def _entry(key: str, value: Any, folder: Path, field: tuple[str, ...]) -> Any:
    """Return the value of one entry of a mapping with absolute paths."""
    names = [(*field, *name.strip().split(".")) for name in key.split(",")]
    if key == "choice":  # the values of a searched field
        names = [field]
    if len(names) > 1 and isinstance(value, list):  # rows with one value per field
        return [
            [absolute_paths(v, folder, name) for name, v in zip(names, row, strict=False)]
            if isinstance(row, list) and len(row) == len(names)
            else row
            for row in value
        ]
    return absolute_paths(value, folder, names[0])
