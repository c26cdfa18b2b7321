"""The summary of an experiment: sentences that a person would paste into a paper."""

from __future__ import annotations

import math

import pandas as pd

from analysis.statistics.paired import ENOUGH
from analysis.tables import comparison
from analysis.tables.rendering import signed


def sentences(records: pd.DataFrame, own: comparison.Tables, dataset: str) -> list[str]:
    """Say what was compared, on what, how often, and what is decided and what is not.

    Args:
        records: Records as returned by `records.frames.frame`, of which some have finished.
        own: The tables of the same records.
        dataset: The name of the dataset.
    """
    methods = list(dict.fromkeys(records["method"]))
    pairs = records[["student", "teacher"]].drop_duplicates()
    seeds = records[records["finished"]].groupby(["student", "teacher", "setting", "method"]).size()
    named = ", ".join(methods) if len(methods) <= 8 else f"{len(methods)} methods"
    on = (
        f"{len(pairs)} pairs of networks"
        if len(pairs) > 1
        else " → ".join(
            name for name in (pairs.iloc[0]["teacher"], pairs.iloc[0]["student"]) if name
        )
    )
    settings = records["setting"].nunique()
    varied = f", {settings} settings" if settings > 1 else ""
    often = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    said = [
        f"Compared: {named}, on {dataset}, {on}{varied}; "
        f"{often} {'seed' if often == '1' else 'seeds'} each."
    ]
    against = own.against
    if against.empty:
        return said
    reference, rule = against["method"].iloc[0], f"paired t-test, Holm over {len(against)}"
    if looks := comparison.looks_of(records):
        rule += f", repeated at up to {len(looks)} looks"
    groups: dict[str, list[str]] = {"better": [], "worse": [], "open": [], "unknown": []}
    for row in against.to_dict("records"):
        interval = f" [{signed(row['low'])}, {signed(row['high'])}]"
        gain = f"{row['against']} ({signed(row['mean'])}"
        if math.isnan(row["low"]):
            groups["unknown"].append(f"{gain})")
        elif row["decided"]:
            groups["better" if row["mean"] > 0 else "worse"].append(f"{gain}{interval})")
        else:
            groups["open"].append(f"{gain}{interval})")
    begin = {
        "better": f"Decided at 5 % ({rule}): {reference} is better than",
        "worse": f"Decided at 5 % ({rule}): {reference} is worse than",
        "open": f"Not decided: {reference} against",
        "unknown": f"Nothing can be said (fewer than {ENOUGH} seeds, or equal differences): "
        f"{reference} against",
    }
    return said + [f"{begin[kind]} {_list(names)}." for kind, names in groups.items() if names]


def _list(names: list[str], most: int = 8) -> str:
    """Join names; of many, the first ones and the number of the others."""
    if len(names) <= most:
        return ", ".join(names)
    return ", ".join(names[:most]) + f" and {len(names) - most} others"
