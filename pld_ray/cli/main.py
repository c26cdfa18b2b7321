"""The command `pld-ray`. Heavy imports wait until a command needs them."""

from __future__ import annotations

import signal
import sys
from typing import Any

import typer

from pld_ray.cli import plan, results, run  # noqa: F401 - they register their commands
from pld_ray.cli.bank import bank_app
from pld_ray.cli.options import app
from pld_ray.errors import InputError

app.add_typer(bank_app, name="bank")


class _Stopped(BaseException):
    """SIGINT or SIGTERM came; typer would make something else of a KeyboardInterrupt."""


def _stop(number: int, frame: Any) -> None:
    raise _Stopped(number)


def main() -> None:
    """Entry point: bad input is one sentence and exit code 2, a stop from outside 130 or 143."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app()
    except InputError as error:
        typer.echo(f"pld-ray: {error}", err=True)
        sys.exit(2)
    except OSError as error:  # a full disk, a storage that is away
        typer.echo(f"pld-ray: {error}; the same command goes on from what is kept", err=True)
        sys.exit(1)
    except _Stopped as stopped:
        typer.echo("stopped; the same command goes on from here", err=True)
        sys.exit(128 + stopped.args[0])
