"""From a YAML file to trials: an experiment, its grid, and the plan.

recipe < base < grid < --set  ->  Trial (validated)  ->  Plan (unique, teachers first)
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from pld_ray.errors import InputError, nearest
from pld_ray.losses import REGISTRY
from pld_ray.merging import merge, named, nest
from pld_ray.reading import parse_yaml, read_mapping
from pld_ray.space import Search
from pld_ray.spec import Model, Part, Resources, Trial, Weights, validated


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


class TeacherEntry(Part):
    """What YAML says of a teacher.

    weights: "train" (train it under the experiment's base settings, changed by `train`),
    "pretrained" (timm's; the default for a name with a tag) or a safetensors file. logits: kept in
    the bank as float16 or float32, or computed "live" in every step. views: how many different
    augmentations of an image the students see; default: one an epoch.
    """

    name: str
    args: dict[str, Any] = {}
    weights: str = ""
    train: dict[str, Any] = {}
    logits: Literal["float16", "float32", "live"] = "float16"
    views: int | None = Field(None, ge=1)


class Cell(NamedTuple):
    """One point of the grid: a trial, and the teacher named there even if its loss needs none."""

    trial: Trial
    teacher: str | None


@dataclass(frozen=True)
class Plan:
    """The cells of an experiment and the unique trials behind them, teachers first.

    searched: trials of a search, which no table shows. points: of cells that a search has chosen,
    the trials by which tables name them; they stand for points of the grid.
    """

    experiment: Experiment
    cells: tuple[Cell, ...]
    searched: tuple[Trial, ...] = ()
    points: tuple[Trial, ...] | None = None

    @cached_property
    def originals(self) -> tuple[Cell, ...]:
        """What the cells of a miniature stand for, one by one; else the cells themselves."""
        original = self.experiment.miniature_of
        if original is None or original.search is not None:
            return self.cells
        return plan(original).cells

    @cached_property
    def shown(self) -> tuple[Trial, ...]:
        """For each cell the trial by which tables name it."""
        return self.points or tuple(cell.trial for cell in self.cells)

    @cached_property
    def trials(self) -> dict[str, Trial]:
        """Unique trials by id: teachers first, a teacher's own teacher before it."""
        found: dict[str, Trial] = {}

        def add(trial: Trial) -> None:
            if isinstance(trial.teacher, Trial):
                add(trial.teacher)
            found.setdefault(trial.id, trial)

        for trial in (*self.searched, *(cell.trial for cell in self.cells)):
            add(trial)
        teachers = {t.teacher.id for t in found.values() if isinstance(t.teacher, Trial)}
        return dict(sorted(found.items(), key=lambda item: item[0] not in teachers))

    @cached_property
    def labels(self) -> dict[str, str]:
        """A name for people of each trial: of namesakes, with the settings in which they differ."""
        alike: dict[str, list[Trial]] = {}
        for trial in self.trials.values():
            alike.setdefault(trial.label, []).append(trial)
        found = {}
        for label, trials in alike.items():
            flat = [{"teacher": trial.teacher_name, **trial.flat} for trial in trials]
            differ = [f for f in flat[0] if len({str(settings.get(f)) for settings in flat}) > 1]
            for trial, settings in zip(trials, flat, strict=True):
                said = "".join(f" {f} {settings[f]}" for f in differ if settings.get(f) is not None)
                found[trial.id] = label + said
        return {key: found[key] for key in self.trials}

    @cached_property
    def teacher_ids(self) -> set[str]:
        """Ids of the trials that teach another one of this plan."""
        return {t.teacher.id for t in self.trials.values() if isinstance(t.teacher, Trial)}


# ---------------------------------------------------------------- YAML to experiment


def experiments_folder() -> Path:
    """Where the shipped experiments lie: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).parent
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
        fields, rows = _axis(key, grid[key], experiment.name)
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


# ---------------------------------------------------------------- expanding

Settings = list[tuple[str, Any]]  # fields and their values; the later ones win


def plan(experiment: Experiment) -> Plan:
    """Expand an experiment: every combination of its grid, for every seed.

    A grid key is a field ("loss.temperature"), or several at once ("teacher, student") whose
    values are lists of as many. `loss.PARAMETER` is left out for the losses that have none such.
    """
    cells: list[Cell] = []
    for settings in combinations(experiment):
        cells += build(experiment, settings, experiment.seeds)
    return Plan(experiment, tuple(cells))


def combinations(experiment: Experiment) -> list[Settings]:
    """What the grid says of each of its points; the loss comes before its parameters."""
    where = experiment.name
    axes = [_axis(key, values, where) for key, values in experiment.grid.items()]
    if not any(fields == ("loss",) for fields, _ in axes):
        axes.append((("loss",), [(loss,) for loss in _each(experiment.base.get("loss"))]))
    axes.sort(key=lambda axis: min(field.count(".") for field in axis[0]))
    found: list[Settings] = [
        [
            (field, value)
            for (fields, _), values in zip(axes, combination, strict=True)
            for field, value in zip(fields, values, strict=True)
        ]
        for combination in itertools.product(*(values for _, values in axes))
    ]
    fields = {field for settings in found for field, _ in settings}
    _check_loss_parameters(experiment, found, fields | experiment.overrides.keys())
    return found


def _check_loss_parameters(
    experiment: Experiment, points: list[Settings], fields: Iterable[str]
) -> None:
    """InputError for a field loss.PARAMETER that none of the experiment's losses has."""
    losses = {_loss_name([*settings, *experiment.overrides.items()]) for settings in points}
    if unknown := losses - REGISTRY.keys():  # the trial itself will say so
        return
    names = {name for loss in losses - unknown for name in REGISTRY[loss].model_fields}
    for field in fields:
        first, _, parameter = field.partition(".")
        if first == "loss" and parameter and parameter not in names:
            raise InputError(
                f"{experiment.name}: {field}: none of its losses ({', '.join(sorted(losses))}) "
                f"has it; {nearest(parameter, names - {'name'})}"
            )


def _loss_name(settings: Settings) -> str:
    name = ""
    for field, value in settings:
        if field in ("loss", "loss.name"):
            loss = named("loss", value) if field == "loss" else {"name": value}
            name = str(loss.get("name", name)) if isinstance(loss, dict) else name
    return name


def build(
    experiment: Experiment, settings: Settings, seeds: Iterable[int], base: Mapping[str, Any] = {}
) -> list[Cell]:
    """The cells of one point of the grid; `base` is merged over the experiment's."""
    raw = merge(experiment.base, base)
    for field, value in [*settings, *experiment.overrides.items()]:
        first, _, parameter = field.partition(".")
        if first == "loss" and parameter and parameter != "name":
            name = (named("loss", raw.get("loss")) or {}).get("name")
            if name in REGISTRY and parameter not in REGISTRY[name].model_fields:
                continue
        raw = merge(raw, nest(field, value))
    taught = _teacher(raw.pop("teacher", None), raw, experiment)
    return [_cell(raw | {"seed": seed}, taught, experiment.name) for seed in seeds]


def _axis(key: str, values: Any, where: str) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """A grid entry as (fields, rows); a row holds one value for each field."""
    fields = tuple(field.strip() for field in key.split(","))
    if not isinstance(values, list) or not values:
        raise InputError(f"{where}: grid.{key} is {values!r}: expected a list of values")
    if fields == ("loss",):
        return fields, [(loss,) for value in values for loss in _each(value)]
    if len(fields) == 1:
        return fields, [(value,) for value in values]
    for row in values:
        if not isinstance(row, list) or len(row) != len(fields):
            raise InputError(
                f"{where}: grid.{key} has {row!r}: expected a list of {len(fields)} values"
            )
    return fields, [tuple(row) for row in values]


def _each(loss: Any) -> Iterator[Any]:
    """A loss entry with lists inside as the losses it stands for."""
    if not isinstance(loss, dict):
        yield loss
        return
    lists = [v if isinstance(v, list) else [v] for v in loss.values()]
    for values in itertools.product(*lists):
        yield dict(zip(loss, values, strict=True))


def _teacher(entry: Any, raw: dict[str, Any], experiment: Experiment) -> dict[str, Any]:
    """The fields of a trial that YAML's teacher stands for, for a student with settings `raw`."""
    if entry is None:
        return {}
    where = f"{experiment.name}: teacher"
    teacher = validated(TeacherEntry, named("teacher", entry), where)
    taught = {"teacher_logits": teacher.logits, "views": teacher.views}
    weights = teacher.weights or ("pretrained" if "." in teacher.name else "train")
    if weights == "pretrained":
        return {"teacher": Weights(name=teacher.name, args=teacher.args, weights=weights), **taught}
    if weights != "train":
        fixed = Weights(
            name=teacher.name,
            args=teacher.args,
            weights=weights,
            sha256=_sha256(weights, where),
        )
        return {"teacher": fixed, **taught}
    base = {key: value for key, value in experiment.base.items() if key != "teacher"}
    for field, value in experiment.overrides.items():
        if field.partition(".")[0] not in ("loss", "student", "teacher"):
            base = merge(base, nest(field, value))
    settings = {"student": {"name": teacher.name, "args": teacher.args}, "loss": "ce", "seed": 0}
    base |= settings | {"data": raw.get("data")}
    base = merge(base, teacher.train)
    above = _teacher(base.pop("teacher", None), base, experiment)
    return {"teacher": _cell(base, above, experiment.name).trial, **taught}


def _cell(raw: dict[str, Any], taught: dict[str, Any], where: str) -> Cell:
    """The validated trial of one cell, without what makes no difference to it.

    A loss that needs no teacher gets none, but the same views of the images as the others; one that
    compares features reads no kept logits.
    """
    for field in ("teacher_logits", "views"):
        if field in raw:
            raise InputError(f"{where}: {field}: set teacher.{field.removeprefix('teacher_')}")
    trial = validated(Trial, raw | taught, where)
    unused: dict[str, Any] = {}
    if not trial.loss.needs_teacher:
        unused["teacher"] = None
    if not trial.loss.needs_teacher or trial.loss.needs_features:
        unused["teacher_logits"] = "float16"
    if not trial.data.augmented or (trial.views or 0) >= trial.epochs:
        unused["views"] = None
    return Cell(trial.model_copy(update=unused) if unused else trial, trial.teacher_name)


def _sha256(path: str, where: str) -> str:
    try:
        state = Path(path).stat()
        return _digest(path, state.st_mtime_ns, state.st_size)
    except OSError as error:
        raise InputError(
            f'{where}.weights is {path!r}: expected "train", "pretrained" or a safetensors file '
            f"({error.strerror})"
        ) from None


@cache
def _digest(path: str, mtime: int, size: int) -> str:
    """Read once however many cells name the file; anew when it has changed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
