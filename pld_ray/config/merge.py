"""Merges nested settings field by field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# another name in these fields replaces the whole entry: its parameters fit no other name
_REPLACED = {"data", "student", "teacher", "loss"}
_OF_NAME = ("args", "delta")  # fields of an optimizer or schedule that fit its name alone
_NAMED = _REPLACED | {"optimizer", "schedule"}


def merge(low: dict[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `high` over `low` field by field, without changing either.

    If the name of a loss, network or dataset differs, the entry of `high` replaces the whole entry
    of `low`. If the name of an optimizer or schedule differs, the parameters that `high` does not
    set (for example the learning rate) are kept from `low`, but not `args` and `delta`.

    Args:
        low: The settings with lower priority.
        high: The settings with higher priority.

    Returns:
        A new mapping with the merged settings.
    """
    merged = dict(low)
    for key, value in high.items():
        value, below = named(key, value), named(key, low.get(key))
        if isinstance(value, dict) and isinstance(below, dict):
            other = "name" in below and value.get("name", below["name"]) != below["name"]
            if other and key in _REPLACED:
                below = {}
            elif other:
                below = {field: part for field, part in below.items() if field not in _OF_NAME}
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def named(key: str, value: Any) -> Any:
    """Expand the string x to {name: x} if the field `key` holds a named entry.

    Args:
        key: The field of a trial, such as "loss".
        value: The value of the field.

    Returns:
        The mapping with the name, or `value` unchanged.
    """
    return {"name": value} if key in _NAMED and isinstance(value, str) else value


def nest(field: str, value: Any) -> dict[str, Any]:
    """Convert a dotted field and its value to nested mappings.

    For example, "optimizer.lr" and 0.1 become `{"optimizer": {"lr": 0.1}}`.
    """
    for part in reversed(field.split(".")):
        value = {part: value}
    return value
