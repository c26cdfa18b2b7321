"""Datasets of the Hugging Face hub, and local folders in the layouts of its `datasets` library."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pld_ray.config.parts import Data
from pld_ray.data.images import Found
from pld_ray.data.registry import MAY_DOWNLOAD, register_dataset
from pld_ray.data.sampling import Ints
from pld_ray.data.stored import ImageCells
from pld_ray.errors import InputError, MissingError

# The validation split is the first of these that is there: a test split is only used if there is
# no other, and is left alone otherwise.
VAL = ("validation", "val", "valid", "dev", "test")
Sources = dict[str, tuple[tuple[str, int], ...]]  # the parquet files of each split, and their rows


@register_dataset("hf", has_path=True, encodes=True)
def hub(data: Data, path: str) -> Found:
    """Find a dataset of the hub, or a local folder of parquet, arrow, images or webdataset shards.

    The dataset is memory-mapped, so that its size does not matter, and the trials of a machine
    share it.
    """
    return _found(data, *_open(data, path))


def _found(data: Data, splits: dict[str, Any], sources: Sources) -> Found:
    """Choose the splits and columns of an opened dataset."""
    train_name = data.split.train
    val_name = data.split.val or next((name for name in VAL if name in splits), None)
    if val_name is None and not data.holdout:
        raise InputError(
            f"data {data.name!r}: expected a split {' or '.join(VAL)}, got {', '.join(splits)}: "
            "set data.split.val to one of them, or data.holdout to validate on training images"
        )
    found = {}
    for name in filter(None, (train_name, val_name)):
        dataset = splits.get(name)
        if dataset is None:
            raise InputError(
                f"data {data.name!r}: has no split {name!r}; its splits are {', '.join(splits)}"
            )
        if dataset.num_rows == 0:
            raise InputError(f"data {data.name!r}: its split {name} has no images")
        _check_columns(data, dataset, name)
        if dataset.num_rows != dataset.data.num_rows:  # a selection of rows
            dataset = dataset.flatten_indices()
        files = sources.get(name, ()) if dataset.num_rows == _rows(sources.get(name, ())) else ()
        found[name] = ImageCells(dataset, data.columns.image, name, files)
    train, val = found[train_name], found.get(val_name or "")
    labels, names = _labels(data, [train] if val is None else [train, val])
    second = None if val is None else (val, labels[1])
    state = _state(data, list(found.values()))
    if state is not None:
        content = repr(names).encode() + b"".join(part.tobytes() for part in labels)
        state += hashlib.sha256(content).hexdigest()
    return Found((train, labels[0]), second, names, state)


@register_dataset("parquet", has_path=True, encodes=True)
def parquet(data: Data, path: str) -> Found:
    """Find PATH/train*.parquet and PATH/val*.parquet (or validation*, or test*)."""
    if not os.path.isdir(path):
        raise MissingError(f"data {data.name!r}: the folder {path} does not exist")
    found = sorted(Path(path).glob("*.parquet"))
    starts = {"train": "train", "validation": "val", "test": "test"}
    files = {
        split: [str(file) for file in found if file.name.startswith(start)]
        for split, start in starts.items()
    }
    for file in found:
        if not file.name.startswith(tuple(starts.values())):
            raise InputError(
                f"{file}: belongs to no split: expected names that begin with train, val, "
                "validation or test"
            )
    files = {split: paths for split, paths in files.items() if paths}
    if "train" not in files:
        raise InputError(f"data {data.name!r}: expected train*.parquet and val*.parquet in {path}")
    return _found(data, *_open(data, "parquet", files))


def _state(data: Data, splits: list[ImageCells]) -> str | None:
    """Return a text that changes with the Arrow files; None if the images are in other files."""
    if not all(cells.complete for cells in splits):
        return None
    paths = {file["filename"]: None for cells in splits for file in cells.dataset.cache_files}
    times = [(path, os.stat(path).st_size, os.stat(path).st_ctime_ns) for path in paths]
    return repr((times, data.columns, data.split, list(map(len, splits))))


def _open(
    data: Data, path: str, files: dict[str, list[str]] | None = None
) -> tuple[dict[str, Any], Sources]:
    """Open a dataset with the library, and find the files from which it was made.

    Args:
        data: The settings of the dataset.
        path: A folder, a name on the hub, or "parquet".
        files: The files of each split, for "parquet".
    """
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"data {data.name!r} needs another package: pip install 'pld-ray[hf]'"
        ) from None
    if os.path.isabs(path):
        if not os.path.isdir(path):
            raise MissingError(f"data {data.name!r}: the folder {path} does not exist")
        if any((Path(path) / name).is_file() for name in ("dataset_dict.json", "state.json")):
            try:
                opened = datasets.load_from_disk(path)
            except Exception as error:  # of pyarrow, of JSON, of the library
                raise InputError(_said(data, error)) from None
            return dict(opened) if isinstance(opened, dict) else {"train": opened}, {}
    if os.path.isabs(path) or files:
        builder = _prepared(data, path, files)
    else:
        builder = _from_hub(data, path)
    made_of = _files(builder)
    return _splits(data, builder), {name: _counted(tuple(made_of[name])) for name in made_of}


def _files(builder: Any) -> dict[str, list[str]]:
    """Return the local files of each split from which a dataset is made."""
    found = getattr(builder.config, "data_files", None) or {}
    return {name: [file for file in found[name] if os.path.isfile(file)] for name in found}


def _from_hub(data: Data, path: str) -> Any:
    """Return the builder of a dataset of the hub: from the cache, else downloaded if allowed."""
    try:
        with _offline():
            return _prepared(data, path)
    except MissingError as error:
        missing = error
    if MAY_DOWNLOAD.get():
        return _prepared(data, path)
    raise missing


def _prepared(data: Data, path: str, files: dict[str, list[str]] | None = None) -> Any:
    """Return the builder of a dataset, with all splits in the cache as Arrow files."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    local = os.path.isabs(path) or files is not None
    with quiet():
        try:
            builder = load_dataset_builder(path, name=data.config, data_files=files)
            _check_parquet(data, _files(builder))
            stale = _stale(builder)
            builder.download_and_prepare(download_mode="force_redownload" if stale else None)
        except InputError:
            raise
        except DatasetGenerationError as error:
            raise InputError(_said(data, error.__cause__ or error)) from None
        except (DatasetNotFoundError, ConnectionError) as error:
            if local:
                raise InputError(_said(data, error)) from None
            config = f", {data.config!r}" if data.config else ""
            raise MissingError(
                f"data {data.name!r}: not in the cache of this machine, and not found on the hub "
                f"({_line(error)}): to fetch it where there is a network, run python -c "
                f'"import datasets; datasets.load_dataset({path!r}{config})", and copy or share '
                "the folder HF_HOME"
            ) from None
        except (ValueError, OSError, ImportError, RuntimeError, TypeError) as error:
            raise InputError(_said(data, error)) from None
    return builder


def _stale(builder: Any) -> bool:
    """Return whether a local file has changed since the library cached it.

    The library looks at the time of modification, which programs can set. The time of the last
    change cannot be set.
    """
    info = Path(builder.cache_dir) / "dataset_info.json"
    changes = [os.stat(file).st_ctime_ns for files in _files(builder).values() for file in files]
    return info.is_file() and max(changes, default=0) > info.stat().st_ctime_ns


def _splits(data: Data, builder: Any) -> dict[str, Any]:
    """Return the splits of a dataset, and those that the settings name, such as "train[:90%]"."""
    names = dict.fromkeys(builder.info.splits or ())
    for name in filter(None, (data.split.train, data.split.val)):
        if "[" in name or "+" in name:
            names[name] = None
    found = {}
    for name in names:
        try:
            found[name] = builder.as_dataset(split=name)
        except ValueError as error:
            raise InputError(f"data {data.name!r}: split {name!r}: {_line(error)}") from None
    return found


def _said(data: Data, error: BaseException) -> str:
    return f"data {data.name!r}: cannot be read by Hugging Face datasets: {_line(error)}"


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _check_parquet(data: Data, files: dict[str, list[str]]) -> None:
    """Check parquet files one by one: the library's own errors do not name the file.

    Raises:
        InputError: A file is broken, or its labels are of another kind than those of the others:
            words and numbers, or other names of classes.
    """
    import pyarrow.parquet as pq

    val = data.split.val or next((name for name in VAL if name in files), "")
    used = set(re.split(r"\W+", f"{data.split.train} {val}"))  # such as "train[:90%]" and "test"
    kinds: dict[str, str] = {}  # the first file with each kind of labels
    for name, file in ((name, file) for name, each in files.items() for file in each):
        if not file.endswith(".parquet"):
            continue
        try:
            schema, rows = pq.read_schema(file), pq.read_metadata(file).num_rows
        except Exception as error:  # pyarrow raises many types for a broken file
            raise InputError(f"{file}: cannot be read as parquet: {_line(error)}") from None
        if not rows:
            raise InputError(f"{file}: has no rows")
        if name not in used or data.columns.label not in schema.names:
            continue
        known = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = known.get("info", {}).get("features", {}).get(data.columns.label) or {}
        text = _is_text(schema.field(data.columns.label).type)
        kind = f"the classes {feature['names']}" if feature.get("names") else ""
        kinds.setdefault(kind or ("words" if text else "numbers"), file)
    if len(kinds) > 1:
        (first, one), (second, other) = list(kinds.items())[:2]
        raise InputError(
            f"{other}: its labels are {second}, and those of {one} are {first}: expected the same "
            "kind in all files"
        )


def _counted(files: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    """Return parquet files with their numbers of rows; nothing for other files."""
    import pyarrow.parquet as pq

    if not all(file.endswith(".parquet") and os.path.isfile(file) for file in files):
        return ()
    return tuple((file, pq.read_metadata(file).num_rows) for file in files)


def _rows(files: tuple[tuple[str, int], ...]) -> int:
    return sum(count for _, count in files)


@contextmanager
def quiet() -> Iterator[None]:
    """Show no warnings of the library, and bars in a terminal only."""
    import datasets
    import huggingface_hub

    loggers = datasets.logging, huggingface_hub.logging
    levels = [logger.get_verbosity() for logger in loggers]
    bars = datasets.is_progress_bar_enabled()
    for logger in loggers:
        logger.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.set_verbosity(level)


@contextmanager
def _offline() -> Iterator[None]:
    """Let the library look into its cache only. It reads these settings at every call."""
    import datasets
    import huggingface_hub

    places: list[Any] = [datasets.config, huggingface_hub.constants]
    before = [place.HF_HUB_OFFLINE for place in places]
    for place in places:
        place.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _check_columns(data: Data, dataset: Any, split: str) -> None:
    """Raise InputError unless the columns of images and labels are there and can be used."""
    import pyarrow as pa

    there = dataset.column_names
    for field, name in (("image", data.columns.image), ("label", data.columns.label)):
        if name not in there:
            raise InputError(
                f"data {data.name!r}: split {split} has no column {name}; its columns are "
                f"{', '.join(there)}: set data.columns, such as "
                f"{{image: {there[0]}, label: {there[-1]}}}"
            )
        kind = dataset.data.schema.field(name).type
        if field == "image":
            fields = {f.name for f in kind} if pa.types.is_struct(kind) else set()
            binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
            if not binary and not fields & {"bytes", "path"}:
                raise InputError(
                    f"data {data.name!r}: its column {name} holds {kind}: expected image files, as "
                    "bytes or as a mapping with bytes and path; set data.columns.image"
                )
        elif not (pa.types.is_integer(kind) or _is_text(kind)):
            raise InputError(
                f"data {data.name!r}: its column {name} holds {kind}: expected class indices or "
                "words; set data.columns.label"
            )


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _labels(data: Data, splits: list[ImageCells]) -> tuple[list[Ints], tuple[str, ...]]:
    """Return the labels of each split as class indices, and the names of the classes.

    Words are classes in sorted order.

    Raises:
        InputError: A label is missing or out of range, or a word is in the validation split only.
    """
    column = data.columns.label
    text = [_is_text(cells.dataset.data.schema.field(column).type) for cells in splits]
    if len(set(text)) > 1:
        raise InputError(
            f"data {data.name!r}: its column {column} holds words in one split and numbers in "
            "another: expected the same in both"
        )
    features = [cells.dataset.features[column] for cells in splits]
    named = getattr(features[0], "names", None)
    if any(getattr(feature, "names", None) != named for feature in features):
        raise InputError(
            f"data {data.name!r}: its splits name their classes differently: "
            f"{' and '.join(str(getattr(f, 'names', None)) for f in features)}: expected the same "
            "names in the same order"
        )
    found = [_label_column(cells, column, text[0]) for cells in splits]
    if text[0]:
        names = tuple(sorted(set(found[0])))
        index = {name: i for i, name in enumerate(names)}
        for cells, words in zip(splits, found, strict=True):
            for row, word in enumerate(words):
                if word not in index:
                    raise InputError(
                        f"{cells.name(row)}: its label {word!r} is not a class of the training "
                        "split"
                    )
        return [np.array([index[word] for word in words], np.int64) for words in found], names
    count = len(named) if named else int(max(x.max(initial=-1) for x in found)) + 1
    for cells, labels in zip(splits, found, strict=True):
        wrong = np.flatnonzero((labels < 0) | (labels >= count))
        if len(wrong):
            expected = f"a class index from 0 to {count - 1}" if named else "a class index from 0"
            row = int(wrong[0])
            raise InputError(f"{cells.name(row)}: its label is {labels[row]}: expected {expected}")
    there = np.unique(found[0])
    if not named and len(there) < count:
        gap = int(np.flatnonzero(np.append(there, -1) != np.arange(len(there) + 1))[0])
        raise InputError(
            f"data {data.name!r}: no training image has the label {gap}, and there are labels up "
            f"to {count - 1}: expected class indices from 0 without gaps, or words"
        )
    return found, tuple(named or map(str, range(count)))


def _label_column(cells: ImageCells, column: str, text: bool) -> Any:
    """Return the labels of a split: an array of integers, or a list of words."""
    values = cells.dataset.data.column(column)
    if values.null_count:
        row = int(np.flatnonzero(np.concatenate([c.is_null() for c in values.chunks]))[0])
        expected = "a word" if text else "a class index from 0"
        raise InputError(f"{cells.name(row)}: its label is None: expected {expected}")
    if text:
        return values.to_pylist()
    try:
        return values.cast("int64").to_numpy()
    except ValueError as error:
        raise InputError(f"{cells.split}: its column {column}: {_line(error)}") from None
