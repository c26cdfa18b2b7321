"""Expands an experiment into its plan: one trial per grid point and seed, without duplicates."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from pydantic import Field

from pld_ray import plugins
from pld_ray.config import rules, selection
from pld_ray.config.experiment import Experiment
from pld_ray.config.grid import axis, each_loss
from pld_ray.config.merge import merge, named, nest
from pld_ray.config.parts import Weights
from pld_ray.config.registry import OPTIMIZERS, SCHEDULES
from pld_ray.config.teacher_files import teacher_file
from pld_ray.config.trial import Trial
from pld_ray.config.validation import Part, validated
from pld_ray.errors import InputError, nearest
from pld_ray.losses import REGISTRY


class TeacherEntry(Part):
    """The entry of a teacher in YAML.

    Attributes:
        name: The name of the network in timm.
        args: Further arguments for `timm.create_model`.
        weights: "train" (train the teacher under the experiment's base settings, changed by
            `train`), "pretrained" (timm's weights), or the path of a file: safetensors, or a state
            dict that `torch.save` wrote. The default is "pretrained" for a name with a tag, else
            "train".
        mean: The mean of each channel, in [0, 1], of the images for which a weights file was
            trained. The default is that of a config.json beside the file, else that of the data.
        std: The standard deviation that belongs to it.
        train: Settings of the teacher's own training, merged over the experiment's `base`.
        logits: The type in which the bank stores the teacher's logits: "float16", "float32", or
            "top64" (in float16, the 64 best ones of each image, which losses take for all logits);
            or "live" to compute them in every step.
        views: The number of different augmentations of an image that the students see; by
            default one per epoch.
    """

    name: str
    args: dict[str, Any] = {}
    weights: str | None = Field(None, min_length=1)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    train: dict[str, Any] = {}
    logits: Literal["float16", "float32", "top64", "live"] = "float16"
    views: int | None = Field(None, ge=1)


class Cell(NamedTuple):
    """One point of the grid, for one seed.

    Attributes:
        trial: The trial to run.
        teacher: The name of the teacher in the grid, even if the trial's loss needs no teacher.
        rules: The numbers of the rules of the experiment that set fields of the trial.
        unruled: The trial as the grid has it, without what rules set; None if no rule applies.
    """

    trial: Trial
    teacher: str | None
    rules: tuple[int, ...] = ()
    unruled: Trial | None = None

    @property
    def shown(self) -> Trial:
        """The trial from which tables take the name of the row.

        What a rule sets belongs to the pair of networks and makes no other method.
        """
        return self.unruled or self.trial


@dataclass(frozen=True)
class Plan:
    """The cells of an experiment and their unique trials, teachers first.

    Attributes:
        experiment: The experiment.
        cells: The points of the grid, for every seed.
        searched: The trials of a search; tables do not show them.
        points: After a search, one trial per cell: the cell as the grid has it, without the values
            that the search has chosen. Tables take the names of rows from these trials.
        kept: The numbers of the cells among those for all seeds, where seeds are added by a rule
            and not all are there; else None.
    """

    experiment: Experiment
    cells: tuple[Cell, ...]
    searched: tuple[Trial, ...] = ()
    points: tuple[Trial, ...] | None = None
    kept: tuple[int, ...] | None = None

    def part(self, kept: Iterable[int]) -> Plan:
        """Return the plan with only some of its cells, of which these are the numbers."""
        kept = tuple(kept)
        points = self.points and tuple(self.points[i] for i in kept)
        return replace(self, cells=tuple(self.cells[i] for i in kept), points=points, kept=kept)

    @cached_property
    def originals(self) -> tuple[Cell, ...]:
        """The original of each cell if this is a plan of a miniature, else the cells themselves."""
        original = self.experiment.miniature_of
        if original is None or original.search is not None:
            return self.cells
        cells = plan(original).cells
        return cells if self.kept is None else tuple(cells[i] for i in self.kept)

    @cached_property
    def shown(self) -> tuple[Trial, ...]:
        """For each cell, the trial from which tables take the name of the row."""
        return self.points or tuple(cell.shown for cell in self.cells)

    @cached_property
    def trials(self) -> dict[str, Trial]:
        """The unique trials by id: teachers come first, each after its own teacher."""
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
        """A readable name for each trial, by id.

        Trials with the same label get the settings in which they differ.
        """
        alike: dict[str, list[Trial]] = {}
        for trial in self.trials.values():
            alike.setdefault(trial.label, []).append(trial)
        found = {}
        said: dict[tuple[int, ...], list[str]] = {}  # alike trials of other seeds differ alike
        for label, trials in alike.items():
            key = tuple(id(trial.flat) for trial in trials)
            if key not in said:
                said[key] = _differences(trials)
            for trial, differs in zip(trials, said[key], strict=True):
                found[trial.id] = label + differs
        return {key: found[key] for key in self.trials}

    @cached_property
    def teacher_ids(self) -> set[str]:
        """The ids of the trials that are the teacher of another trial in this plan."""
        return {t.teacher.id for t in self.trials.values() if isinstance(t.teacher, Trial)}


def _differences(trials: list[Trial]) -> list[str]:
    """Return for each trial the settings in which the trials differ, such as " epochs 3"."""
    if len(trials) == 1:
        return [""]
    flat = [{"teacher": trial.teacher_name, **trial.flat} for trial in trials]
    differ = [f for f in flat[0] if len({str(settings.get(f)) for settings in flat}) > 1]
    return [
        "".join(f" {f} {settings[f]}" for f in differ if settings.get(f) is not None)
        for settings in flat
    ]


Settings = list[tuple[str, Any]]  # fields and their values; later entries override earlier ones


def plan(experiment: Experiment) -> Plan:
    """Expand an experiment: every combination of its grid, for every seed.

    A key of the grid is a field ("loss.temperature") or several fields ("teacher, student"). With
    several fields, each value is a list with one value per field. A field `loss.PARAMETER` does
    not apply to losses without this parameter.

    Args:
        experiment: The experiment to expand.

    Returns:
        The plan, with one cell per combination and seed. Of a part of an experiment (`methods`,
        `pairs`), it has the cells of this part, which are the same as in the whole.

    Raises:
        InputError: A setting of the experiment is not valid.
    """
    cells: list[Cell] = []
    for settings in combinations(experiment):
        cells += build(experiment, settings, experiment.all_seeds)
    check_rules(experiment, cells)
    return Plan(experiment, tuple(cells))


OF_GRID = {"loss", "student", "teacher", "seed"}  # what the rows of tables and pairs are named by
OF_TEACHER = {"teacher.logits", "teacher.views"}  # they leave the teacher as it is


def check_rules(experiment: Experiment, cells: Sequence[Cell]) -> None:
    """Raise InputError for a rule that sets what it must not, or that applies to none of the cells.

    It must not set what varies, or what makes a cell another row: tables name it as the grid does.
    """
    varied = {f for key, values in experiment.grid.items() for f in axis(key, values, "")[0]}
    searched = set() if experiment.search is None else set(experiment.search.space)
    ruled = {(number, cell.trial.loss.name) for cell in cells for number in cell.rules}
    for number, rule in enumerate(experiment.rules):
        losses = {"loss", *(loss for each, loss in ruled if each == number)}
        for field in [*rule.set, *rule.fields]:
            first, _, parameter = field.partition(".")
            # a search names a parameter of one loss NAME.PARAMETER
            names = {f"{loss}.{parameter}" for loss in losses} if first == "loss" else {field}
            where = "grid" if field in varied else "search.space" if names & searched else None
            said = f"{experiment.name}: rules[{number}].set.{field}"
            if where is not None:
                raise InputError(
                    f"{said}: {where} varies this field: expected a field that does not vary"
                )
            if field in rule.fields and (
                field in OF_GRID or (first == "teacher" and field not in OF_TEACHER)
            ):
                raise InputError(
                    f"{said}: a rule changes no loss, network, teacher or seed, because tables "
                    "name a cell as the grid does: expected this field in grid or base, and seeds "
                    "beside them"
                )
    rows: dict[str, Cell] = {}
    for cell in cells if experiment.rules else ():
        other = rows.setdefault(cell.trial.id, cell)
        if other.shown.id != cell.shown.id:
            differ = _differences([other.shown, cell.shown])
            raise InputError(
                f"{experiment.name}: rules{sorted({*other.rules, *cell.rules})} set what the grid "
                f"varies: {other.shown.label}{differ[0]} and {cell.shown.label}{differ[1]} become "
                "one trial; expected fields that do not vary"
            )
    unused = set(range(len(experiment.rules))) - {n for cell in cells for n in cell.rules}
    part = bool(experiment.methods or experiment.pairs)
    if unused and not part and experiment.miniature_of is None:  # a miniature has other networks
        number = min(unused)
        raise InputError(
            f"{experiment.name}: rules[{number}].when is {experiment.rules[number].when}: no cell "
            "has these settings: expected fields and values of this experiment"
        )


def combinations(experiment: Experiment) -> list[Settings]:
    """Return the settings of each point of the grid, with the loss before its parameters.

    Of a part of an experiment, these are the points of this part.

    Raises:
        InputError: An entry of the grid is not valid, none of the losses has a parameter, or
            `methods` or `pairs` names what the experiment does not have.
    """
    found = _points(experiment)
    fields = {field for settings in found for field, _ in settings}
    _check_loss_parameters(experiment, found, fields | experiment.overrides.keys())
    if not (experiment.methods or experiment.pairs):
        return found
    original = experiment.miniature_of or experiment  # a miniature has networks of other names
    overrides = list(experiment.overrides.items())
    kept = selection.chosen(original, [[*point, *overrides] for point in _points(original)])
    return list(itertools.compress(found, kept))


def _points(experiment: Experiment) -> list[Settings]:
    """Return the settings of all points of the grid, with the loss before its parameters."""
    where = experiment.name
    axes = [axis(key, values, where) for key, values in experiment.grid.items()]
    if not any("loss" in fields for fields, _ in axes):
        axes.append((("loss",), [(loss,) for loss in each_loss(experiment.base.get("loss"))]))
    axes.sort(key=lambda axis: min(field.count(".") for field in axis[0]))
    return [
        [
            (field, value)
            for (fields, _), values in zip(axes, combination, strict=True)
            for field, value in zip(fields, values, strict=True)
        ]
        for combination in itertools.product(*(values for _, values in axes))
    ]


def _check_loss_parameters(
    experiment: Experiment, points: list[Settings], fields: Iterable[str]
) -> None:
    """Raise InputError for a field loss.PARAMETER that none of the experiment's losses has."""
    losses = {_loss_name([*settings, *experiment.overrides.items()]) for settings in points}
    if unknown := losses - REGISTRY.keys():  # the validation of the trial reports it
        return
    names = {name for loss in losses - unknown for name in REGISTRY[loss].model_fields}
    for field in fields:
        first, _, parameter = field.partition(".")
        if first == "loss" and parameter and parameter not in names:
            raise InputError(
                f"{experiment.name}: {field}: none of its losses ({', '.join(sorted(losses))}) "
                f"has this parameter; {nearest(parameter, names - {'name'})}"
            )


def _loss_name(settings: Settings) -> str:
    """Return the name of the loss after all settings are applied, or "" if none sets it."""
    name = ""
    for field, value in settings:
        if field in ("loss", "loss.name"):
            loss = named("loss", value) if field == "loss" else {"name": value}
            name = str(loss.get("name", name)) if isinstance(loss, dict) else name
    return name


def build(
    experiment: Experiment, settings: Settings, seeds: Iterable[int], base: Mapping[str, Any] = {}
) -> list[Cell]:
    """Build the cells of one point of the grid.

    Args:
        experiment: The experiment.
        settings: The fields and values of the point.
        seeds: The seeds; there is one cell per seed.
        base: Settings that are merged over the experiment's `base`.

    Returns:
        The cells, in the order of `seeds`.

    Raises:
        InputError: A setting is not valid.
    """
    raw = merge(experiment.base, base)
    if "seed" in raw or any(field == "seed" for field, _ in settings):
        raise InputError(f"{experiment.name}: seed: set seeds beside base instead, a list")
    overrides = list(experiment.overrides.items())
    unruled = _merged(raw, [*settings, *overrides])
    raw, applied = rules.apply(experiment.rules, unruled)
    raw = _merged(raw, overrides if applied else [])
    taught = _teacher(raw.pop("teacher", None), raw, experiment)
    cell, shown = _cell(raw, taught, experiment), None
    if applied:
        unruled.pop("teacher", None)
        with suppress(InputError):  # a rule can set what the settings need to be valid
            shown = _cell(unruled, taught, experiment).trial
    return [Cell(cell.trial.with_seed(seed), cell.teacher, applied, shown) for seed in seeds]


def _merged(raw: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Merge fields over settings; a field `loss.PARAMETER` that the loss has not is left out."""
    for field, value in settings:
        first, _, parameter = field.partition(".")
        if first == "loss" and parameter and parameter != "name":
            name = (named("loss", raw.get("loss")) or {}).get("name")
            if name in REGISTRY and parameter not in REGISTRY[name].model_fields:
                continue
        raw = merge(raw, nest(field, value))
    return raw


def _teacher(entry: Any, raw: dict[str, Any], experiment: Experiment) -> dict[str, Any]:
    """Return the fields of a trial that its teacher entry defines; `raw` are its settings."""
    if entry is None:
        return {}
    where = f"{experiment.name}: teacher"
    teacher = validated(TeacherEntry, named("teacher", entry), where)
    taught = {"teacher_logits": teacher.logits, "views": teacher.views}
    weights = teacher.weights or ("pretrained" if "." in teacher.name else "train")
    if weights in ("train", "pretrained") and (teacher.mean or teacher.std):
        raise InputError(f"{where}.mean and std: only for a weights file, not for {weights!r}")
    if weights != "train" and teacher.train:
        raise InputError(f"{where}.train: only for a teacher to train, not for weights {weights!r}")
    if weights == "pretrained":
        return {"teacher": Weights(name=teacher.name, args=teacher.args, weights=weights), **taught}
    if weights != "train":
        given = teacher.model_dump(include={"mean", "std"}, exclude_none=True)
        known = teacher_file(weights, f"{where}.weights") | given
        known |= {"name": teacher.name, "args": teacher.args}
        return {"teacher": validated(Weights, known, where), **taught}
    # a metric of the students does not make the teacher another trial
    own = ("teacher", "metrics")
    base = {key: value for key, value in experiment.base.items() if key not in own}
    for field, value in experiment.overrides.items():
        if field.partition(".")[0] not in ("loss", "student", *own):
            base = merge(base, nest(field, value))
    settings = {"student": {"name": teacher.name, "args": teacher.args}, "loss": "ce", "seed": 0}
    base |= settings | {"data": raw.get("data")}
    base = merge(base, teacher.train)
    above = _teacher(base.pop("teacher", None), base, experiment)
    return {"teacher": _cell(base, above, experiment).trial, **taught}


def _cell(raw: dict[str, Any], taught: dict[str, Any], experiment: Experiment) -> Cell:
    """Return the validated cell, with the fields that do not affect its trial set to defaults.

    Its data gets its fingerprint.

    A loss that needs no teacher gets no teacher, but it keeps the same views of the images as the
    other losses. A loss that compares features reads no stored logits.
    """
    for field in ("teacher_logits", "views"):
        if field in raw:
            raise InputError(
                f"{experiment.name}: {field}: set teacher.{field.removeprefix('teacher_')} instead"
            )
    if "plugins" in raw:
        raise InputError(f"{experiment.name}: plugins: expected beside base, not in it")
    trial = validated(Trial, raw | taught, experiment.name)
    changed: dict[str, Any] = {}
    if fingerprint := experiment.fingerprint(trial.data):
        changed["data"] = trial.data.model_copy(update={"fingerprint": fingerprint})
    for field, registry in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        part = getattr(trial, field)
        if part.args and part.name in registry:
            args = registry[part.name].identity(part.args, f"{experiment.name}: {field}.args")
            changed[field] = part.model_copy(update={"args": args})
    if own := plugins.used(trial.provided):
        changed["plugins"] = {name: plugin.digest for name, plugin in sorted(own.items())}
    if not trial.loss.needs_teacher:
        changed["teacher"] = None
    if not trial.loss.needs_teacher or trial.loss.needs_features:
        changed["teacher_logits"] = "float16"
    augmented = any(each.data.augmented for each in trial.each_view)
    if not augmented or (trial.views or 0) >= trial.epochs:
        changed["views"] = None
    return Cell(trial.model_copy(update=changed) if changed else trial, trial.teacher_name)
