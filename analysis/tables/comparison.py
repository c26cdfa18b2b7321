"""The numbers of one experiment's tables: all methods and metrics, and paired comparisons.

`tables` computes them, by `comparison`, `against` and `all_pairs`; comparison_printing.py formats
them. The reference is the method with which the others are compared (`Experiment.reference`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from analysis.records.frames import GROUP, summary
from analysis.statistics import paired
from analysis.statistics.sequential import Looks
from pld_ray.config.search_space import METRICS as DIRECTIONS
from pld_ray.errors import InputError
from pld_ray.losses import REGISTRY

SECTION = ["student", "teacher", "setting"]  # methods are compared within these columns
METRICS = ["top1", "top5", "kl_teacher_student", "agreement", "ece", "seconds"]


SORTS: dict[str, Literal["max", "min"]] = {**DIRECTIONS, "seconds": "min"}
# The names of two methods, and the scores of each by section, seed by seed
Paired = tuple[str, str, dict[int, paired.Scores], dict[int, paired.Scores]]
GRID = "grid"  # the order of the grid, instead of that of a metric


@dataclass(frozen=True)
class Tables:
    """The numbers of all tables of an experiment.

    Attributes:
        numbers: The table of `comparison`, in the order of `ordered`.
        against: The table of `against`; empty if there is nothing to compare.
        pairs: The table of `all_pairs`; empty if it is not wanted.
        reported: Results from elsewhere, as returned by `records.imported.beside`.
        ranking: The mean ranks of the methods, with the columns method and rank; `attrs` has those
            of `statistics.ranks.Ranking`. It is empty with fewer than three methods, or if `pairs`
            is not wanted.
        sort: The metric by which the settings of a loss are ordered, or "grid".
        held_out: Whether all trials are measured on held-out training images.
        looks: The numbers of seeds at which methods are compared; empty if the seeds are fixed.
    """

    numbers: pd.DataFrame
    against: pd.DataFrame
    pairs: pd.DataFrame
    reported: pd.DataFrame
    ranking: pd.DataFrame
    sort: str
    held_out: bool
    looks: Looks


def tables(
    records: pd.DataFrame,
    reported: pd.DataFrame | None = None,
    all_pairs_too: bool = False,
    sort: str = "top1",
) -> Tables:
    """Compare the methods of an experiment.

    Args:
        records: Records as returned by `records.frames.frame`.
        reported: Results from elsewhere, as returned by `records.imported.beside`.
        all_pairs_too: Whether to compare every two methods.
        sort: The metric by which the settings of a loss are ordered, the best first, or "grid".

    Raises:
        InputError: `sort` is not a metric of the trials.
    """
    return Tables(
        ordered(comparison(records), sort),
        against(records),
        all_pairs(records) if all_pairs_too else pd.DataFrame(),
        pd.DataFrame() if reported is None else reported,
        ranking(records) if all_pairs_too else pd.DataFrame(),
        sort,
        bool(records["held_out"].all()),
        looks_of(records),
    )


def comparison(records: pd.DataFrame) -> pd.DataFrame:
    """Return one row per method of each (student, teacher, setting), after a row for the teacher.

    Args:
        records: Records as returned by `records.frames.frame`.

    Returns:
        The columns of `records.frames.summary`, and `gain`: the mean over seeds of the reference's
        top-1 minus the method's, paired by seed (the paper's tables print it as a difference of
        means). Values are NaN where no trial has finished. `attrs["own_metrics"]` holds the names
        of metrics from plug-ins.
    """
    table = summary(records, [*METRICS, *own_metrics(records), "teacher_top1"])
    reference = records[records["reference"]].drop_duplicates([*SECTION, "seed"])
    theirs = reference.set_index([*SECTION, "seed"])["top1"].rename("theirs")
    paired_rows = records.join(theirs, on=[*SECTION, "seed"])
    paired_rows["gain"] = paired_rows["theirs"] - paired_rows["top1"]
    gains = paired_rows[~paired_rows["reference"]].groupby(GROUP, sort=False)["gain"].mean()
    table = table.join(gains, on=GROUP)
    with_teacher = [name for name in table["loss"].unique() if REGISTRY[name].needs_teacher]
    table["taught"] = table["loss"].isin(with_teacher)
    sections = table.groupby(SECTION, sort=False)
    taught = sections.agg(top1=("teacher_top1", "mean"), taught=("taught", "any"))
    teachers = [
        {name: row[name] for name in [*SECTION, "top1"]}
        | {"method": "Teacher", "loss": "teacher", "reference": False}
        for row in taught.reset_index().to_dict("records")
        if row["teacher"] and row["taught"]
    ]
    found = pd.concat([pd.DataFrame(teachers), table]) if teachers else table
    places = dict(zip(taught.index, range(len(taught)), strict=True))
    order = [places[tuple(key)] for key in found[SECTION].values.tolist()]
    found = found.iloc[np.argsort(order, kind="stable")].reset_index(drop=True)
    found = found.drop(columns=["teacher_top1", "teacher_top1_std", "taught"])
    found.attrs["own_metrics"] = own_metrics(records)
    return found


def ordered(table: pd.DataFrame, sort: str) -> pd.DataFrame:
    """Return the table of `comparison` with the settings of each loss together, the best first.

    The losses of a pair of networks keep the order of the grid, and so do losses with one setting.
    A teacher that is the same for all settings has one row.

    Args:
        table: The table of `comparison`.
        sort: The metric to order by, or "grid" for the order of the grid.

    Raises:
        InputError: `sort` is not a metric of the trials.
    """
    known = [GRID, *(name for name in SORTS if name in table), *table.attrs["own_metrics"]]
    if sort not in known:
        raise InputError(f"sort is {sort!r}: expected one of {', '.join(known)}")
    students = table[table["loss"] != "teacher"]
    if sort == GRID or not students.duplicated(["student", "teacher", "loss"]).any():
        return table
    sign = -1 if SORTS.get(sort, "max") == "max" else 1
    keys = pd.DataFrame(index=table.index)
    pairs = table.groupby(["student", "teacher"], sort=False)
    keys["pair"] = pairs.ngroup()
    keys["loss"] = pd.factorize(table["loss"])[0]
    keys.loc[table["loss"] == "teacher", "loss"] = -1
    keys["score"] = sign * table[sort]
    keys.loc[table["loss"] == "teacher", "score"] = 0.0
    found = table.loc[keys.sort_values(["pair", "loss", "score"], kind="stable").index]
    teacher = found["loss"] == "teacher"
    again = found.duplicated(["student", "teacher", "loss", "top1"])
    one = found[teacher].groupby(["student", "teacher"])["top1"].transform("nunique", False) <= 1
    one = teacher & one.reindex(found.index, fill_value=False)
    found["setting"] = found["setting"].mask(one, "")
    return found[~(again & one)].reset_index(drop=True)


def own_metrics(records: pd.DataFrame) -> list[str]:
    """Return the names of the metrics that plug-ins define, in the order of the experiment."""
    return list(dict.fromkeys(name for names in records["own_metrics"] for name in names))


def reference_name(table: pd.DataFrame) -> str:
    """Return the name of the reference: of its method, or of its loss if its settings differ.

    Args:
        table: Records of `records.frames.frame`, or the table of `comparison`.

    Returns:
        The name, or "" if there is nothing to compare with it.
    """
    own = table["reference"].astype(bool)
    if own.all() or not own.any() or (table.loc[~own, "loss"] == "teacher").all():
        return ""
    methods = table.loc[own, "method"].unique()
    return str(methods[0]) if len(methods) == 1 else REGISTRY[table.loc[own, "loss"].iloc[0]].label


def against(records: pd.DataFrame) -> pd.DataFrame:
    """Compare the reference with every other method, over all seeds and pairs where both finished.

    Args:
        records: Records as returned by `records.frames.frame`.

    Returns:
        One row per method with the columns method (the reference), against (the method), those of
        `paired.Comparison`, corrected (the p-value corrected over all rows) and decided.
    """
    others = records.loc[~records["reference"], "method"].nunique()
    return _compared(with_reference(records), looks_of(records), others)


def all_pairs(records: pd.DataFrame) -> pd.DataFrame:
    """Compare every two methods, as `against` does, with p-values corrected over all of them."""
    scores = _scores(records)
    pairs = itertools.combinations(scores.columns, 2)
    compared = _paired((one, scores[one], other, scores[other]) for one, other in pairs)
    methods = records["method"].nunique()
    return _compared(compared, looks_of(records), methods * (methods - 1) // 2)


def looks_of(records: pd.DataFrame) -> Looks:
    """Return the numbers of seeds at which methods are compared; empty if the seeds are fixed."""
    return records["looks"].iloc[0] if len(records) else ()


def with_reference(records: pd.DataFrame) -> Iterator[Paired]:
    """Yield the reference and each other method, with the scores of their common seeds.

    Args:
        records: Records as returned by `records.frames.frame`.
    """
    reference = _scores(records[records["reference"]], method="")
    if not len(reference.columns):
        return
    scores, name = _scores(records), reference_name(records)
    own = reference.reindex(scores.index)[""]
    others = records.loc[~records["reference"], "method"].unique()
    yield from _paired((name, own, method, scores[method]) for method in others if method in scores)


def ranking(records: pd.DataFrame) -> pd.DataFrame:
    """Rank the methods over the seeds and sections in which all of them have finished.

    Args:
        records: Records as returned by `records.frames.frame`.

    Returns:
        One row per method with the columns method and rank, the best first; `attrs` has blocks, p
        and distance, as in `statistics.ranks.Ranking`. It is empty if there are fewer than three
        methods or two blocks.
    """
    from analysis.statistics import ranks  # scipy.stats takes a second to import

    scores = _scores(records)
    found = ranks.rank(scores.to_numpy())
    if found is None:
        return pd.DataFrame()
    table = pd.DataFrame({"method": scores.columns, "rank": found.ranks})
    table = table.sort_values("rank", kind="stable", ignore_index=True)
    table.attrs = {"blocks": found.blocks, "p": found.p, "distance": found.distance}
    return table


def _scores(records: pd.DataFrame, method: str | None = None) -> pd.DataFrame:
    """Return the top-1 of finished trials: a row per section and seed, a column per method.

    Args:
        records: Records as returned by `records.frames.frame`.
        method: A name for all methods of the records, which are one per section.
    """
    done = records[records["finished"]]
    if method is not None:
        done = done.assign(method=method)
    done = done.drop_duplicates([*SECTION, "seed", "method"])
    scores = done.set_index([*SECTION, "seed", "method"])["top1"].unstack()
    return scores[done["method"].unique()].astype(float)


def _paired(pairs: Iterable[tuple[str, pd.Series, str, pd.Series]]) -> Iterator[Paired]:
    """Yield the common scores of two methods, for each of several pairs of methods that have some.

    Args:
        pairs: For each pair, name and scores of both methods; the scores as in `_scores`.
    """
    for first, one, second, other in pairs:
        both = (one.notna() & other.notna()).to_numpy()
        if not both.any():
            continue
        places = one.index.to_frame(index=False).groupby(SECTION, sort=False).ngroup()[both]
        ends = np.flatnonzero(np.diff(places)) + 1  # the rows are sorted by section
        ours, theirs = (np.split(each.to_numpy()[both], ends) for each in (one, other))
        yield first, second, dict(enumerate(ours)), dict(enumerate(theirs))


def _compared(pairs: Iterable[Paired], looks: Looks, planned: int) -> pd.DataFrame:
    """Compare the scores of two methods, for each of several pairs of methods.

    Args:
        pairs: The pairs that have scores.
        looks: As in `records.frames.frame`. With looks, p is corrected for all planned pairs, also
            those that say nothing yet: what is decided stays decided.
        planned: The number of pairs of methods.
    """
    rows = []
    for first, second, ours, theirs in pairs:
        found = paired.compare(ours, theirs, looks)
        if found is not None:
            rows.append({"method": first, "against": second, **found._asdict()})
    table = pd.DataFrame(rows)
    if rows:
        p = table["p"]
        counted = [*p.fillna(1.0), *[1.0] * (planned - len(p))] if looks else p.tolist()
        table["corrected"] = paired.corrected(counted)[: len(p)]
        table.loc[p.isna(), "corrected"] = np.nan
        table["decided"] = table["corrected"] < 0.05
    return table
