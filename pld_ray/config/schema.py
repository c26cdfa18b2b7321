"""The JSON Schema of experiment files, for editors: it completes and checks names while one types.

It is looser than the program, which checks more (see `Experiment`), and it knows the losses that
are registered at the moment, so those of imported plug-ins as well.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pld_ray.config.experiment import Experiment
from pld_ray.config.planning import TeacherEntry
from pld_ray.config.trial import Trial
from pld_ray.losses import REGISTRY, LossParams

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_FILLED_IN = ("plugins", "seed", "teacher_logits", "views")  # fields of a trial that a plan sets


def experiment_schema() -> dict[str, Any]:
    """Return the JSON Schema of an experiment file."""
    _, found = models_json_schema(
        [(model, "validation") for model in (Experiment, Trial, TeacherEntry)],
        ref_template="#/$defs/{model}",
    )
    parts = found["$defs"]
    for model in _models(Experiment, Trial, TeacherEntry):
        _describe(parts[model.__name__], model)
        parts[model.__name__].pop("required", None)  # the settings below it may have the field
    augment = parts["Data"]["properties"]["augment"]
    augment["anyOf"] = [augment["items"], {"type": augment.pop("type"), "items": augment["items"]}]
    augment.pop("items")
    experiment, trial = parts.pop("Experiment"), parts.pop("Trial")
    settings = {
        name: field for name, field in trial["properties"].items() if name not in _FILLED_IN
    }
    settings |= {"teacher": {"$ref": "#/$defs/TeacherEntry"}, "loss": {"$ref": "#/$defs/Loss"}}
    parts["Settings"] = {
        "description": "Settings that all trials share.",
        "type": "object",
        "properties": settings,
        "additionalProperties": False,
    }
    parts["Loss"] = {
        "description": "A loss by its name, or with parameters; each may be a list of values.",
        "anyOf": [
            {"enum": sorted(REGISTRY)},
            *(_loss(REGISTRY[name]) for name in sorted(REGISTRY)),
        ],
    }
    for fields in (experiment["properties"], parts["Smoke"]["properties"]):
        fields["base"] = {"$ref": "#/$defs/Settings", "description": fields["base"]["description"]}
    parts["TeacherEntry"]["properties"]["train"]["$ref"] = "#/$defs/Settings"
    lists = {"type": "array", "minItems": 1}
    experiment["properties"]["grid"] |= {
        "properties": {name: lists | {"items": field} for name, field in settings.items()},
        "additionalProperties": lists,
    }
    experiment["properties"].pop("miniature_of")
    teacher = settings["teacher"]
    settings["teacher"] = {"anyOf": [teacher, {"type": "null"}]}
    recipe = {"smoke": {"$ref": "#/$defs/Smoke"}, **settings}
    parts["Recipe"] = parts["Settings"] | {"properties": recipe}
    named = {
        f"#/$defs/{key}" for key, part in parts.items() if "name" in part.get("properties", {})
    }
    whole = {"$schema": DIALECT, "title": "pld-ray experiment", **experiment, "$defs": parts}
    return _with_short_forms(whole, named)


def _models(*roots: type[BaseModel]) -> set[type[BaseModel]]:
    """Return models and those in their fields."""
    found: set[type[BaseModel]] = set()

    def add(kind: Any) -> None:
        for part in getattr(kind, "__args__", ()):
            add(part)
        if isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in found:
            if not issubclass(kind, LossParams):
                found.add(kind)
            for field in kind.model_fields.values():
                add(field.annotation)

    for root in roots:
        add(root)
    return found


def _describe(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Move the descriptions of fields from the docstring of a model to its schema."""
    start, said = described(inspect.getdoc(model) or "", "Attributes")
    schema["description"] = " ".join(start.split())
    for name in said.keys() & model.model_fields.keys():
        key = model.model_fields[name].alias or name
        schema["properties"][key]["description"] = said[name]


def described(doc: str, section: str) -> tuple[str, dict[str, str]]:
    """Return the text of a docstring before a section, and what the section says of each name."""
    start, _, rest = doc.partition(f"{section}:\n")
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", rest, re.MULTILINE)
    return start, {name: " ".join(said.split()) for name, said in found}


def loss_schema(params: type[LossParams]) -> dict[str, Any]:
    """Return the JSON Schema of the settings of a loss, with what its docstring says of them."""
    schema = params.model_json_schema()
    schema["description"], said = described(params.__doc__ or "", "Args")
    for name in said.keys() & schema["properties"].keys():
        schema["properties"][name]["description"] = said[name]
    return schema


def _with_short_forms(schema: Any, named: set[str]) -> Any:
    """Return a schema in which the string x is short for {name: x} in each entry with a name."""
    if isinstance(schema, list):
        return [_with_short_forms(part, named) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _with_short_forms(part, named) for key, part in schema.items()}
    if found.get("$ref") in named:
        found["anyOf"] = [{"type": "string"}, {"$ref": found.pop("$ref")}]
    return found


def _loss(params: type[LossParams]) -> dict[str, Any]:
    """Return the schema of a loss with its parameters: a value each, or a list of values."""
    schema = loss_schema(params)
    fields = {
        name: {"anyOf": [field, {"type": "array", "items": field, "minItems": 1}]}
        | {key: field[key] for key in ("default", "description") if key in field}
        for name, field in schema["properties"].items()
        if name != "name"
    }
    return {
        "title": params.label,
        "description": schema["description"].strip(),
        "type": "object",
        "properties": {"name": {"const": params.__name__}, **fields},
        "required": [name for name in schema.get("required", []) if name != "name"],
        "additionalProperties": False,
    }
