"""The table of `pld-ray power`: how many seeds it takes to decide a gain."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from analysis.statistics import power
from analysis.statistics.paired import ENOUGH
from analysis.tables import comparison
from analysis.tables.rendering import MISSING, signed

CAUTIOUS = 0.8  # confidence of the bound of the spread


def of_records(records: pd.DataFrame, effects: Sequence[float], wanted: float) -> pd.DataFrame:
    """Return one row per method that is compared with the reference.

    Args:
        records: Records as returned by `records.frames.frame`.
        effects: Gains in points.
        wanted: The power.

    Returns:
        The columns method (the reference), against, gain (so far), pairs, seeds (the fewest on a
        pair), spread (the root mean square over pairs of the standard deviation of the paired
        differences), detectable (the smallest gain that the present seeds decide), seeds_EFFECT
        (the seeds that this gain takes) and cautious_EFFECT (the same with the upper 80 % bound of
        the spread). Values are NaN with fewer than three seeds on a pair, and above 10,000 seeds.
        The level is 0.05 divided by the number of rows.
    """
    pairs = list(comparison.with_reference(records))
    level = 0.05 / max(1, len(pairs))
    rows = []
    for first, second, ours, theirs in pairs:
        differences = [ours[key] - theirs[key] for key in ours]
        seeds = min(map(len, differences))
        gain = sum(each.mean() for each in differences) / len(differences)
        row = {"method": first, "against": second, "gain": gain}
        row |= {"pairs": len(differences), "seeds": seeds}
        known = seeds >= ENOUGH
        spread = power.spreads(differences) if known else None
        row["spread"] = math.nan if spread is None else math.sqrt((spread**2).mean())
        row["detectable"] = (
            math.nan if spread is None else power.detectable(spread, seeds, level, wanted)
        )
        for effect in effects:
            for name, confidence in (("seeds", 0.0), ("cautious", CAUTIOUS)):
                found = None
                if known:
                    bound = power.spreads(differences, confidence)
                    found = power.seeds_needed(effect, bound, level, wanted)
                row[f"{name}_{effect:g}"] = math.nan if found is None else found
        rows.append(row)
    return pd.DataFrame(rows)


def printed(table: pd.DataFrame, effects: Sequence[float]) -> pd.DataFrame:
    """Format the table of `of_records` as strings."""

    def number(value: float, digits: int) -> str:
        return MISSING if math.isnan(value) else f"{value:,.{digits}f}"

    lines = []
    for row in table.to_dict("records"):
        line = {f"{row['method']} against": row["against"], "Gain": signed(row["gain"])}
        line |= {"Pairs": str(row["pairs"]), "Seeds": str(row["seeds"])}
        line |= {"Spread": number(row["spread"], 2), "Detectable": number(row["detectable"], 2)}
        for effect in effects:
            least, most = row[f"seeds_{effect:g}"], row[f"cautious_{effect:g}"]
            beyond = f"more than {power.MOST:,}" if not math.isnan(row["spread"]) else MISSING
            said = beyond if math.isnan(least) else number(least, 0)
            if not math.isnan(least) and most != least:
                said += f" to {number(most, 0)}" if not math.isnan(most) else " or more"
            line[f"Seeds for {effect:g}"] = said
        lines.append(line)
    return pd.DataFrame(lines)


def explained(comparisons: int, wanted: float) -> str:
    """Return the text under the table of `printed`."""
    return (
        "Spread: standard deviation of the differences, paired by seed, in points. Detectable: the "
        f"smallest gain that the present seeds decide in {wanted:.0%} of cases. Seeds for a gain: "
        "the seeds on each pair that it takes, with the spread as it was seen, and with its upper "
        f"80\u00a0% bound. A gain is decided at 5\u00a0%, corrected for {comparisons} "
        f"{'comparison' if comparisons == 1 else 'comparisons'}. {MISSING}: fewer than {ENOUGH} "
        "seeds on a pair."
    )
