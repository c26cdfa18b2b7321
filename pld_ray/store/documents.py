"""JSON documents with a checksum, and the formats of trial records and epoch logs."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic_core import from_json


def _digest(value: dict[str, Any]) -> str:
    """Return the SHA-256 of a mapping; it does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def to_document(value: dict[str, Any]) -> bytes:
    """Write a mapping as JSON text, with a checksum of its content.

    Numbers that are not finite become null: strict JSON has no others.
    """
    value = _finite(value)
    return (json.dumps(value | {"sha256": _digest(value)}, indent=1) + "\n").encode()


def to_lines(values: list[dict[str, Any]]) -> bytes:
    """Write mappings as JSON text, one per line; numbers that are not finite become null."""
    return "".join(json.dumps(_finite(value)) + "\n" for value in values).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_document(content: bytes) -> dict[str, Any] | None:
    """Read the mapping that `to_document` wrote, or return None if it is damaged."""
    value = _parsed(content)
    if not isinstance(value, dict):
        return None
    return value if value.pop("sha256", None) == _digest(value) else None


def parse_record(content: bytes | None) -> dict[str, Any] | None:
    """Parse the record of a trial; early records have no checksum.

    Args:
        content: The bytes of the file, or None if there is none.

    Returns:
        The record, or None if it is missing or damaged.
    """
    value = _parsed(content or b"")
    if isinstance(value, dict) and "sha256" in value:
        value = from_document(content or b"")
    try:
        _Record.model_validate(value)
    except ValidationError:
        return None
    return value


def parse_epochs(content: bytes) -> list[dict[str, Any]]:
    """Parse the metrics of each epoch, or return an empty list if a line is damaged."""
    found = [_parsed(line) for line in content.splitlines()]
    try:
        _EPOCHS.validate_python(found)
    except ValidationError:
        return []
    return found


def _parsed(content: bytes) -> Any:
    """Parse JSON text, or return None if it is not valid."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def parse_sound(content: bytes) -> dict[str, Any]:
    """Read a mapping that was checked before (see `SOUND`), without checking it again."""
    value: dict[str, Any] = from_json(content)  # four times as fast as json.loads
    value.pop("sha256", None)
    return value


class _Record(BaseModel):
    """The fields of a record that are read; a record can have more fields."""

    model_config = ConfigDict(strict=True)

    weights_sha256: str
    metrics: dict[str, float]
    seconds: dict[str, float]
    notes: list[str] = []
    parameters: int = 0
    environment: dict[str, Any] = {}

    @model_validator(mode="after")
    def _complete(self) -> _Record:
        if "top1" not in self.metrics or "seconds" not in self.seconds:
            raise ValueError("metrics.top1 or seconds.seconds is missing")
        return self


class _Epoch(BaseModel):
    """The fields of an epoch that are read; an epoch can have more fields."""

    model_config = ConfigDict(strict=True)

    epoch: int
    seconds: float = 0.0
    top1: float = 0.0


_EPOCHS = TypeAdapter(list[_Epoch])

# The small files of a trial, and whether their content is as it was written
SOUND: dict[str, Callable[[bytes], bool]] = {
    "trial.json": lambda content: isinstance(_parsed(content), dict),
    "record.json": lambda content: parse_record(content) is not None,
    "epochs.jsonl": lambda content: bool(parse_epochs(content)),
    "failure.json": lambda content: from_document(content) is not None,
    "stopped.json": lambda content: from_document(content) is not None,
}
