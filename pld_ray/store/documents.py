"""JSON documents with a checksum, and the records and epoch logs that are kept in them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator


def _digest(value: dict[str, Any]) -> str:
    """Of what a mapping says, however it is laid out."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def to_document(value: dict[str, Any]) -> bytes:
    """JSON text of a mapping, with a checksum of what it says."""
    return (json.dumps(value | {"sha256": _digest(value)}, indent=1) + "\n").encode()


def from_document(content: bytes) -> dict[str, Any] | None:
    """What `to_document` made, without its checksum; None where it is damaged."""
    value = _parsed(content)
    if not isinstance(value, dict):
        return None
    return value if value.pop("sha256", None) == _digest(value) else None


def parse_record(content: bytes | None) -> dict[str, Any] | None:
    """A record; the first ones were written without a checksum."""
    value = _parsed(content or b"")
    if isinstance(value, dict) and "sha256" in value:
        value = from_document(content or b"")
    try:
        _Record.model_validate(value)
    except ValidationError:
        return None
    return value


def parse_epochs(content: bytes) -> list[dict[str, Any]]:
    """The metrics of each epoch; an empty list where a line is damaged."""
    found = [_parsed(line) for line in content.splitlines()]
    try:
        _EPOCHS.validate_python(found)
    except ValidationError:
        return []
    return found


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


class _Record(BaseModel):
    """What is read of a record; there may be more in it."""

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
            raise ValueError("metrics.top1 and seconds.seconds are missing")
        return self


class _Epoch(BaseModel):
    """What is read of an epoch; there may be more in it."""

    model_config = ConfigDict(strict=True)

    epoch: int
    seconds: float = 0.0
    top1: float = 0.0


_EPOCHS = TypeAdapter(list[_Epoch])
