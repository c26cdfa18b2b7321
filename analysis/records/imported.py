"""Results from elsewhere, such as those of a paper: read a CSV and find what it is beside.

A file has one row per result, or one row per seed. `pld-ray import` keeps it in the folder
imported/ of the storage. Tables and figures then show it as "reported" beside the methods of
experiments on the same dataset and pair of networks.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pld_ray.errors import InputError, nearest
from pld_ray.losses import REGISTRY
from pld_ray.store.store import Store

FOLDER = "imported"
PLACE = ["dataset", "student", "teacher", "setting", "method", "source"]
REQUIRED = ["dataset", "student", "method", "top1"]
OPTIONAL = ["teacher", "setting", "source", "note", "std", "n", "seed"]
NUMBERS = ["top1", "std", "n"]
COLUMNS = [*PLACE, "note", *NUMBERS]
EPOCHS = ("last", "best", "")  # the epoch that a result is of; "": not stated


def read(path: Path, also: Sequence[str] = ()) -> tuple[pd.DataFrame, list[str]]:
    """Read a CSV of results and check it.

    Args:
        path: The file. It has the columns dataset, student, method and top1 (in percent). It may
            have teacher, setting, source, note, std (in percentage points) and n (seeds); or seed,
            with one row per seed: then mean, standard deviation (n - 1) and n are computed.
        also: Further columns to keep, which the file may have: epoch ("last", "best" or ""),
            teacher_top1 and student_top1 (in percent), and any others, which are texts.

    Returns:
        A table with the columns `COLUMNS` and `also`, and the names of the columns that are not
        used. Numbers are NaN where they are not known.

    Raises:
        InputError: The file cannot be read, or a row is not valid.
    """
    header, lines = _cells(path)
    for name in REQUIRED:
        if name not in header:
            raise InputError(
                f"{path}: the column {name!r} is missing: expected {', '.join(REQUIRED)}, and if "
                f"known {', '.join(OPTIONAL)}; it has {', '.join(header)}"
            )
    if not lines:
        raise InputError(f"{path}: expected at least one row below the header")
    rows = [
        _row(f"{path}, line {at}", dict(zip(header, line, strict=True)), also) for at, line in lines
    ]
    for row in rows:
        row["source"] = row["source"] or path.stem
    table = pd.DataFrame(rows)
    if table["top1"].max() <= 1:
        raise InputError(f"{path}: no top1 is above 1: expected percentages, such as 74.9")
    if (table["seed"] != "").any():
        table = _averaged(path, table, also)
    unused = [name for name in header if name not in (*REQUIRED, *OPTIONAL, *also)]
    return table[[*COLUMNS, *also]].drop_duplicates(ignore_index=True), unused


def _cells(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header of a CSV file, and its rows that are not empty with their lines."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
        found = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: expected a CSV file in UTF-8: {error}") from None
    found = [(at, row) for at, row in found if any(row)]
    if not found:
        raise InputError(f"{path}: expected a CSV file with a header; it is empty")
    header = [name.lower() for name in found[0][1]]
    for name in header:
        if header.count(name) > 1:
            raise InputError(f"{path}: the column {name!r} is there twice")
    for at, row in found[1:]:
        if len(row) != len(header):
            raise InputError(
                f"{path}, line {at}: {len(row)} fields, and the header has {len(header)}: expected "
                "a text with commas in double quotes, and numbers with a point"
            )
    return header, found[1:]


def _row(where: str, row: dict[str, str], also: Sequence[str]) -> dict[str, Any]:
    """Return a checked row with all columns of a file."""
    row = dict.fromkeys([*OPTIONAL, *also], "") | row
    for name in ("dataset", "student", "method"):
        if not row[name]:
            raise InputError(f"{where}: {name} is '': expected a name")
    if row["method"].lower() == "teacher":
        row["method"] = "Teacher"
        if not row["teacher"]:
            raise InputError(f"{where}: teacher is '': expected its name for the method Teacher")
    if row["seed"] and not re.fullmatch(r"\d+", row["seed"]):
        raise InputError(f"{where}: seed is {row['seed']!r}: expected a whole number")
    numbers = {
        "top1": _number(where, row, "top1", "a percentage, 0 to 100"),
        "std": _number(where, row, "std", "percentage points, 0 to 100, or ''"),
        "n": _number(where, row, "n", "a number of seeds, or ''", 1e9),
    }
    if math.isnan(numbers["top1"]):
        raise InputError(f"{where}: top1 is '': expected a percentage, 0 to 100")
    if numbers["n"] < 1 or numbers["n"] % 1 > 0:
        raise InputError(f"{where}: n is {row['n']!r}: expected a number of seeds, or ''")
    if "epoch" in also and row["epoch"] not in EPOCHS:
        raise InputError(f"{where}: epoch is {row['epoch']!r}: expected 'last', 'best' or ''")
    for name in {"teacher_top1", "student_top1"} & {*also}:
        numbers[name] = _number(where, row, name, "a percentage, 0 to 100, or ''")
    return row | numbers


def _number(where: str, row: dict[str, str], name: str, expected: str, most: float = 100) -> float:
    """Return a number of a row, NaN if there is none."""
    try:
        value = float(row[name]) if row[name] else None
    except ValueError:
        value = math.inf
    if value is None:
        return math.nan
    if not 0 <= value <= most:
        raise InputError(f"{where}: {name} is {row[name]!r}: expected {expected}")
    return value


def _averaged(path: Path, rows: pd.DataFrame, also: Sequence[str]) -> pd.DataFrame:
    """Return one row per result from one row per seed."""
    for row in rows.to_dict("records"):
        if not row["seed"] or not math.isnan(row["std"]) or not math.isnan(row["n"]):
            raise InputError(
                f"{path}: {row['method']} of {row['student']} has the seed {row['seed']!r}: "
                "expected a seed in all rows or in none, and no std and n beside it"
            )
    twice = rows[rows.assign(seed=rows["seed"].astype(int)).duplicated([*PLACE, "seed"])]
    for row in twice.to_dict("records"):
        raise InputError(
            f"{path}: the seed {row['seed']} of {row['method']} and {row['student']} is there "
            "twice: expected one row for each seed"
        )
    groups = rows.groupby(PLACE, sort=False)
    top1 = groups["top1"]
    found = groups[["note", *also]].first().assign(top1=top1.mean(), n=top1.size(), std=top1.std())
    return found.reset_index()


# ---------------------------------------------------------------- in a storage


def keep(table: pd.DataFrame, name: str, store: Store) -> bool:
    """Keep a table of `read` in a storage under a name.

    Returns:
        Whether it replaced a table of this name.

    Raises:
        InputError: The name has other characters than letters, digits, "_", "." and "-".
    """
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name, re.ASCII):
        raise InputError(
            f"import: the name of the file is {name!r}: expected letters, digits, '_', '.' and '-'"
        )
    known = name in _names(store)
    store.files.write(f"{FOLDER}/{name}.csv", table.to_csv(index=False).encode())
    return known


def remove(name: str, store: Store) -> None:
    """Remove a table from a storage.

    Raises:
        InputError: The storage has no table of this name.
    """
    names = _names(store)
    if name not in names:
        hint = nearest(name, names) if names else "nothing has been imported"
        raise InputError(f"import: there are no imported results {name!r} in {store.uri}; {hint}")
    store.files.delete(f"{FOLDER}/{name}.csv")


def _names(store: Store) -> list[str]:
    """Return the names of the tables of a storage."""
    paths = sorted(store.files.listed(FOLDER))
    return [path.removesuffix(".csv") for path in paths if re.fullmatch(r"[^/]+\.csv", path)]


def stored(store: Store) -> pd.DataFrame:
    """Return the rows of all tables of a storage, with the columns `COLUMNS`."""
    tables = []
    paths = [f"{FOLDER}/{name}.csv" for name in _names(store)]
    for path, content in sorted(store.files.read_many(paths).items()):
        try:
            table = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False)[COLUMNS]
            tables.append(table.assign(**table[NUMBERS].apply(pd.to_numeric)))
        except (ValueError, KeyError):
            raise InputError(
                f"{store.files.place(path)}: expected what `pld-ray import` writes: import it "
                "again, or delete it"
            ) from None
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)


# ---------------------------------------------------------------- beside an experiment


def beside(records: pd.DataFrame, store: Store) -> pd.DataFrame:
    """Return the imported results on the datasets and pairs of an experiment.

    Args:
        records: Records as returned by `frames.frame`.
        store: The storage with the imported tables.

    Returns:
        One row per result with the columns student, teacher, setting and method as in `records`,
        source, note, reported, reported_std, reported_n, then our own top1, top1_std, n and planned
        (numbers of finished trials and of all), and difference (ours minus reported). A result
        whose setting is not given is left out where its pair has several settings on its dataset.
    """
    names = ["student", "teacher", "setting", "method", "source", "note", "reported"]
    names += ["reported_std", "reported_n", "top1", "top1_std", "n", "planned", "difference"]
    groups: Any = records.groupby(["student", "teacher", "setting"], sort=False)
    sections: list[tuple[tuple[str, str, str], pd.DataFrame]] = list(groups)
    rows: list[tuple[int, dict[Any, Any]]] = []
    for row in stored(store).to_dict("records"):
        fits = [
            at
            for at, ((student, teacher, _), section) in enumerate(sections)
            if row["student"] == student
            and row["teacher"] in (teacher, "")
            and row["dataset"].lower() in dataset_forms(section["dataset"].iloc[0])
        ]
        if row["setting"]:
            fits = [at for at in fits if sections[at][0][2] == row["setting"]]
        pairs = [sections[at][0][:2] for at in fits]
        for at in fits:
            if row["setting"] or pairs.count(sections[at][0][:2]) == 1:
                rows.append((at, row))
    rows.sort(key=lambda found: found[0])
    table = [_beside(row, sections[at][1], sections[at][0][2]) for at, row in rows]
    return pd.DataFrame(table, columns=names)


def _beside(row: dict[Any, Any], section: pd.DataFrame, setting: str) -> dict[Any, Any]:
    """Return a result with our own numbers of its method in a section."""
    method = _method(section, row["method"])
    own = section[section["method"] == method]
    top1, planned = own["top1"].dropna(), len(own)
    if method == "Teacher" and "teacher_top1" in section:
        top1 = pd.Series([section["teacher_top1"].mean()]).dropna()
        planned = 1
    return row | {
        "setting": setting,
        "method": method,
        "teacher": section["teacher"].iloc[0],
        "reported": row["top1"],
        "reported_std": row["std"],
        "reported_n": row["n"],
        "top1": top1.mean(),
        "top1_std": top1.std(),
        "n": len(top1),
        "planned": planned,
        "difference": top1.mean() - row["top1"],
    }


def dataset_forms(name: str) -> set[str]:
    """Return the names of a dataset in a CSV: as in YAML, or only its last part."""
    name = name.lower()
    return {name, name.rpartition(":")[2], name.rpartition(":")[2].rpartition("/")[2]} - {""}


def _method(section: pd.DataFrame, wanted: str) -> str:
    """Return the method of a section that a name means: its method, or the only one of a loss."""

    def plain(name: str) -> str:
        return re.sub(r"\s", "", name).lower()

    for method in section["method"].unique():
        if plain(method) == plain(wanted):
            return str(method)
    meant = {loss for loss in REGISTRY if plain(wanted) in (loss, plain(REGISTRY[loss].label))}
    found = section.loc[section["loss"].isin(meant), "method"].unique()
    if len(found) == 1:
        return str(found[0])
    return REGISTRY[meant.pop()].label if meant else wanted
