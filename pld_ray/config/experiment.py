"""From a YAML file to trials: an experiment, its grid, and the plan.

recipe < base < grid < --set  ->  Trial (validated)  ->  Plan (unique, teachers first)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from pld_ray.config.grid import axis
from pld_ray.config.merge import merge, named, nest
from pld_ray.config.search_space import Search
from pld_ray.config.trial import Model, Resources
from pld_ray.config.validation import Part, validated
from pld_ray.config.yaml_files import parse_yaml, read_mapping
from pld_ray.errors import InputError, nearest


class Smoke(Part):
    """How an experiment is shrunk to a miniature with the same cells (`--smoke`).

    base is merged over the experiment's, and search over its search; grid replaces entries of as
    many values, models replaces networks by name (without timm's tag). Teachers are trained, since
    no weights fit.
    """

    base: dict[str, Any] = {"epochs": 2, "data": {"limit": 256}, "workers": 1}
    grid: dict[str, list[Any]] = {}
    models: dict[str, Model] = {}
    search: dict[str, Any] = {}


class Experiment(Part):
    """One YAML file: a question, the settings all its trials share, and what it varies."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    title: str = ""
    note: str = ""  # printed under its tables
    recipe: str | None = None
    base: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}
    seeds: list[int] = [0]
    resources: Resources = Resources()
    search: Search | None = None
    overrides: dict[str, Any] = {}  # of trial fields, over base and grid; as --set makes them
    smoke: Smoke = Smoke()
    miniature_of: Experiment | None = None

    @model_validator(mode="before")
    @classmethod
    def _fresh_seeds(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("search") is not None:
            return {"seeds": []} | raw
        return raw

    @model_validator(mode="after")
    def _seeds(self) -> Experiment:
        if self.search is None and not self.seeds:
            raise ValueError("seeds is []: expected at least one")
        if self.search is not None and self.search.seed in self.seeds:
            raise ValueError(
                f"search.seed is {self.search.seed}, and so is one of seeds: the best settings are "
                "compared on seeds that chose none of them"
            )
        return self


# ---------------------------------------------------------------- YAML to experiment


def experiments_folder() -> Path:
    """Where the shipped experiments lie: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "experiments"
    return inside if inside.is_dir() else package.parent / "experiments"


def load_experiment(
    source: str | Path, overrides: tuple[str, ...] = (), smoke: bool = False
) -> Experiment:
    """The experiment in a YAML file, or the shipped one of that name, with `--set` overrides.

    smoke: its miniature. An override is "field=value", the value read as YAML. It replaces what
    base and grid say of the field. A field of the experiment itself (seeds, grid.FIELD,
    resources.FIELD) is set there.
    """
    path = Path(source)
    if not path.is_file() and path.suffix not in (".yaml", ".yml"):
        path = experiments_folder() / f"{source}.yaml"
    if not path.is_file():
        names = [file.stem for file in experiments_folder().glob("*.yaml")]
        hint = nearest(str(source), names)
        raise InputError(f"no experiment {str(source)!r} (neither a file nor shipped): {hint}")
    raw = {"name": path.stem, **read_mapping(path)}
    experiment = validated(Experiment, raw, str(path))
    base, shrunk = experiment.base, raw.get("smoke", {})
    if experiment.recipe is not None:
        recipe = read_mapping(_find_recipe(experiment.recipe, path))
        shrunk = merge(recipe.pop("smoke", {}), shrunk)
        base = merge(recipe, base)
    changed = experiment.model_dump(by_alias=True, exclude_unset=True)
    changed |= {"base": base, "smoke": shrunk}
    everywhere = dict(experiment.overrides)
    for item in overrides:
        field, equals, text = item.partition("=")
        field = field.strip()
        if not equals or not field:
            raise InputError(f"--set {item}: expected FIELD=VALUE, such as loss.temperature=2")
        value = parse_yaml(text, f"--set {item}")
        first, _, rest = field.partition(".")
        if first == "grid" and rest:
            changed["grid"] = changed["grid"] | {rest: value}
        elif first in Experiment.model_fields:
            changed = merge(changed, nest(field, value))
        else:
            everywhere[field] = value
    if set(everywhere) & {"seed"}:
        raise InputError("--set seed: set seeds, a list, such as seeds=[0,1,2]")
    changed["overrides"] = everywhere
    found = validated(Experiment, changed, str(path))
    return miniature(found) if smoke else found


def miniature(experiment: Experiment) -> Experiment:
    """The experiment shrunk as its `smoke` says: the same cells, so small that a laptop runs it."""
    smoke = experiment.smoke
    grid = experiment.grid | smoke.grid
    for key, values in smoke.grid.items():
        if len(values) != len(experiment.grid.get(key, [])):
            raise InputError(
                f"{experiment.name}: smoke.grid.{key} has {len(values)} values: expected as many "
                f"as grid.{key} has, {len(experiment.grid.get(key, []))}"
            )
    for key in grid:
        fields, rows = axis(key, grid[key], experiment.name)
        if {"student", "teacher"} & set(fields):
            small = [
                [_smaller(f, v, smoke.models) for f, v in zip(fields, row, strict=True)]
                for row in rows
            ]
            grid[key] = small if len(fields) > 1 else [row[0] for row in small]
    base = merge(experiment.base, smoke.base)
    search = experiment.search
    if search is not None and smoke.search:
        raw = merge(search.model_dump(by_alias=True, exclude_unset=True), smoke.search)
        search = validated(Search, raw, f"{experiment.name}: smoke.search")
    return experiment.model_copy(
        update={
            "name": f"{experiment.name}-smoke",
            "title": f"{experiment.title or experiment.name} (miniature)",
            "base": {field: _smaller(field, base[field], smoke.models) for field in base},
            "grid": grid,
            "search": search,
            "resources": Resources(),
            "miniature_of": experiment.model_copy(update={"overrides": {}}),
        }
    )


def _smaller(field: str, value: Any, models: dict[str, Model]) -> Any:
    """What stands for a student or teacher in a miniature; other fields as they are."""
    entry = named(field, value)
    if field not in ("student", "teacher") or not isinstance(entry, dict) or "name" not in entry:
        return value
    name = str(entry["name"]).split(".")[0]
    kept = {key: part for key, part in entry.items() if key != "weights"} | {"name": name}
    if name in models:
        kept |= {"name": models[name].name, "args": models[name].args}
    return kept


def _find_recipe(name: str, experiment: Path) -> Path:
    folders = [experiment.parent / "recipes", experiments_folder() / "recipes"]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    names = [file.stem for folder in folders for file in folder.glob("*.yaml")]
    raise InputError(f"{experiment}: recipe {name!r} does not exist; {nearest(name, names)}")
