"""Validation of settings, with errors as one sentence for the user."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    model_validator,
)

from pld_ray.errors import InputError, nearest
from pld_ray.losses.parameters import refuse_switches


class Part(BaseModel):
    """Base class of settings: immutable, and unknown fields are errors.

    If a subclass has a field `name`, the string x is short for `{name: x}`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        if isinstance(value, str) and "name" in cls.model_fields:
            return {"name": value}
        return refuse_switches(cls, value)


_Model = TypeVar("_Model", bound=BaseModel)


def validated(model: type[_Model], raw: Any, where: str) -> _Model:
    """Validate plain values as a model.

    Args:
        model: The pydantic model.
        raw: The plain values, as parsed from YAML.
        where: The source of the values, such as the path of a file, for error messages.

    Returns:
        An instance of `model`.

    Raises:
        InputError: The values are not valid. The message is one sentence that starts with `where`
            and names the first wrong field, its value, and the accepted values.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{where}: {sentence(error, model)}") from None


def sentence(error: ValidationError, model: type[BaseModel]) -> str:
    """Describe one error of a validation in one sentence: an unknown field, else the first error.

    Args:
        error: The error that pydantic raised.
        model: The model that was validated.

    Returns:
        The sentence: the field, its value, and the accepted values.
    """
    # An unknown field comes first: a misspelt one is often also reported as missing.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    # without the tags of unions, such as "<list>"
    loc = [str(part) for part in first["loc"] if not str(part).startswith("<")]
    path = ".".join(loc)
    value, context = first["input"], first.get("ctx", {})
    match first["type"]:
        case "extra_forbidden":
            fields = set(_parent(model, loc).model_fields)
            return f"{path}: unknown field; {nearest(loc[-1], fields)}"
        case "literal_error":
            known = re.findall(r"'([^']*)'", context["expected"])
            return f"{path} is {value!r}; {nearest(str(value), known)}"
        case "missing":
            return f"{path}: the field is missing and has no default"
        case "loss":
            return f"{path}{first['msg']}"
        case "value_error":
            message = str(context["error"])
            return f"{path}: {message}" if path else message
        case _:
            shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:77]}..."
            message = first["msg"][0].lower() + first["msg"][1:]
            return f"{path} is {shown}: {message}"


def _parent(model: type[BaseModel], loc: list[str]) -> type[BaseModel]:
    """Return the (nested) model that holds the last field of a location."""
    for name in loc[:-1]:
        field = model.model_fields.get(name)
        model = next(_models(field.annotation), model) if field is not None else model
    return model


def _models(kind: Any) -> Iterator[type[BaseModel]]:
    """Yield the models in the annotation of a field."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for part in get_args(kind):
        yield from _models(part)
