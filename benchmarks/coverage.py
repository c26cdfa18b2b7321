"""Measure how often 95 % intervals leave out the truth, and how often a table has a false winner.

    .venv/bin/python benchmarks/coverage.py                # nine minutes on one slow core
    .venv/bin/python benchmarks/coverage.py --repeats 200  # quick run

Two methods of equal quality are compared again and again, on 1 to 6 pairs of networks with 3 to 24
seeds each. Their scores are normal, skewed, or tied (correct answers of 100); the spread of the
scores is the same on each pair, or twice or three times as large on some. The first table shows the
share of comparisons in which the interval of `analysis.statistics.paired` leaves out 0, and the
same share for the percentile bootstrap. The second shows the share of tables of equal methods in
which any of all their comparisons has a corrected p-value below 0.05. Wanted: 5 % and at most 5 %.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from analysis.statistics.paired import Scores, corrected, mean_of

Draw = Callable[[np.random.Generator, tuple[int, ...]], Scores]
KINDS: dict[str, Draw] = {
    "normal": lambda rng, size: rng.normal(size=size),
    "skewed": lambda rng, size: -rng.gamma(2, size=size),
    "tied": lambda rng, size: rng.binomial(100, 0.85, size=size).astype(float),
}
SPREADS = [(1,), (1, 1), (1, 2), (1, 3), (1, 1, 1, 1), (1, 2, 1, 2), (1, 3, 1, 1), (1, 2) * 3]
SEEDS = [3, 4, 6, 10, 24]
RESAMPLES = 999


def differences(
    kind: str, spreads: tuple[int, ...], seeds: int, repeats: int, rng: np.random.Generator
) -> Scores:
    """Return the differences of two equal methods, [repeats, pairs, seeds]."""
    size = (repeats, len(spreads), seeds)
    ours, theirs = (KINDS[kind](rng, size) * np.array(spreads)[:, None] for _ in range(2))
    return ours - theirs


def bootstrap_leaves_out(samples: Scores, rng: np.random.Generator) -> bool:
    """Return whether the percentile bootstrap interval of the mean leaves out 0.

    Args:
        samples: The differences on each pair, [pairs, seeds].
        rng: Draws the runs of each resample within their pair.
    """
    pairs, seeds = samples.shape
    drawn = rng.integers(seeds, size=(RESAMPLES, pairs, seeds))
    means = np.take_along_axis(samples[None], drawn, 2).mean((1, 2))
    low, high = np.quantile(means, [0.025, 0.975])
    return bool(low > 0 or high < 0)


def coverage(repeats: int, console: Console) -> None:
    """Print the share of intervals that leave out the truth."""
    table = Table("Scores", "Spread on each pair", box=box.MARKDOWN)
    for seeds in SEEDS:
        table.add_column(f"{seeds} seeds", justify="right")
    for kind, spreads in itertools.product(KINDS, SPREADS):
        cells = []
        for seeds in SEEDS:
            rng = np.random.default_rng(0)
            drawn = differences(kind, spreads, seeds, repeats, rng)
            ours = np.mean([mean_of(list(each)).p < 0.05 for each in drawn])
            few = drawn[: repeats // 5]
            theirs = np.mean([bootstrap_leaves_out(each, rng) for each in few])
            cells.append(f"{100 * ours:.1f} ({100 * theirs:.0f})")
        table.add_row(kind, ", ".join(map(str, spreads)), *cells)
    console.print("Intervals that leave out the truth, % (in brackets: percentile bootstrap)")
    console.print(table)


def false_winners(repeats: int, console: Console) -> None:
    """Print the share of tables in which equal methods differ."""
    table = Table("Methods", "Comparisons", "Pairs", box=box.MARKDOWN)
    for seeds in SEEDS:
        table.add_column(f"{seeds} seeds", justify="right")
    for methods, pairs in [(2, 1), (4, 1), (4, 4), (12, 4)]:
        cells = []
        for seeds in SEEDS:
            rng = np.random.default_rng(0)
            found = 0
            for _ in range(repeats // 5):
                scores = KINDS["normal"](rng, (methods, pairs, seeds))
                p = [mean_of(list(a - b)).p for a, b in itertools.combinations(scores, 2)]
                found += min(corrected(p)) < 0.05
            cells.append(f"{100 * found / (repeats // 5):.1f}")
        table.add_row(str(methods), str(methods * (methods - 1) // 2), str(pairs), *cells)
    console.print("\nTables of equal methods with a false winner, %")
    console.print(table)


def main() -> None:
    """Run the simulations and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10_000, help="comparisons per number")
    repeats = parser.parse_args().repeats
    console = Console(width=110)
    coverage(repeats, console)
    false_winners(repeats, console)


if __name__ == "__main__":
    main()
