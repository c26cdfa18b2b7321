"""Results of the literature beside our own: methods as rows, pairs of networks as columns.

literature.csv holds what public repositories print, one result per row:

- source, file: the repository, and the file in it.
- dataset, teacher, student: with the names that experiments use.
- method: the name of a loss, or a name in LABELS; `method_name` says which trials it means.
- top1, std: in percent, and in points.
- epoch: "last" or "best" (on the test images) where the source says which one it prints.
- teacher_top1, student_top1: of the teacher, and of the student without a teacher.
- apart: why the result is not like the others of its method and pair, such as "own teachers". Such
  results are shown with their reason, and left out of ranges and gains.
- note: what else there is to know.

A file of the user has the same form. The README of RepDistiller prints 0.00 for FSP on wrn_40_2 ->
wrn_40_1, which means that FSP cannot be computed; there is no such row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.records import imported
from pld_ray.config.trial import Trial
from pld_ray.errors import InputError
from pld_ray.losses import REGISTRY

FILE = Path(__file__).parent / "literature.csv"
ALSO = ("file", "epoch", "teacher_top1", "student_top1", "apart")
PAIR = ["dataset", "teacher", "student"]
CELL = [*PAIR, "method"]
TEACHER, ALL = "Teacher", "All methods"
MEASURES = ("last", "best")

# The names in literature.csv that are no losses of this project, as tables show them
LABELS = {
    "ls_kd": "KD (standardized)",
    "ls_dkd": "DKD (standardized)",
    "ls_ctkd": "CTKD (standardized)",
    "ls_mlkd": "MLKD (standardized)",
    "sdd_kd": "SDD-KD",
    "sdd_dkd": "SDD-DKD",
    "sdd_nkd": "SDD-NKD",
    "kdpp": "KD++",
    "dkdpp": "DKD++",
    "distpp": "DIST++",
    "reviewkdpp": "ReviewKD++",
    "dist_plus": "DIST+",
    "reviewkd": "ReviewKD",
    "simkd": "SimKD",
    "semckd": "SemCKD",
    "wcord": "WCoRD",
    "distpro": "DistPro",
    "kdzero": "KD-Zero",
    "tfkd": "Tf-KD",
    "pad_l2": "PAD-L2",
    "hsakd_joint": "HSAKD (joint)",
    "norm_plain": "NORM (plain)",
    "norm_kd": "NORM + KD",
    "norm_crd": "NORM + CRD",
    "wttm_crd": "WTTM + CRD",
    "wttm_itrd": "WTTM + ITRD",
} | {
    name: name.upper()
    for name in (
        *("ab", "afd", "cc", "crd", "ctkd", "dot", "edkd", "fsp", "ft", "hsakd", "ickd", "itrd"),
        *("l2", "mgd", "mlkd", "norm", "nst", "ofd", "one", "sakd", "srd", "srrl", "sskd"),
    )
}


@dataclass(frozen=True)
class Literature:
    """Our results and those of the literature on the pairs of an experiment.

    Attributes:
        cells: One row per pair and method: `PAIR`, kind ("homogeneous" or "heterogeneous"), method,
            name (its name in literature.csv, or ""), planned (trials), and for last and best (the
            epoch) the mean, MEASURE_std and MEASURE_n over seeds; then low and high of the reported
            results, sources (their number) and apart (results that are left out).
        sources: One row per reported result: `CELL`, kind, source, file, epoch, reported,
            reported_std, reported_n, apart, note, ours, ours_n and difference (ours minus
            reported). Ours is the mean of the epoch that the source prints: the last one, unless it
            says "best".
        methods: The table of `methods_of`.
        unshown: The number of other methods that are reported on these pairs.
        unused: For each file of the user, the number of its results that are on none of the pairs.
        miniature: Whether our trials are those of a miniature; ours and difference are then NaN.
    """

    cells: pd.DataFrame
    sources: pd.DataFrame
    methods: pd.DataFrame
    unshown: int
    unused: list[int]
    miniature: bool


# ---------------------------------------------------------------- what is reported


@cache
def shipped() -> pd.DataFrame:
    """Return the results of literature.csv, as `read` does."""
    return read(FILE)[0]


def read(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Read results from a CSV with the columns of literature.csv, of which few are required.

    Args:
        path: The file; see `records.imported.read`.

    Returns:
        One row per result with `records.imported.COLUMNS`, file, epoch and apart, and the names of
        the columns that are not used. The columns teacher_top1 and student_top1 have become results
        of the methods "Teacher" and "ce".

    Raises:
        InputError: The file cannot be read, or a row is not valid.
    """
    table, unused = imported.read(path, ALSO)
    parts = [table]
    for column, method in (("teacher_top1", TEACHER), ("student_top1", "ce")):
        known = table[table[column].notna() & ((table["teacher"] != "") | (method == "ce"))]
        part = known.assign(method=method, top1=known[column], std=math.nan, n=math.nan, note="")
        # a result that stands apart may have the usual baseline, which another row then tells
        part = part.sort_values("apart", kind="stable", key=lambda apart: apart != "")
        parts.append(part.drop_duplicates(["source", "file", *PAIR, "top1"]))
    found = pd.concat(parts, ignore_index=True)[[*imported.COLUMNS, "file", "epoch", "apart"]]
    again = found.duplicated(["source", "file", *CELL, "setting", "top1"])
    found = found[~(again & found["method"].isin([TEACHER, "ce"]))]
    return found.reset_index(drop=True), unused


def method_name(trial: Trial) -> str:
    """Return the name in literature.csv of the method of a trial, or "" if it has none there.

    It is the name of the loss, with "ls_" before it if the logits of teacher and student are
    standardized (Sun et al. 2024), or "dot" for KD with the optimizer DOT. Sources have no KD with
    another divergence, and no other loss with DOT.
    """
    standardize = getattr(trial.loss, "standardize", "none")
    divergence = getattr(trial.loss, "divergence", "forward_kl")
    if divergence != "forward_kl" or standardize not in ("none", "both"):
        return ""
    if trial.optimizer.name == "dot":
        return "dot" if (trial.loss.name, standardize) == ("kd", "none") else ""
    return ("ls_" if standardize == "both" else "") + trial.loss.name


def label(name: str) -> str:
    """Return the name that tables show for a method of literature.csv or of a user's file."""
    if name in REGISTRY:
        return REGISTRY[name].label
    return LABELS.get(name, name)


def family(network: str) -> str:
    """Return the architecture family of a network: the letters with which its name begins.

    "resnet32x4" and "resnet50_cifar" are of the family resnet, "wrn_40_2" is of wrn, and
    "mobilenetv2_cifar" of mobilenetv. A pair is homogeneous if both networks have one family.
    """
    return re.match(r"[a-z]*", network.lower().rpartition("/")[2])[0]  # type: ignore[index]


# ---------------------------------------------------------------- beside our own


def compare(
    records: pd.DataFrame,
    files: Iterable[pd.DataFrame] = (),
    miniature: bool = False,
    everything: bool = False,
) -> Literature:
    """Put our results and those of the literature side by side.

    Args:
        records: Records as returned by `records.frames.frame`.
        files: Results of the user, as returned by `read` or `records.imported.stored`.
        miniature: Whether the records are those of a miniature.
        everything: Whether to include all methods that are reported on the pairs. By default, they
            are those of the experiment, the teacher, CE, and what `files` have.

    Raises:
        InputError: The experiment has no trial with a teacher.
    """
    trials = _trials(records)
    if trials.empty:
        raise InputError("literature: expected an experiment with trials that have a teacher")
    parts = [table.assign(part=part) for part, table in enumerate([shipped(), *files])]
    results = pd.concat(parts, ignore_index=True).fillna({"file": "", "epoch": "", "apart": ""})
    results["own"] = results["part"] > 0
    named = trials.drop_duplicates("method").set_index("method")["name"]
    found = _on_pairs(results, trials, named)
    unfit = results.loc[~results.index.isin(found["index"]), "part"]
    unused = [int((unfit == part).sum()) for part in range(1, len(parts))]
    wanted = [TEACHER, label("ce"), *named.index]
    wanted += [label(name) for name in named if name]
    own = [*wanted, *found.loc[found["own"], "method"]]
    shown = found["method"].isin(found["method"] if everything else own)
    unshown = found.loc[~shown, "method"].nunique()
    found = found[shown]
    teachers = [TEACHER] if trials["teacher_top1"].notna().any() else []
    order = _order(named, [*teachers, *found["method"]])
    cells = _cells(trials, found, order)
    # a source that does not say which epoch it prints is compared with the last one
    ours = found[CELL].merge(cells, "left", on=CELL)
    best = (found["epoch"] == "best").to_numpy()
    for name, end in (("ours", ""), ("ours_n", "_n")):
        found[name] = np.where(best, ours[f"best{end}"], ours[f"last{end}"])
    if miniature:
        found = found.assign(ours=math.nan, ours_n=0)
    found["difference"] = found["ours"] - found["reported"]
    columns = [*CELL, "kind", "source", "file", "epoch", "reported", "reported_std", "reported_n"]
    columns += ["apart", "note", "ours", "ours_n", "difference"]
    found = _sorted(found, cells, order)[columns]
    methods = methods_of(cells, trials, found, order)
    return Literature(cells, found, methods, unshown, unused, miniature)


def _trials(records: pd.DataFrame) -> pd.DataFrame:
    """Return the trials that have a teacher, with the names that they have in the literature.

    Returns:
        One row per trial with `CELL`, kind, name, seed, last and best (top-1 of both epochs), and
        teacher_top1. A trial of a miniature has the names of the one that it stands for. The
        dataset is "" where the trial has only a part of it.
    """
    rows = []
    scores = ["top1", "best_top1", "teacher_top1"]
    kept = records.reindex(columns=["original", "original_teacher", "setting", "method", "seed"])
    for place, (last, best, teacher_top1) in zip(
        kept.itertuples(index=False, name=None),
        records.reindex(columns=scores).astype(float).itertuples(index=False, name=None),
        strict=True,
    ):
        trial, teacher, setting, method, seed = place
        if not teacher:
            continue
        student, teacher = (name.split(".")[0] for name in (trial.student.name, teacher))
        alike = family(student) == family(teacher)
        rows.append(
            {
                "dataset": "" if trial.data.holdout or trial.data.limit else trial.data.name,
                "teacher": teacher,
                "student": student,
                "method": f"{method}, {setting}" if setting else method,
                "kind": "homogeneous" if alike else "heterogeneous",
                "name": method_name(trial),
                "setting": setting,
                "seed": seed,
                "last": last,
                "best": best,
                "teacher_top1": teacher_top1,
            }
        )
    return pd.DataFrame(rows).drop_duplicates([*CELL, "seed"]) if rows else pd.DataFrame()


def _on_pairs(results: pd.DataFrame, trials: pd.DataFrame, named: pd.Series) -> pd.DataFrame:
    """Return the results on the pairs of an experiment, with its names of pairs and methods."""
    parts = []
    networks = {*trials["teacher"], *trials["student"]}
    methods = {name: _method(name, named) for name in results["method"].unique()}
    for *pair, kind in trials[[*PAIR, "kind"]].drop_duplicates().itertuples(index=False):
        dataset, teacher, student = pair
        forms = imported.dataset_forms(dataset)
        fits = results["dataset"].str.lower().isin(forms)
        fits &= _means(results["student"], student, results["own"], networks)
        anyone = results["own"] & (results["teacher"] == "")
        fits &= anyone | _means(results["teacher"], teacher, results["own"], networks)
        own = results[fits].reset_index()
        part = own.assign(**dict(zip(PAIR, pair, strict=True)), kind=kind)
        told = own["setting"].map(lambda setting: f", {setting}" if setting else "")
        parts.append(part.assign(method=own["method"].map(methods) + told))
    found = pd.concat(parts, ignore_index=True)
    renamed = {"top1": "reported", "std": "reported_std", "n": "reported_n"}
    return found.rename(columns=renamed)


def _means(column: pd.Series, network: str, own: pd.Series, known: set[str]) -> pd.Series:
    """Return which names mean a network; in a user's file resnet50 may mean resnet50_cifar."""
    short = own & (column + "_cifar" == network) & ~column.isin(known)
    return (column == network) | short


def _method(name: str, named: pd.Series) -> str:
    """Return the row of a reported method: a method of the experiment, or its own name.

    Several methods of the experiment may have one name in the literature, such as KD with several
    temperatures. The reported results then have a row of their own.

    Args:
        name: The method in a file.
        named: The name in literature.csv of each method of the experiment.
    """

    def plain(text: str) -> str:
        return re.sub(r"\s", "", text).lower()

    for method in named.index:
        if plain(name) == plain(method):
            return str(method)
    known = {plain(label(each)): each for each in [*LABELS, *REGISTRY]}
    known |= {each: each for each in [*LABELS, *REGISTRY]}
    meant = known.get(plain(name), name)
    rows = named.index[named == meant]
    return str(rows[0]) if len(rows) == 1 else label(meant)


def _order(named: pd.Series, reported: Sequence[str]) -> list[str]:
    """Return the rows: teacher, CE, the methods of the experiment, then those only reported."""
    rows = [TEACHER, *([label("ce")] if label("ce") in reported else [])]
    for method, name in named.items():
        above = label(name) if name else ""
        rows += [above] if above in reported else []
        rows.append(str(method))
    rows += reported
    return list(dict.fromkeys(row for row in rows if row in reported or row in named.index))


def _cells(trials: pd.DataFrame, found: pd.DataFrame, order: list[str]) -> pd.DataFrame:
    """Return the table `Literature.cells`."""
    taught = trials[trials["teacher_top1"].notna()].assign(method=TEACHER)
    parts = [table[[*CELL, "kind"]] for table in (trials, taught, found)]
    places = pd.concat(parts).drop_duplicates()
    cells = places.set_index(CELL)
    groups = trials.groupby(CELL, sort=False)
    cells["name"] = groups["name"].first()
    cells["planned"] = groups["seed"].size()
    for measure in MEASURES:
        cells[measure] = groups[measure].mean()
        cells[f"{measure}_std"] = groups[measure].std()
        cells[f"{measure}_n"] = groups[measure].count()
    for place, value in taught.groupby(CELL, sort=False)["teacher_top1"].mean().items():
        cells.loc[place, ["planned", "last", "last_n"]] = [1, value, 1]
    counted = found[found["apart"] == ""].groupby(CELL, sort=False)
    cells["low"], cells["high"] = counted["reported"].min(), counted["reported"].max()
    cells["sources"] = counted["source"].nunique()
    cells["apart"] = found[found["apart"] != ""].groupby(CELL, sort=False).size()
    numbers = ["planned", "last_n", "best_n", "sources", "apart"]
    cells[numbers] = cells[numbers].fillna(0).astype(int)
    cells["name"] = cells["name"].fillna("")
    return _sorted(cells.reset_index(), places, order)


def _sorted(table: pd.DataFrame, places: pd.DataFrame, order: list[str]) -> pd.DataFrame:
    """Return a table ordered by pair, as in `places`, and method, as in `order`."""
    pairs = dict.fromkeys(places[PAIR].itertuples(index=False, name=None))
    at = {pair: i for i, pair in enumerate(pairs)}
    rows = table[CELL].itertuples(index=False, name=None)
    keys = [(at[row[:3]], order.index(row[3])) for row in rows]
    found = table.iloc[sorted(range(len(keys)), key=keys.__getitem__)]
    return found.reset_index(drop=True)


# ---------------------------------------------------------------- over pairs


def methods_of(
    cells: pd.DataFrame, trials: pd.DataFrame, found: pd.DataFrame, order: list[str]
) -> pd.DataFrame:
    """Return ranks, gains, and what the choice of the epoch is worth, by kind of pairs and method.

    A cell is complete if all its trials have finished. Methods are ranked by their means on the
    pairs on which all of them are complete; those that are not planned on every pair of the kind
    are not ranked. The gain over KD or CE is the mean over seeds on each pair on which both are
    complete, and then over these pairs. A reported gain is the difference of two results of one
    source on one pair, as the mean over sources and then over pairs.

    Args:
        cells: The table `Literature.cells`.
        trials: The trials, as returned by `_trials`.
        found: The table `Literature.sources`.
        order: The methods in their order.

    Returns:
        One row per kind of pairs ("homogeneous", "heterogeneous") and method, and one for all
        methods, with the columns kind, pairs (number of pairs of the kind), method, then for last
        and best (the epoch) rank_MEASURE, ranked_MEASURE (the number of pairs),
        over_kd_MEASURE, over_kd_MEASURE_pairs, the same for ce; over_kd_reported,
        over_kd_reported_pairs, the same for ce; and best_minus_last (mean over trials) with
        best_minus_last_n (number of trials). With both kinds, "all" has rows too.
    """
    kinds = {str(kind): group for kind, group in cells.groupby("kind", sort=False)}
    if len(kinds) > 1:
        kinds["all"] = cells
    gains = _gains(cells, trials, found)
    worth = trials.assign(worth=trials["best"] - trials["last"]).dropna(subset="worth")
    parts = []
    for kind, here in kinds.items():
        own = worth if kind == "all" else worth[worth["kind"] == kind]
        pairs = pd.MultiIndex.from_frame(here[PAIR].drop_duplicates())
        columns: dict[str, pd.Series] = {}
        for measure in MEASURES:
            ranks, ranked = _ranks(here, measure, len(pairs))
            columns |= {f"rank_{measure}": ranks, f"ranked_{measure}": ranks.notna() * ranked}
        for name, table in gains.items():
            inside = table[table.index.isin(pairs)]
            columns |= {name: inside.mean(), f"{name}_pairs": inside.count()}
        differences = own.groupby("method")["worth"]
        columns |= {"best_minus_last": differences.mean(), "best_minus_last_n": differences.size()}
        known = {*here["method"]} - {TEACHER}
        table = pd.DataFrame(columns, index=[method for method in order if method in known])
        total = {"best_minus_last": own["worth"].mean(), "best_minus_last_n": len(own)}
        table.loc[ALL] = pd.Series(total)
        counts = table.filter(regex="^ranked_|_pairs$|_n$").columns
        table[counts] = table[counts].fillna(0).astype(int)
        table = table.rename_axis("method").reset_index()
        table.insert(0, "kind", kind)
        table.insert(1, "pairs", len(pairs))
        parts.append(table)
    return pd.concat(parts, ignore_index=True)


def _ranks(cells: pd.DataFrame, measure: str, pairs: int) -> tuple[pd.Series, int]:
    """Return the mean rank of each method that is planned on all pairs, and over how many pairs."""
    planned = cells[cells["planned"].gt(0) & (cells["method"] != TEACHER)]
    planned = planned[planned.groupby("method")["method"].transform("size") == pairs]
    done = planned[planned[f"{measure}_n"] == planned["planned"]]
    table = done.set_index(CELL)[measure].unstack("method").dropna()
    if len(table) < 1 or table.shape[1] < max(2, planned["method"].nunique()):
        return pd.Series(dtype=float), 0
    return table.rank(axis=1, ascending=False).mean(), len(table)


def _gains(
    cells: pd.DataFrame, trials: pd.DataFrame, found: pd.DataFrame
) -> dict[str, pd.DataFrame]:
    """Return the gains over KD and CE on each pair.

    Returns:
        For each gain, such as "over_kd_last", a table with a row per pair and a column per method;
        NaN where one of both methods is not complete, or is not reported by the same source.
    """
    gains = {}
    counted = found[(found["apart"] == "") & (found["method"] != TEACHER)]
    told = counted.groupby([*PAIR, "source", "method"])["reported"].mean().unstack("method")
    for name in ("kd", "ce"):
        base = _base(cells, name)
        for measure in MEASURES:
            complete = (cells["planned"] > 0) & (cells[f"{measure}_n"] == cells["planned"])
            done = trials.merge(cells[complete][CELL], on=CELL)
            scores = done.set_index([*PAIR, "seed", "method"])[measure].unstack("method")
            gains[f"over_{name}_{measure}"] = _over(scores, base)
        gains[f"over_{name}_reported"] = _over(told, base)
    return gains


def _over(scores: pd.DataFrame, base: str) -> pd.DataFrame:
    """Return the mean difference from a method on each pair, by method, without this method.

    Args:
        scores: A row per pair and seed, or per pair and source, and a column per method.
        base: The method.
    """
    if base not in scores:
        return pd.DataFrame(index=pd.MultiIndex.from_arrays([[]] * len(PAIR), names=PAIR))
    differences = scores.drop(columns=base).sub(scores[base], axis=0)
    return differences.groupby(PAIR, sort=False).mean()


def _base(cells: pd.DataFrame, name: str) -> str:
    """Return the row of the method over which gains are: the first one of ours with its name."""
    ours = cells.loc[cells["name"] == name, "method"]
    return str(ours.iloc[0]) if len(ours) else label(name)
