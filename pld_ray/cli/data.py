"""The commands `pld-ray data`: check a dataset, and pack it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pld_ray.cli.options import Overrides, Plugins
from pld_ray.errors import InputError

if TYPE_CHECKING:
    from pld_ray.data.audit import Audit

data_app = typer.Typer(
    help="Check a dataset for faults, or pack it for faster reading.", no_args_is_help=True
)
Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="The dataset as in data.name, such as folder:PATH or hf:NAME."
    ),
]


def _find(name: str, overrides: list[str] | None) -> tuple[Any, Any]:
    """Return the settings of a dataset, and the dataset with its faults."""
    from pathlib import Path

    from pld_ray.config.merge import merge, nest
    from pld_ray.config.parts import Data
    from pld_ray.config.paths import absolute_paths
    from pld_ray.config.validation import validated
    from pld_ray.config.yaml_files import parse_yaml
    from pld_ray.data import datasets

    settings: dict[str, Any] = {"data": {"name": name}}
    for item in overrides or []:
        field, equals, text = item.partition("=")
        if not equals or not field.strip().startswith("data."):
            raise InputError(f"--set {item}: expected data.FIELD=VALUE, such as data.root=PATH")
        settings = merge(settings, nest(field.strip(), parse_yaml(text, f"--set {item}")))
    settings = absolute_paths(settings, Path.cwd())
    data = validated(Data, settings["data"], "data")
    anyhow = data.model_copy(update={"holdout": 1})  # it need not have a validation split
    return data, datasets.find(anyhow, strict=False)


@data_app.command("check")
def data_check(name: Name, overrides: Overrides = None, plugin: Plugins = None) -> None:
    """Read every image, and report what the dataset holds and what is wrong with it.

    The report is Markdown. Errors are what a run would refuse: the exit code is then 1.
    Warnings are, for example, images of the validation split that are also in the training split.
    """
    from rich.console import Console
    from rich.progress import track

    from pld_ray.data import audit

    data, found = _find(name, overrides)
    console = Console(stderr=True)

    def progress(items: Any, total: int) -> Any:
        if not console.is_terminal:
            return items
        return track(items, "reading images", total, console=console, transient=True)

    result = audit.audit(found, progress)
    typer.echo(_markdown(result, data.name))
    if result.faults:
        raise typer.Exit(1)


def _markdown(result: Audit, name: str) -> str:
    """Return the report: a table of the splits, then errors and warnings."""
    import numpy as np
    import pandas as pd

    from analysis.tables import rendering

    rows = []
    for split, (seen, counts) in result.splits.items():
        read = [image for image in seen if image.kind]
        kinds = Counter(image.kind for image in read).most_common()
        balance = (f"{int(x):,}" for x in np.quantile(counts, [0, 0.5, 1]))
        rows.append(
            {
                "Split": split,
                "Formats": ", ".join(f"{kind} {count:,}" for kind, count in kinds),
                "Images": f"{len(seen):,}",
                "Per class (min, median, max)": ", ".join(balance),
                "Width": _range([image.width for image in read]),
                "Height": _range([image.height for image in read]),
            }
        )
    head = f"**{name}**: {len(result.class_names):,} classes, fingerprint `{result.fingerprint}`"
    lines = [head, "", rendering.markdown(pd.DataFrame(rows), 2), ""]
    for title, sentences in (("Errors", result.faults), ("Warnings", result.warnings)):
        if sentences:
            lines += [f"{title}:", "", *(f"- {sentence}" for sentence in sentences), ""]
    if not result.faults and not result.warnings:
        lines.append("No faults found.")
    return "\n".join(lines).rstrip()


def _range(values: list[int]) -> str:
    if not values:
        return "–"
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


@data_app.command("pack")
def data_pack(
    name: Name,
    to: Annotated[str, typer.Option(help="The folder to write; it must not exist.")],
    overrides: Overrides = None,
    plugin: Plugins = None,
    shorter: Annotated[
        int, typer.Option(min=8, help="The shorter side of the packed images in pixels.")
    ] = 256,
    quality: Annotated[int, typer.Option(min=1, max=100, help="The quality of the JPEGs.")] = 95,
) -> None:
    """Write each image once with a smaller size, so that it is read faster.

    The packed dataset is other data than the original: its trials are other trials.
    """
    from pld_ray.config.paths import absolute
    from pld_ray.data import packing
    from pld_ray.units import in_bytes

    _, found = _find(name, overrides)
    if found.faults:
        raise InputError(found.faults[0])
    folder = absolute(to)
    before, after = packing.pack(found, folder, shorter, quality)
    typer.echo(f"{in_bytes(before)} packed to {in_bytes(after)}; use it with")
    typer.echo(f'  data: {{name: "hf:{folder}"}}')
