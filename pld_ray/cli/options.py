"""The command-line application, and the options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Knowledge-distillation experiments on Ray: run grids, make tables, plot landscapes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

ExperimentName = Annotated[
    str, typer.Argument(metavar="EXPERIMENT", help="A YAML file, or a shipped one by name: demo.")
]
Experiments = Annotated[
    list[str],
    typer.Argument(metavar="EXPERIMENT...", help="YAML files, or shipped ones by name: demo."),
]
Smoke = Annotated[
    bool, typer.Option("--smoke", help="In miniature: the same cells, so small that 2 cores do.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Override, e.g. loss.temperature=2."),
]
Storage = Annotated[
    str,
    typer.Option(
        envvar="PLD_RAY_STORAGE", help="Where records and weights are kept: a folder or a URI."
    ),
]
Address = Annotated[str | None, typer.Option(help="Ray cluster to join; default: start Ray here.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder to write to [default: STORAGE/reports/EXPERIMENT].")
]
