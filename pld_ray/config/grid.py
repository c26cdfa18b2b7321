"""Entries of an experiment's grid: fields, and the rows of values that they take."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from pld_ray.errors import InputError


def axis(key: str, values: Any, where: str) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """A grid entry as (fields, rows); a row holds one value for each field."""
    fields = tuple(field.strip() for field in key.split(","))
    if not isinstance(values, list) or not values:
        raise InputError(f"{where}: grid.{key} is {values!r}: expected a list of values")
    if fields == ("loss",):
        return fields, [(loss,) for value in values for loss in each_loss(value)]
    if len(fields) == 1:
        return fields, [(value,) for value in values]
    for row in values:
        if not isinstance(row, list) or len(row) != len(fields):
            raise InputError(
                f"{where}: grid.{key} has {row!r}: expected a list of {len(fields)} values"
            )
    return fields, [tuple(row) for row in values]


def each_loss(loss: Any) -> Iterator[Any]:
    """A loss entry with lists inside as the losses it stands for."""
    if not isinstance(loss, dict):
        yield loss
        return
    lists = [v if isinstance(v, list) else [v] for v in loss.values()]
    for values in itertools.product(*lists):
        yield dict(zip(loss, values, strict=True))
