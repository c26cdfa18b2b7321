"""Measure the error and the cost of seeds that are added until decided.

    .venv/bin/python benchmarks/sequential.py                 # ten seconds on one slow core
    .venv/bin/python benchmarks/sequential.py --repeats 2000  # quick run

Two methods are compared again and again on one pair of networks, with seeds as
`seeds: {min: 3, max: 20, until: decided}` adds them. The first table shows the share of comparisons
of equal methods that are ever decided (wanted: at most 5 %), with the levels of
`analysis.statistics.sequential`, with all of the error spent, and with 5 % at each look. The second
shows, for a gain in units of the spread of the differences, how often it is decided and with how
many seeds on average, beside the fixed number of seeds `max`.
"""

from __future__ import annotations

import argparse

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import special

from analysis.statistics.paired import Scores
from analysis.statistics.sequential import SPENT, Looks, levels
from pld_ray.config.parts import Seeds

RULES = [(3, 4), (3, 8), (3, 20), (6, 20), (5, 100)]
GAINS = [0.3, 0.5, 0.8, 1.2, 2.0]


def p_values(differences: Scores, looks: Looks) -> Scores:
    """Return the p-value of the t-test at each look, [repeats, looks].

    Args:
        differences: The paired differences, [repeats, seeds].
        looks: The number of seeds at each look.
    """
    columns = []
    for n in looks:
        runs = differences[:, :n]
        t = runs.mean(1) / (runs.std(1, ddof=1) / np.sqrt(n))
        columns.append(2 * special.stdtr(n - 1, -abs(t)))
    return np.stack(columns, 1)


def errors(repeats: int, console: Console) -> None:
    """Print how often equal methods are decided."""
    table = Table("Looks", "Scores", box=box.MARKDOWN)
    for name in ("this rule", "all of 5 % spent", "5 % at each look"):
        table.add_column(name, justify="right")
    for low, high in RULES:
        looks = Seeds(min=low, max=high, until="decided").looks
        size = (repeats, high)
        for kind in ("normal", "skewed"):
            rng = np.random.default_rng(0)
            drawn = rng.normal(size=size)
            if kind == "skewed":
                drawn = rng.gamma(2, size=size) - rng.gamma(2, size=size)
            p = p_values(drawn, looks)
            rules = levels(looks), levels(looks, 0.05 / SPENT), np.full(len(looks), 0.05)
            shares = [f"{100 * (p < np.array(rule)).any(1).mean():.2f}" for rule in rules]
            table.add_row(", ".join(map(str, looks)), kind, *shares)
    console.print("Comparisons of equal methods that are decided, %")
    console.print(table)


def costs(repeats: int, console: Console) -> None:
    """Print how often a gain is decided, and with how many seeds."""
    looks = Seeds(min=3, max=20, until="decided").looks
    table = Table("Gain / spread", box=box.MARKDOWN)
    for name in ("decided", "seeds on average", f"decided with {looks[-1]} seeds"):
        table.add_column(name, justify="right")
    for gain in GAINS:
        drawn = np.random.default_rng(0).normal(gain, size=(repeats, looks[-1]))
        p = p_values(drawn, looks)
        crossed = p < np.array(levels(looks))
        seeds = np.array(looks)[np.where(crossed.any(1), crossed.argmax(1), -1)]
        shares = crossed.any(1).mean(), (p[:, -1] < 0.05).mean()
        decided, fixed = (f"{100 * share:.0f} %" for share in shares)
        table.add_row(f"{gain:g}", decided, f"{seeds.mean():.1f}", fixed)
    console.print(f"\nGains with seeds from {looks[0]} to {looks[-1]} until decided")
    console.print(table)


def main() -> None:
    """Run the simulations and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=100_000, help="comparisons per number")
    repeats = parser.parse_args().repeats
    console = Console(width=110)
    errors(repeats, console)
    costs(repeats, console)


if __name__ == "__main__":
    main()
