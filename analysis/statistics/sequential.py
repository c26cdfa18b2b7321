"""Tests that are repeated while more seeds are run: how small p must be at each look.

An error of 5 % is spent over the looks (Lan and DeMets 1983), as the square of the share of the
seeds that are there (Kim and DeMets 1987, with rho = 2). Between the early looks, which then decide
clear cases, and the last look, which keeps most of the power, this is a compromise.

The level of each look follows from the distribution of a Brownian motion that has not crossed its
bounds before (Armitage, McPherson and Rowe 1969). It is applied to the p-value of the t-test
(Jennison and Turnbull 2000, section 3.8). With few seeds, t-values of different looks are less
alike than those of the motion, which adds up to 15 % to the error (`benchmarks/sequential.py`).
Therefore only a share of the error is spent.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

Numbers = npt.NDArray[np.float64]
Looks = tuple[int, ...]  # numbers of seeds at which the methods are compared, ascending

SPENT = 0.87  # of the error
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)
_GRID = np.geomspace(1e-12, 1, 121)  # overall levels, between which p-values are interpolated


def bounds(fractions: Numbers, spent: Numbers) -> list[float]:
    """Return the bound of the absolute z-value at each look, above which a test rejects.

    Args:
        fractions: The share of all seeds at each look, ascending, in (0, 1].
        spent: The error that is spent up to each look, ascending.
    """
    from scipy.optimize import brentq  # importing it takes a quarter of a second

    places, density = np.zeros(1), np.ones(1)  # of the motion, times the weight of each place
    found = []
    steps, shares = np.diff(fractions, prepend=0.0), np.diff(spent, prepend=0.0)
    for time, step, share in zip(fractions, steps, shares, strict=True):
        scales = places / np.sqrt(step), np.sqrt(time / step), density
        none = _crossing(0.0, *scales, share) <= 0
        bound = 0.0 if none else float(brentq(_crossing, 0.0, 40.0, (*scales, share)))
        found.append(bound)
        reach = bound * np.sqrt(time)
        moves = (reach * _NODES[:, None] - places) / np.sqrt(step)
        density = np.exp(-(moves**2) / 2) @ density / np.sqrt(2 * np.pi * step) * reach * _WEIGHTS
        places = reach * _NODES
    return found


def _crossing(bound: float, places: Numbers, scale: float, density: Numbers, share: float) -> float:
    """Return the probability to cross a bound at a look, and not before, minus a share.

    Args:
        bound: The bound of the absolute z-value.
        places: Places at the look before, in units of the step of the motion.
        scale: The standard deviation of the motion at the look, in the same units.
        density: The probability of each place.
        share: What is subtracted.
    """
    outside = ndtr(places - bound * scale) + ndtr(-places - bound * scale)
    return float(density @ outside) - share


@functools.cache
def levels(looks: Looks, level: float = 0.05) -> tuple[float, ...]:
    """Return the level of the two-sided test at each look.

    Args:
        looks: The number of seeds at each look.
        level: The error of all looks together.
    """
    fractions = np.array(looks) / looks[-1]
    return tuple(2 * float(ndtr(-z)) for z in bounds(fractions, SPENT * level * fractions**2))


@functools.cache
def _table(looks: Looks) -> Numbers:
    """Return the logarithm of the level of each look, for each overall level of the grid."""
    return np.log([levels(looks, float(level)) for level in _GRID]).T


def adjusted(p: Sequence[float], looks: Looks) -> float:
    """Return the p-value of the looks so far: the smallest overall level at which one rejects.

    It is valid whenever, and for whatever reason, the seeds end.

    Args:
        p: The p-values of the first looks; NaN where the seeds say nothing.
        looks: The number of seeds at each look, also of those that have not come yet.
    """
    with np.errstate(divide="ignore"):
        logs = np.log(np.nan_to_num(np.array(p, dtype=float), nan=1.0))
    found = [
        np.exp(np.interp(log, row, np.log(_GRID)))
        for log, row in zip(logs, _table(looks)[: len(logs)], strict=True)
    ]
    return float(min(found, default=np.nan))
