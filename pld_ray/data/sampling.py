"""Random numbers, sample order and batches, as pure functions of (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


def random_bits(seed: int, epoch: int, index: Ints, purpose: str) -> Hashes:
    """Return 64 random bits per index: splitmix64 over (seed, epoch, purpose, index).

    Args:
        seed: The random seed.
        epoch: The epoch or view.
        index: The indices of samples, [B].
        purpose: What the bits are for; different purposes give independent bits. Only the first 8
            bytes count.

    Returns:
        Random bits, uint64 [B].
    """
    key = np.uint64(int.from_bytes(purpose.encode()[:8], "little"))
    with np.errstate(over="ignore"):
        for part in (np.uint64(seed), np.uint64(epoch)):
            key = _mix(np.atleast_1d(key ^ _mix(np.atleast_1d(part))))[0]
        return _mix(index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key)


def _mix(x: Hashes) -> Hashes:
    """Apply one step of splitmix64 to each element."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def order(seed: int, epoch: int, size: int) -> Ints:
    """Return the order of `size` samples in an epoch: a permutation of 0 .. size - 1."""
    return np.argsort(random_bits(seed, epoch, np.arange(size), "order"), kind="stable")


def batches(order: Ints, batch_size: int, drop_last: bool) -> Iterator[Ints]:
    """Split an order of samples into global batches.

    Args:
        order: The indices of samples, [N].
        batch_size: The global batch size.
        drop_last: Whether to drop the last batch if it is smaller.

    Yields:
        The indices of each batch, [batch_size] or fewer for the last batch.
    """
    end = len(order) // batch_size * batch_size if drop_last else len(order)
    for start in range(0, end, batch_size):
        yield order[start : start + batch_size]
