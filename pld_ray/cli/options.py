"""The command-line application and the options that several commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pld_ray.errors import InputError

app = typer.Typer(
    help="Run knowledge-distillation experiments on Ray, and write tables, figures and reports.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

ExperimentName = Annotated[
    str,
    typer.Argument(
        metavar="EXPERIMENT",
        help="Path of a YAML file, or name of a shipped experiment such as demo.",
    ),
]
Experiments = Annotated[
    list[str],
    typer.Argument(
        metavar="EXPERIMENT...",
        help="Paths of YAML files, or names of shipped experiments such as demo.",
    ),
]
Smoke = Annotated[
    bool,
    typer.Option(
        "--smoke", help="Run a miniature with the same cells, small enough for 2 CPU cores."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Override a field, e.g. loss.temperature=2. May be repeated.",
    ),
]
Methods = Annotated[
    str | None,
    typer.Option(
        metavar="LOSS,...",
        help="Take only these losses of the grid, such as kd,pld. * and ? are wildcards.",
    ),
]
Pairs = Annotated[
    str | None,
    typer.Option(
        metavar="TEACHER:STUDENT,...",
        help="Take only these pairs of the grid, such as resnet56:resnet20. * and ? are wildcards.",
    ),
]


def chosen(overrides: list[str] | None, methods: str | None, pairs: str | None) -> list[str]:
    """Return the overrides of a command with those that take a part of the grid."""
    found = list(overrides or [])
    for field, text, like in (
        ("methods", methods, "kd,pld"),
        ("pairs", pairs, "resnet56:resnet20,vgg13:vgg8"),
    ):
        if text is not None:
            names = [name.strip() for name in text.split(",")]
            if "" in names:
                raise InputError(f"--{field} is {text!r}: expected names such as {like}")
            found.append(f"{field}={json.dumps(names)}")
    return found


def _load_plugins(sources: list[str] | None) -> list[str] | None:
    """Import the plug-ins before the command reads anything that names what they hold."""
    from pld_ray import plugins
    from pld_ray.config.paths import absolute_plugin

    for source in sources or []:
        plugins.load(absolute_plugin(source))
    return sources


Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="FILE",
        callback=_load_plugins,
        help="A Python file, or an installed package, with losses, networks or datasets of your "
        "own, in addition to those that the experiment names. May be repeated.",
    ),
]
Storage = Annotated[
    str,
    typer.Option(envvar="PLD_RAY_STORAGE", help="Folder or URI where results are stored."),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="Address of the Ray cluster to join. By default, use or start Ray on this machine."
    ),
]
Out = Annotated[
    Path | None, typer.Option(help="Folder to write to. The default is STORAGE/reports/EXPERIMENT.")
]
