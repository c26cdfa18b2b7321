"""Results from elsewhere, such as those of a paper: read a CSV and find what it is beside.

A file has one row per result, or one row per seed. `pld-ray import` keeps it in the folder
imported/ of the storage. Tables and figures then show it as "reported" beside the methods of
experiments on the same dataset and pair of networks.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pandas as pd

from pld_ray.errors import InputError, nearest
from pld_ray.losses import REGISTRY
from pld_ray.store.store import Store

FOLDER = "imported"
PLACE = ["dataset", "student", "teacher", "setting", "method", "source", "note"]
REQUIRED = ["dataset", "student", "method", "top1"]
COLUMNS = [*PLACE, "top1", "std", "n"]
KNOWN = [*COLUMNS, "seed"]


def read(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Read a CSV of results and check it.

    Args:
        path: The file. It has the columns dataset, student, method and top1 (in percent). It may
            have teacher, setting, source, note, std (in percentage points) and n (seeds); or seed,
            with one row per seed: then mean, standard deviation (n - 1) and n are computed.

    Returns:
        A table with the columns `COLUMNS`, and the names of the columns that are not used. Methods
        that are named like a loss have its label. std and n are NaN where they are not known.

    Raises:
        InputError: The file cannot be read, or a row is not valid.
    """
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        said = str(error).strip().splitlines()[0]
        raise InputError(f"{path}: expected a CSV file in UTF-8: {said}") from None
    rows.columns = rows.columns.str.strip()
    for name in REQUIRED:
        if name not in rows:
            raise InputError(
                f"{path}: the column {name!r} is missing: expected {', '.join(REQUIRED)}, "
                f"and if known {', '.join(_optional())}; it has {', '.join(map(str, rows))}"
            )
    if rows.empty:
        raise InputError(f"{path}: expected at least one row below the header")
    unused = [str(name) for name in rows if name not in KNOWN]
    rows = rows.drop(columns=unused).apply(lambda column: column.str.strip())
    rows = rows.reindex(columns=KNOWN, fill_value="")
    for name in ("dataset", "student", "method"):
        _check(path, rows, name, rows[name] != "", "expected a name")
    rows["source"] = rows["source"].where(rows["source"] != "", path.stem)
    labels = {name: params.label for name, params in REGISTRY.items()} | {"teacher": "Teacher"}
    rows["method"] = rows["method"].map(lambda method: labels.get(method.lower(), method))
    numbers = rows[["top1", "std", "n", "seed"]].apply(pd.to_numeric, errors="coerce")
    top1, std, n = numbers["top1"], numbers["std"], numbers["n"]
    _check(path, rows, "top1", (top1 >= 0) & (top1 <= 100), "expected a percentage, 0 to 100")
    _check(path, rows, "std", (rows["std"] == "") | (std >= 0), "expected percentage points, or ''")
    whole = (n >= 1) & (n == n.round())
    _check(path, rows, "n", (rows["n"] == "") | whole, "expected a number of seeds, or ''")
    if top1.max() <= 1:
        raise InputError(f"{path}: no top1 is above 1: expected percentages, such as 74.9")
    rows[["top1", "std", "n"]] = numbers[["top1", "std", "n"]]
    if (rows["seed"] != "").any():
        rows = _averaged(path, rows)
    return rows[COLUMNS].drop_duplicates(ignore_index=True), unused


def _optional() -> list[str]:
    return [name for name in KNOWN if name not in REQUIRED]


def _check(path: Path, rows: pd.DataFrame, name: str, valid: pd.Series, expected: str) -> None:
    """Raise InputError that names the first row that is not valid; row 1 is the header."""
    if not valid.all():
        at = int((~valid).to_numpy().argmax())
        raise InputError(f"{path}, row {at + 2}: {name} is {rows[name].iloc[at]!r}: {expected}")


def _averaged(path: Path, rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row per result from one row per seed."""
    _check(path, rows, "seed", rows["seed"] != "", "expected a seed, as in other rows")
    for name in ("std", "n"):
        empty = rows[name].isna()
        _check(path, rows, name, empty, "expected '', because each row is one seed")
    twice = rows.duplicated([*PLACE, "seed"])
    _check(path, rows, "seed", ~twice, "this seed of this method is in a row above")
    groups = rows.groupby(PLACE, sort=False)["top1"]
    return groups.agg(top1="mean", std="std", n="size").reset_index()


def keep(table: pd.DataFrame, name: str, store: Store) -> bool:
    """Keep a table of `read` in a storage under a name.

    Returns:
        Whether it replaced a table of this name.
    """
    path = f"{FOLDER}/{name}.csv"
    known = store.files.read(path) is not None
    store.files.write(path, table.to_csv(index=False).encode())
    return known


def remove(name: str, store: Store) -> None:
    """Remove a table from a storage.

    Raises:
        InputError: The storage has no table of this name.
    """
    names = [Path(path).stem for path in store.files.listed(FOLDER)]
    if name not in names:
        hint = nearest(name, names) if names else "nothing has been imported"
        raise InputError(f"import: there are no imported results {name!r} in {store.uri}; {hint}")
    store.files.delete(f"{FOLDER}/{name}.csv")


def beside(records: pd.DataFrame, store: Store) -> pd.DataFrame:
    """Return the imported results on the datasets and pairs of an experiment.

    Args:
        records: Records as returned by `frames.frame`.
        store: The storage with the imported tables.

    Returns:
        One row per result with the columns student, teacher, setting and method as in `records`,
        source, note, reported, reported_std, reported_n, then top1, top1_std and n (our own; NaN
        and 0 without a finished trial), and difference (ours minus reported). A result whose
        setting is not given is shown only where the pair has a single setting. A miniature has
        other data and networks, so nothing is beside it.
    """
    names = ["student", "teacher", "setting", "method", "source", "note"]
    names += ["reported", "reported_std", "reported_n", "top1", "top1_std", "n", "difference"]
    rows: list[dict[str, Any]] = []
    known = _all(store)
    if known.empty:
        return pd.DataFrame(rows, columns=names)
    settings: Any = records.groupby(["student", "teacher"])["setting"].nunique()
    for key, section in records.groupby(["student", "teacher", "setting"], sort=False):
        student, teacher, setting = key
        datasets = {form for name in section["dataset"].unique() if name for form in _forms(name)}
        only = settings[student, teacher] == 1
        fits = (known["student"] == student) & known["dataset"].isin(datasets)
        fits &= known["teacher"].isin([teacher, ""])
        fits &= (known["setting"] == setting) | ((known["setting"] == "") & only)
        for row in known[fits].to_dict("records"):
            method = _method(section, row["method"])
            top1 = section.loc[section["method"] == method, "top1"].dropna()
            if method == "Teacher" and "teacher_top1" in section:
                top1 = section["teacher_top1"].dropna()[:1]
            ours = float(top1.mean()) if len(top1) else math.nan
            place = dict(zip(names, (*key, method, row["source"], row["note"]), strict=False))
            place |= {f"reported_{name}": row[name] for name in ("std", "n")}
            place |= {"reported": row["top1"], "top1": ours, "top1_std": float(top1.std())}
            rows.append(place | {"n": len(top1), "difference": ours - row["top1"]})
    return pd.DataFrame(rows, columns=names)


def _all(store: Store) -> pd.DataFrame:
    """Return all tables of a storage."""
    paths = sorted(path for path in store.files.listed(FOLDER) if path.endswith(".csv"))
    kept = store.files.read_many([f"{FOLDER}/{path}" for path in paths])
    text = dict.fromkeys(PLACE, str)
    tables = [
        pd.read_csv(
            io.BytesIO(kept[path]),
            dtype=text,
            keep_default_na=False,
            na_values={name: [""] for name in ("top1", "std", "n")},
        )
        for path in sorted(kept)
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)


def _forms(name: str) -> set[str]:
    """Return the names of a dataset in a CSV: as in YAML, or only its last part."""
    return {name, name.rpartition(":")[2], name.rpartition(":")[2].rpartition("/")[2]}


def _method(section: pd.DataFrame, wanted: str) -> str:
    """Return the method of a section that a name means: its method, or the only one of a loss."""
    methods = section["method"].unique()
    if wanted in methods:
        return wanted
    own = section[section["loss"].map(lambda loss: REGISTRY[loss].label) == wanted]
    found = own["method"].unique()
    return str(found[0]) if len(found) == 1 else wanted
