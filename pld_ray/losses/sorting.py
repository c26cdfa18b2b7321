"""Integer keys that sort like numbers, and equal numbers by class. Imports no torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
CLASS = 0xFFFFFFFF  # the bits of a key that hold the class


def sort_keys(x: Array) -> Array:
    """Return keys whose ascending order is that of the numbers; equal numbers sort by class.

    The upper half of a key holds the bits of the number, mapped so that integers sort like floats.
    The lower half holds the class. NumPy sorts plain integers with vector instructions; torch's
    stable argsort takes five times as long at 1,000 classes.

    Args:
        x: float32 [N, C], which is overwritten. It must not contain -0.0, which sorts before 0.0
            although both are equal.

    Returns:
        Keys [N, C], int64; `keys & CLASS` are the classes.
    """
    bits = x.view(np.int32)
    bits ^= (bits >> 31) & np.int32(0x7FFFFFFF)
    keys = bits.astype(np.int64)
    keys <<= 32
    keys |= np.arange(x.shape[1])
    return keys
