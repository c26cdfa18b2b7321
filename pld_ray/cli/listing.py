"""The command `pld-ray list`: what an experiment can name."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any

import typer

from pld_ray.cli.options import Plugins, app
from pld_ray.errors import InputError, nearest


class Kind(StrEnum):
    """What can be listed."""

    losses = "losses"
    networks = "networks"
    datasets = "datasets"
    optimizers = "optimizers"
    schedules = "schedules"
    metrics = "metrics"
    experiments = "experiments"


@app.command("list")
def list_names(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    word: Annotated[
        str, typer.Argument(help="List only what has this word in its name or description.")
    ] = "",
    plugin: Plugins = None,
) -> None:
    """List what an experiment can name: a description, and parameters with defaults and bounds."""
    found = dict(_FIND[kind]())
    lines = {
        name: said
        for name, (said, *_) in found.items()
        if word.lower() in name.lower() or word.lower() in said.lower()
    }
    if not lines:
        raise InputError(f"list {kind}: nothing has {word!r} in it; {nearest(word, found)}")
    width = min(max(map(len, lines)), 32)
    for name, said in lines.items():
        typer.echo(f"{name:{width}}  {said}".rstrip())
        for parameter in found[name][1:]:
            typer.echo(f"{'':{width}}    {parameter}")


def _losses() -> Iterator[tuple[str, tuple[str, ...]]]:
    from pld_ray.losses import REGISTRY

    for name, params in sorted(REGISTRY.items()):
        fields = params.model_json_schema()["properties"]
        parameters = [_parameter(key, fields[key]) for key in fields if key != "name"]
        yield name, (f"{params.label}: {_summary(params)}", *parameters)


def _parameter(name: str, schema: dict[str, Any]) -> str:
    """Describe a parameter by its JSON schema, such as "temperature = 4.0 (above 0)"."""
    bounds = []
    for key, said in (
        ("minimum", "at least"),
        ("exclusiveMinimum", "above"),
        ("maximum", "at most"),
        ("exclusiveMaximum", "below"),
    ):
        if key in schema:
            bounds.append(f"{said} {schema[key]}")
    if "enum" in schema:
        bounds.append(", ".join(map(str, schema["enum"])))
    default = f" = {schema['default']}" if "default" in schema else ", which has no default"
    return f"{name}{default}" + (f" ({', '.join(bounds)})" if bounds else "")


def _networks() -> Iterator[tuple[str, tuple[str, ...]]]:
    import timm

    import pld_ray.models  # noqa: F401 - registers our networks

    for name in timm.list_models():
        maker = timm.model_entrypoint(name)
        ours = not maker.__module__.startswith("timm.")
        yield name, (_summary(maker) if ours else "",)


def _datasets() -> Iterator[tuple[str, tuple[str, ...]]]:
    from pld_ray.data import sources  # noqa: F401 - registers our datasets
    from pld_ray.data.registry import DATASETS

    for name, dataset in sorted(DATASETS.items()):
        yield f"{name}:PATH" if dataset.has_path else name, (_summary(dataset.find),)


def _optimizers() -> Iterator[tuple[str, tuple[str, ...]]]:
    from timm.optim import list_optimizers

    from pld_ray.config.registry import BUILT_IN_OPTIMIZERS, OPTIMIZERS

    yield from _own(OPTIMIZERS)
    for name, description in BUILT_IN_OPTIMIZERS.items():
        yield name, (description,)
    for name, description in list_optimizers(with_description=True):
        yield name, (description,)


def _schedules() -> Iterator[tuple[str, tuple[str, ...]]]:
    from pld_ray.config.registry import BUILT_IN_SCHEDULES, SCHEDULES

    yield from _own(SCHEDULES)
    for name in BUILT_IN_SCHEDULES:
        yield name, ("a schedule of timm" if name != "constant" else "no decay",)


def _metrics() -> Iterator[tuple[str, tuple[str, ...]]]:
    from pld_ray.config.registry import METRICS

    yield from _own(METRICS)
    for name, said in OF_EPOCHS.items():
        yield name, (f"{said}; always there",)


def _own(registry: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What plug-ins have registered, with its parameters."""
    for name, own in sorted(registry.items()):
        fields = own.parameters.model_json_schema().get("properties", {})
        yield name, (_summary(own.function), *(_parameter(key, fields[key]) for key in fields))


OF_EPOCHS = {
    "top1": "percentage of images whose best class is right",
    "top5": "percentage of images with the right class among the best five",
    "val_loss": "cross-entropy in nats",
    "ece": "calibration error in [0, 1] (Guo et al. 2017)",
    "kl_teacher_student": "KL divergence of the student from the teacher, in nats",
    "agreement": "percentage of images for which teacher and student predict the same class",
}


def _experiments() -> Iterator[tuple[str, tuple[str, ...]]]:
    from pld_ray.config.experiment import experiments_folder
    from pld_ray.config.yaml_files import read_mapping

    for file in sorted(experiments_folder().glob("*.yaml")):
        yield file.stem, (str(read_mapping(file).get("title", "")),)


def _summary(documented: Any) -> str:
    """Return the first line of a docstring."""
    return (documented.__doc__ or "").strip().partition("\n")[0]


_FIND = {
    Kind.losses: _losses,
    Kind.networks: _networks,
    Kind.datasets: _datasets,
    Kind.optimizers: _optimizers,
    Kind.schedules: _schedules,
    Kind.metrics: _metrics,
    Kind.experiments: _experiments,
}
