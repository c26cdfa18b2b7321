"""The command-line application and the options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
