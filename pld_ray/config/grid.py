"""Entries of an experiment's grid: parses each into its fields and their rows of values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, get_origin

from pld_ray.errors import InputError
from pld_ray.losses import REGISTRY


def axis(key: str, values: Any, where: str) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Parse an entry of a grid.

    Args:
        key: A field, or several fields separated by commas, such as "teacher, student".
        values: The values of the field, or one list of values per row if there are several fields.
        where: The name of the experiment, for error messages.

    Returns:
        The fields, and the rows: each row holds one value per field.

    Raises:
        InputError: `values` is not a list, is empty, or has a row of the wrong length.
    """
    fields = tuple(field.strip() for field in key.split(","))
    if not isinstance(values, list) or not values:
        raise InputError(
            f"{where}: grid.{key} is {values!r}: expected a list with at least one value"
        )
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
    """Yield the losses of a loss entry: all combinations of the lists inside it.

    Args:
        loss: The name of a loss, or a mapping whose values may be lists, such as
            `{name: kd, temperature: [1, 4]}`. If a parameter is a list itself, its values are in a
            list of lists; a list without lists is one value.

    Yields:
        Losses whose parameters are single values.
    """
    if not isinstance(loss, dict):
        yield loss
        return
    name = loss.get("name")
    fields = REGISTRY[name].model_fields if isinstance(name, str) and name in REGISTRY else {}
    lists = []
    for key, value in loss.items():
        single = not isinstance(value, list) or (
            key in fields
            and get_origin(fields[key].annotation) is tuple
            and not any(isinstance(each, list) for each in value)
        )
        lists.append([value] if single else value)
    for values in itertools.product(*lists):
        yield dict(zip(loss, values, strict=True))
