"""Rules of an experiment: settings that depend on other settings of a cell.

rules:
  - {when: {student: [mobilenetv2_cifar, shufflenet*]}, set: {optimizer.lr: 0.01}}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from pydantic import BaseModel, Field

from pld_ray.config.merge import merge, named, nest
from pld_ray.config.parts import Data, Model, Optimizer, Schedule
from pld_ray.config.trial import Trial
from pld_ray.config.validation import Part
from pld_ray.losses import REGISTRY


class Rule(Part):
    """Settings for those cells of an experiment that have other settings.

    Attributes:
        when: The fields of a cell that decide, and for each the value or the list of values with
            which the rule applies. A field that is not set has its default. A network, loss,
            optimizer, schedule or dataset is given by its name. Texts may have the wildcards * and
            ?. All fields must fit.
        set: The fields that the rule sets, and their values.
    """

    when: dict[str, Any] = Field(min_length=1)
    set: dict[str, Any] = Field(min_length=1)

    def applies(self, raw: Mapping[str, Any]) -> bool:
        """Return whether the rule applies to a cell with these settings."""
        return all(_fits(_value(raw, field), wanted) for field, wanted in self.when.items())

    @property
    def fields(self) -> list[str]:
        """The dotted fields that the rule sets; the name of a named entry is the entry itself."""
        return [leaf for field, value in self.set.items() for leaf in _leaves(field, value)]


def _leaves(field: str, value: Any) -> Iterator[str]:
    """Yield the dotted fields of a value that may be a mapping."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _leaves(f"{field}.{key}", part)
    else:
        first, _, last = field.partition(".")
        yield first if last == "name" else field


def _value(raw: Any, field: str) -> Any:
    """Return the value of a dotted field, or its default; the name of a named entry.

    It is None if the field has no value, or belongs to another loss.
    """
    first, *rest = field.split(".")
    value, model = named(first, raw.get(first)), _MODELS.get(first)
    if first == "loss" and isinstance(value, dict):
        model = REGISTRY.get(value.get("name"))  # type: ignore[arg-type]
    if first not in raw:
        value = _default(Trial, first)
    for number, part in enumerate(rest):
        if isinstance(value, BaseModel):
            value = getattr(value, part, None)
        elif not isinstance(value, dict):
            return None
        elif part in value or number > 0 or model is None:
            value = value.get(part)
        else:
            value = _default(model, part)
    if isinstance(value, BaseModel):
        return getattr(value, "name", None)
    return value.get("name") if isinstance(value, dict) else value


_MODELS: dict[str, type[BaseModel]] = {
    "data": Data,
    "student": Model,
    "optimizer": Optimizer,
    "schedule": Schedule,
}


def _default(model: type[BaseModel], field: str) -> Any:
    """Return the default of a field, None if there is none."""
    known = model.model_fields.get(field)
    return None if known is None or known.is_required() else known.get_default()


def _fits(value: Any, wanted: Any) -> bool:
    """Return whether a value is the wanted one, or one of a list of them."""
    each = wanted if isinstance(wanted, list) else [wanted]
    if isinstance(value, str):
        return any(isinstance(one, str) and fnmatchcase(value, one) for one in each)
    return value in each


def apply(rules: list[Rule], raw: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Apply rules to the settings of a cell; later rules win.

    All rules look at the settings as they are before any rule.

    Returns:
        The settings, and the numbers of the rules that applied.
    """
    found = tuple(number for number, rule in enumerate(rules) if rule.applies(raw))
    for number in found:
        for field, value in rules[number].set.items():
            raw = merge(raw, nest(field, value))
    return raw, found
