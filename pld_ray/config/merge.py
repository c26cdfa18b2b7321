"""Settings over settings, field by field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_REPLACED = {"data", "student", "teacher", "loss"}  # another name there: another thing altogether
_NAMED = _REPLACED | {"optimizer", "schedule"}


def merge(low: dict[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """`high` over `low`, field by field; neither is changed.

    Another loss, network or dataset replaces the lower one with its parameters; another optimizer
    or schedule keeps those that `high` does not name (the learning rate, say).
    """
    merged = dict(low)
    for key, value in high.items():
        value, below = named(key, value), named(key, low.get(key))
        if isinstance(value, dict) and isinstance(below, dict):
            other = "name" in below and value.get("name", below["name"]) != below["name"]
            merged[key] = value if key in _REPLACED and other else merge(below, value)
        else:
            merged[key] = value
    return merged


def named(key: str, value: Any) -> Any:
    """The string x as {name: x}, where a field has a name."""
    return {"name": value} if key in _NAMED and isinstance(value, str) else value


def nest(field: str, value: Any) -> dict[str, Any]:
    """A dotted field and its value as nested mappings."""
    for part in reversed(field.split(".")):
        value = {part: value}
    return value
