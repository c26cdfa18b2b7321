"""Which methods need more seeds, where seeds are added until their order is decided.

Everything follows from the records: the looks so far are gone through again in their order. A
method that is decided stays decided when others go on.
"""

from __future__ import annotations

import math
from collections.abc import Set
from typing import Literal, NamedTuple

import pandas as pd

from analysis.records.frames import GROUP
from analysis.statistics import paired
from analysis.tables import comparison
from analysis.tables.rendering import signed
from pld_ray.config.parts import Seeds

State = Literal["open", "decided", "small", "max", "failed"]


class MethodProgress(NamedTuple):
    """How far the comparison of the reference with one method is.

    Attributes:
        method: The method.
        state: "decided"; "small" (the difference is below the smallest effect of interest); "max"
            (not decided with all seeds); "failed" (a trial has failed for good, so that the seeds
            of the next look are not complete); or "open".
        seeds: The seeds of each of its cells: so far, or for the next look if it is open.
        gain: The gain at the last look, with the interval of that look; None before the first.
    """

    method: str
    state: State
    seeds: int
    gain: paired.Estimate | None


def progress(
    records: pd.DataFrame, rule: Seeds, failed: Set[str] = frozenset()
) -> list[MethodProgress]:
    """Return the progress of each method that is compared with the reference.

    Args:
        records: Records as returned by `records.frames.frame`; rows of seeds that no look has
            wanted yet do not matter.
        rule: The rule by which seeds are added.
        failed: Ids of the trials that have failed for good.
    """
    sections = {name: _sections(rows) for name, rows in records.groupby("method", sort=False)}
    with_reference = _sections(records[records["reference"]])
    others = records.loc[~records["reference"], "method"].unique()
    methods = [name for name in others if sections[name] & with_reference]
    pairs = {
        other: [ours[key] - theirs[key] for key in ours]
        for _, other, ours, theirs in comparison.with_reference(records)
    }
    place, ended = records["seed"] - rule.first, records["finished"] | records["id"].isin(failed)
    found = {name: MethodProgress(name, "open", rule.looks[0], None) for name in methods}
    p = dict.fromkeys(methods, 1.0)
    for look in rule.looks:
        still_open = [name for name, each in found.items() if each.state == "open"]
        found |= {name: found[name]._replace(seeds=look) for name in still_open}
        wanted = (records["reference"] | records["method"].isin(still_open)) & (place < look)
        there = place[wanted].max() == look - 1  # else the plan has not grown to this look yet
        if not still_open or not there or not ended[wanted].all():
            break
        for name in still_open:
            samples = [each[:look] for each in pairs.get(name, [])]
            missing = len(samples) < len(sections[name] & with_reference)
            if missing or paired.reached(samples, rule.looks) < look:
                found[name] = found[name]._replace(state="failed")
                continue
            gain = paired.mean_at_looks(samples, rule.looks)
            p[name] = 1.0 if math.isnan(gain.p) else gain.p  # NaN: the runs do not differ
            # over all methods, with 95 % that no interval leaves out its gain
            _, low, high, _ = paired.mean_at_looks(samples, rule.looks, 0.05 / len(methods))
            small = rule.effect is not None and -rule.effect < low and high < rule.effect
            state: State = "small" if small else "max" if look == rule.looks[-1] else "open"
            found[name] = found[name]._replace(state=state, gain=gain)
        for name, value in zip(
            methods, paired.corrected([p[name] for name in methods]), strict=True
        ):
            if value < 0.05:
                found[name] = found[name]._replace(state="decided")
    return list(found.values())


def _sections(records: pd.DataFrame) -> set[tuple[str, ...]]:
    """Return the places of records: student, teacher and setting."""
    return set(records[comparison.SECTION].itertuples(index=False, name=None))


def seeds_wanted(
    records: pd.DataFrame, rule: Seeds, found: list[MethodProgress]
) -> dict[tuple[str, ...], int]:
    """Return how many seeds each cell takes.

    Args:
        records: Records as returned by `records.frames.frame`.
        rule: The rule by which seeds are added.
        found: What `progress` returned.

    Returns:
        The number of seeds by the values of GROUP. The reference has those of all other methods.
        What nothing is compared with has the fewest.
    """
    seeds = {each.method: each.seeds for each in found}
    most = max(seeds.values(), default=rule.min)
    with_reference = _sections(records[records["reference"]])
    wanted: dict[tuple[str, ...], int] = {}
    for *group, reference in records[[*GROUP, "reference"]].drop_duplicates().values.tolist():
        *section, method = group
        compared = most if reference else seeds.get(method, rule.min)
        wanted[tuple(group)] = compared if tuple(section) in with_reference else rule.min
    return wanted


def described(
    found: list[MethodProgress], reference: str, effect: float | None
) -> list[tuple[str, str]]:
    """Return the comparison of each method and its progress in words.

    Args:
        found: What `progress` returned.
        reference: The name of the reference.
        effect: The smallest effect of interest, in points.
    """
    rows = []
    for each in found:
        seeds = f"{each.seeds} seeds"
        said = {
            "open": f"next with {seeds}",
            "decided": f"decided with {seeds}",
            "small": f"less than {effect or 0:g} points apart, with {seeds}",
            "max": f"not decided with all {seeds}",
            "failed": "no more seeds, because a trial has failed",
        }[each.state]
        if (gain := each.gain) is not None:
            bounds = f" [{signed(gain.low)}, {signed(gain.high)}]"
            bounds = ", the same in all runs" if math.isnan(gain.low) else bounds
            said += f"; gain {signed(gain.mean)}{bounds}"
        rows.append((f"{reference} against {each.method}", said))
    return rows
