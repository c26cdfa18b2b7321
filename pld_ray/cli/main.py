"""The entry point of the command `pld-ray`. Commands import heavy modules when they need them."""

from __future__ import annotations

import gc
import signal
import sys
from typing import Annotated, Any

import typer

from pld_ray import __version__
from pld_ray.cli import (  # noqa: F401 - the imports register the commands
    listing,
    plan,
    results,
    run,
    starting,
    trials,
)
from pld_ray.cli.bank import bank_app
from pld_ray.cli.data import data_app
from pld_ray.cli.options import app
from pld_ray.errors import InputError

app.add_typer(bank_app, name="bank")
app.add_typer(data_app, name="data")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pld-ray {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version."),
    ] = False,
) -> None:
    pass


class _Stopped(BaseException):
    """Raised on SIGINT or SIGTERM. KeyboardInterrupt is not used, because typer catches it."""


def _stop(number: int, frame: Any) -> None:
    raise _Stopped(number)


def main() -> None:
    """Run the command line.

    Bad input prints one sentence and exits with code 2; a plug-in that ends the program is bad
    input. Storage errors exit with code 1, SIGINT with code 130, and SIGTERM with code 143.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    gc.set_threshold(100_000, 20, 100)  # thousands of records live on: look for garbage less often
    try:
        app()
    except InputError as error:
        typer.echo(f"pld-ray: {error}", err=True)
        sys.exit(2)
    except OSError as error:  # for example a full disk or an unreachable storage
        typer.echo(f"pld-ray: {error}; run the same command again to resume", err=True)
        sys.exit(1)
    except SystemExit as end:  # usually the end of a command
        plugins = sys.modules.get("pld_ray.plugins")  # imported by commands that use plug-ins
        if plugins and (where := plugins.location(end)):
            said = "SystemExit: expected a plug-in that does not end the program"
            typer.echo(f"pld-ray: {where}{said}", err=True)
            sys.exit(2)
        raise
    except _Stopped as stopped:
        typer.echo("stopped; run the same command again to resume", err=True)
        sys.exit(128 + stopped.args[0])
