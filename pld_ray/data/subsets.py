"""Choose a part of a split, the same part for every trial, in which every class has its share."""

from __future__ import annotations

import numpy as np

from pld_ray.data.sampling import Ints, random_bits


def draw(labels: Ints, count: int) -> Ints:
    """Draw samples by a hash of their index, stratified by class.

    Each class gives a share of its samples in proportion to its size, rounded up or down. Every
    class gives at least one if `count` allows it. A larger draw contains each smaller one.

    Args:
        labels: The labels of all samples, [N].
        count: The number of samples to draw.

    Returns:
        The indices of the drawn samples in ascending order, [count].
    """
    return np.sort(_ranked(labels)[:count])


def hold_out(labels: Ints, count: int) -> tuple[Ints, Ints]:
    """Split samples into those that stay and `count` that are held out, as `draw` draws them.

    The last sample of a class is never held out, so that training sees every class.

    Args:
        labels: The labels of all samples, [N].
        count: The number of samples to hold out.

    Returns:
        The indices of both parts in ascending order. If there are fewer samples than `count` and
        the classes together, fewer are held out.
    """
    ranked = _ranked(labels)
    only = ranked[_place_in_class(labels, ranked) == np.bincount(labels)[labels[ranked]] - 1]
    held = ranked[~np.isin(ranked, only)][:count]
    return np.setdiff1d(np.arange(len(labels)), held), np.sort(held)


def _ranked(labels: Ints) -> Ints:
    """Return all indices in the order in which they are drawn."""
    hashes = random_bits(0, 0, np.arange(len(labels)), "subset")
    by_hash = np.argsort(hashes, kind="stable")
    share = _place_in_class(labels, by_hash) / np.bincount(labels)[labels[by_hash]]
    return by_hash[np.argsort(share, kind="stable")]


def _place_in_class(labels: Ints, order: Ints) -> Ints:
    """Return for each index in `order` how many indices of its class stand before it."""
    by_class = np.argsort(labels[order], kind="stable")
    counts = np.bincount(labels)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    places = np.empty(len(order), np.int64)
    places[by_class] = np.arange(len(order)) - starts
    return places
