"""Experiments: from a YAML file or from Python, with its recipe and the overrides.

recipe < base < grid < rules < --set  ->  Trial (validated)  ->  Plan (unique, teachers first)
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from pld_ray import plugins
from pld_ray.config.grid import axis
from pld_ray.config.merge import merge, named, nest
from pld_ray.config.parts import Data, Model, Resources, Seeds
from pld_ray.config.paths import absolute_paths, absolute_plugin
from pld_ray.config.rules import Rule
from pld_ray.config.search_space import Search
from pld_ray.config.trial import SEEDS
from pld_ray.config.validation import Part, sentence, validated
from pld_ray.config.yaml_files import parse_yaml, read_mapping
from pld_ray.errors import InputError, nearest


class Smoke(Part):
    """Settings that shrink an experiment to a miniature with the same cells (`--smoke`).

    Teachers are always trained in a miniature, because existing weights do not fit the small
    networks. Logits stored as top64 are stored in float16, because miniatures have few classes.

    Attributes:
        base: Settings that are merged over the experiment's `base`.
        grid: Entries that replace those of the experiment's `grid`. Each has as many values as
            the entry that it replaces.
        models: The networks that replace others, by the name of the replaced network (without
            timm's tag).
        search: Settings that are merged over the experiment's `search`.
    """

    base: dict[str, Any] = {"epochs": 2, "data": {"limit": 256}, "workers": 1}
    grid: dict[str, list[Any]] = {}
    models: dict[str, Model] = {}
    search: dict[str, Any] = {}


class _Sentences(type(Part)):  # type: ignore[misc]
    """Makes `Experiment(...)` raise InputError with one sentence; reading a file names the file."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            raise InputError(f"Experiment: {sentence(error, Experiment)}") from None


def _kind_of_seeds(value: Any) -> str:
    return "<rule>" if isinstance(value, dict | Seeds) else "<list>"


class Experiment(Part, metaclass=_Sentences):
    """A question, the settings that all trials share, and those that vary: one YAML file.

    In Python, settings are plain values and mappings, as in YAML, or typed parts, such as
    `pld_ray.config.parts.Data`.

    Attributes:
        name: The name of the experiment; by default that of its file, with letters, digits and
            hyphens.
        title: The title of the experiment for people.
        note: A text that is printed under the tables.
        recipe: The name of a YAML file in `recipes/` whose settings `base` overrides.
        base: The settings of a trial that all trials share.
        grid: The fields that vary, and their values (see `planning.plan`).
        rules: Settings for those cells that have other settings, such as another learning rate for
            some networks. They override `base` and `grid`.
        methods: The part of the grid that is wanted: the names of losses, such as [kd, pld], which
            may have the wildcards * and ?. By default, all.
        pairs: The part of the grid that is wanted: teacher and student, such as
            ["resnet56:resnet20"], which may have the wildcards * and ?. The tag of a teacher's
            weights and the ending _cifar may be left out. By default, all.
        plugins: Python files, or names of installed packages, with losses, networks and datasets of
            your own (see `pld_ray.plugins`).
        reference: The method with which tables, statistics and figures compare the others: the
            name of a loss, or a method as tables name it. Of several settings of a loss, the first
            is the reference. The default is PLD if the experiment has it, else the first method.
        seeds: The seeds for which each cell of the grid runs: a list, or the rule by which seeds
            are added until the order of the methods is decided (see `parts.Seeds`). With a search,
            these are the seeds on which the best settings are compared; the default is then an
            empty list.
        resources: The resources that trials request from the cluster.
        search: The search for the best settings of each cell.
        overrides: Values of trial fields that override `base` and `grid`; `--set` adds to them.
        smoke: The settings of the miniature.
        miniature_of: The original experiment if this one is a miniature.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    title: str = ""
    note: str = ""
    recipe: str | None = None
    plugins: list[str] = []
    base: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}
    rules: list[Rule] = []
    methods: list[str] = []
    pairs: list[str] = []
    reference: str = ""
    seeds: Annotated[
        Annotated[list[Annotated[int, Field(ge=0, lt=SEEDS)]], Tag("<list>")]
        | Annotated[Seeds, Tag("<rule>")],
        Discriminator(_kind_of_seeds),
    ] = [0]
    resources: Resources = Resources()
    search: Search | None = None
    overrides: dict[str, Any] = {}
    smoke: Smoke = Smoke()
    miniature_of: Experiment | None = None
    _file: Path | None = PrivateAttr(None)
    _identify: Callable[[Data], str | None] | None = PrivateAttr(None)

    @property
    def file(self) -> Path | None:
        """The YAML file of the experiment, or None if it was made in Python."""
        return self._file

    @property
    def all_seeds(self) -> list[int]:
        """The seeds for which a cell of the grid runs, or can run if they are added by a rule."""
        return self.seeds.all if isinstance(self.seeds, Seeds) else self.seeds

    @property
    def looks(self) -> tuple[int, ...]:
        """The numbers of seeds at which methods are compared; empty if the seeds are a list."""
        return self.seeds.looks if isinstance(self.seeds, Seeds) else ()

    def identified(self, identify: Callable[[Data], str | None]) -> Experiment:
        """Return a copy whose trials are identified by what their data holds.

        Args:
            identify: Returns the fingerprint of a dataset, or None if it has none or is not known.
        """
        copy = self.model_copy()
        copy._identify = identify
        return copy

    def fingerprint(self, data: Data) -> str | None:
        """Return the fingerprint of a dataset, or None if it has none or is not known."""
        return None if self._identify is None else self._identify(data)

    @model_validator(mode="before")
    @classmethod
    def _raw(cls, raw: Any) -> Any:
        if isinstance(raw, dict):
            raw = {key: raw[key] if key == "miniature_of" else _plain(raw[key]) for key in raw}
        if isinstance(raw, dict) and not isinstance(raw.get("seeds", []), list | dict):
            raise ValueError(
                f"seeds is {raw['seeds']!r}: expected a list, such as [0, 1, 2], or a rule, such "
                "as {min: 3, max: 20, until: decided}"
            )
        if isinstance(raw, dict) and raw.get("search") is not None:
            return {"seeds": []} | raw
        return raw

    @field_validator("plugins")
    @classmethod
    def _load_plugins(cls, sources: list[str]) -> list[str]:
        plugins.load_installed()
        sources = [absolute_plugin(source) for source in sources]
        for source in sources:
            plugins.load(source)
        return sources

    @model_validator(mode="after")
    def _seeds(self) -> Experiment:
        if isinstance(self.seeds, Seeds) and self.seeds.all[-1] >= SEEDS:
            raise ValueError(f"seeds.first is {self.seeds.first}: the last seed is {SEEDS} or more")
        if self.search is None and not self.seeds:
            raise ValueError("seeds is []: expected at least one seed")
        if self.search is not None and self.search.seed in self.all_seeds:
            raise ValueError(
                f"search.seed is {self.search.seed}, which is also one of seeds: the best settings "
                "must be compared on seeds that the search does not use"
            )
        return self


def _plain(value: Any) -> Any:
    """Return plain settings: typed parts, tuples, paths and numbers of numpy are converted."""
    if isinstance(value, BaseModel):
        value = value.model_dump(by_alias=True, exclude_unset=True)
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return _plain(value.tolist()) if hasattr(value, "tolist") else value  # of numpy


def experiments_folder() -> Path:
    """Return the folder of the shipped experiments.

    The folder is inside the package in an installed wheel, and beside the package in a checkout.
    """
    package = Path(__file__).parents[1]
    inside = package / "experiments"
    return inside if inside.is_dir() else package.parent / "experiments"


Overrides = Iterable[str] | Mapping[str, Any]


def load_experiment(
    source: str | os.PathLike[str] | Experiment, overrides: Overrides = (), smoke: bool = False
) -> Experiment:
    """Load an experiment, with its recipe and overrides.

    Args:
        source: The path of a YAML file, the name of a shipped experiment, or an experiment. If
            that was made in Python, its relative paths are relative to the working folder.
        overrides: A mapping of fields to values, or texts of the form "field=value" whose value is
            parsed as YAML. A field of a trial, such as "loss.temperature", overrides `base` and
            `grid`. A field of the experiment itself ("seeds", "grid.FIELD", "resources.FIELD") is
            set in the experiment.
        smoke: Whether to return the miniature of the experiment.

    Returns:
        The validated experiment.

    Raises:
        InputError: The file does not exist or is not valid, or an override is not valid.
    """
    if isinstance(source, Experiment):
        experiment, file = source, source.file
        where, folder = source.name, file.parent if file else Path.cwd()
        if source.miniature_of is not None and (smoke or overrides):
            raise InputError(
                f"{where} is a miniature already: give the experiment that it is made from, with "
                "smoke and the overrides"
            )
    else:
        file = _find_experiment(source).absolute()
        where, folder = str(source), file.parent
        raw = {"name": name_of(file), **absolute_paths(read_mapping(file), folder)}
        experiment = validated(Experiment, raw, where)
    changed = experiment.model_dump(by_alias=True, exclude_unset=True)
    if file is None:
        changed = absolute_paths(changed, folder)
    found_overrides = list(_overrides(overrides))
    named_recipes = [value for field, value in found_overrides if field == "recipe"]
    recipe_name = (named_recipes or [experiment.recipe])[-1]
    if recipe_name is not None:
        recipe_file = _find_recipe(str(recipe_name), folder, where)
        recipe = absolute_paths(read_mapping(recipe_file), recipe_file.absolute().parent)
        changed["smoke"] = merge(recipe.pop("smoke", {}), changed.get("smoke", {}))
        changed["base"] = merge(recipe, changed.get("base", {}))
    everywhere = dict(changed.get("overrides", {}))
    for field, value in found_overrides:
        first, _, rest = field.partition(".")
        if first in ("overrides", "miniature_of"):
            raise InputError(f"--set {field}: expected the field of a trial or of an experiment")
        if first == "grid" and rest:
            changed["grid"] = changed.get("grid", {}) | {rest: value}
        elif first in Experiment.model_fields:
            changed = merge(changed, nest(field, value))
        else:
            everywhere[field] = value
    if set(everywhere) & {"seed"}:
        raise InputError("--set seed: set seeds instead, which is a list, such as seeds=[0,1,2]")
    changed["overrides"] = everywhere
    found = validated(Experiment, changed, where)
    found._file = file
    return miniature(found) if smoke else found


def _overrides(given: Overrides) -> Iterator[tuple[str, Any]]:
    """Yield the fields and values of overrides, with absolute paths."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InputError(f"overrides is {given!r}: expected a list of texts, or a mapping")
    for key in given:
        if not isinstance(key, str):
            raise InputError(f"overrides has {key!r}: expected the text of a field, such as epochs")
    if isinstance(given, Mapping):
        for field, value in given.items():
            yield field, absolute_paths({field: _plain(value)}, Path.cwd())[field]
        return
    for item in given:
        field, equals, text = item.partition("=")
        field = field.strip()
        if not equals or not field:
            raise InputError(f"--set {item}: expected FIELD=VALUE, such as loss.temperature=2")
        yield field, absolute_paths({field: parse_yaml(text, f"--set {item}")}, Path.cwd())[field]


def _find_experiment(source: str | os.PathLike[str]) -> Path:
    """Return the file of an experiment by its path, or by its name among the shipped ones."""
    path = Path(source)
    if not path.is_file() and path.suffix not in (".yaml", ".yml"):
        path = experiments_folder() / f"{source}.yaml"
    if not path.is_file():
        names = [file.stem for file in experiments_folder().glob("*.yaml")]
        hint = nearest(str(source), names)
        raise InputError(f"{str(source)!r} is not a file and not a shipped experiment: {hint}")
    return path


def name_of(path: Path) -> str:
    """Return the name of an experiment by its file: other characters become hyphens.

    Raises:
        InputError: The name of the file has no letter or digit of ASCII.
    """
    ascii_only = unicodedata.normalize("NFKD", path.stem).encode("ascii", "ignore").decode()
    name = re.sub("[^A-Za-z0-9._-]+", "-", ascii_only).strip("-._")
    if not name:
        raise InputError(
            f"{path}: cannot be turned into a name of letters and digits: set name: in the file"
        )
    return name


def miniature(experiment: Experiment) -> Experiment:
    """Shrink an experiment by its `smoke` settings, so that a laptop can run it.

    The miniature has the same cells as the original.

    Raises:
        InputError: An entry of `smoke.grid` has another number of values than that of `grid`.
    """
    smoke = experiment.smoke
    grid = experiment.grid | smoke.grid
    for key, values in smoke.grid.items():
        if len(values) != len(experiment.grid.get(key, [])):
            raise InputError(
                f"{experiment.name}: smoke.grid.{key} has {len(values)} values: expected as many "
                f"values as grid.{key} has, {len(experiment.grid.get(key, []))}"
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
    """Return the value of a field in a miniature: replaced for networks, else unchanged."""
    entry = named(field, value)
    if field not in ("student", "teacher") or not isinstance(entry, dict) or "name" not in entry:
        return value
    name = str(entry["name"]).split(".")[0]
    kept = {key: part for key, part in entry.items() if key != "weights"} | {"name": name}
    if name in models:
        kept |= {"name": models[name].name, "args": models[name].args}
    if kept.get("logits") == "top64":
        kept["logits"] = "float16"
    return kept


def _find_recipe(name: str, folder: Path, where: str) -> Path:
    """Return the path of a recipe: beside the experiment, else among the shipped ones."""
    folders = [folder / "recipes", experiments_folder() / "recipes"]
    for folder in folders:
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    names = [file.stem for folder in folders for file in folder.glob("*.yaml")]
    raise InputError(f"{where}: recipe {name!r} does not exist; {nearest(name, names)}")
