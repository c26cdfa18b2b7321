"""The commands for a start: `pld-ray init` and `pld-ray schema`."""

from __future__ import annotations

import importlib.util
import json
import keyword
import re
from pathlib import Path
from typing import Annotated

import typer

from pld_ray.cli.options import Plugins, app
from pld_ray.errors import InputError

TEMPLATE = "my_method"


@app.command()
def init(
    name: Annotated[
        str, typer.Argument(help="Name of your method: small letters, digits and underscores.")
    ],
    folder: Annotated[
        Path, typer.Option(file_okay=False, help="Folder to write to; it is created if needed.")
    ] = Path(),
) -> None:
    """Write an experiment NAME.yaml and a plug-in NAME.py with a loss, which run as they are.

    NAME.schema.json beside them lets editors complete and check the YAML.
    """
    import yaml

    from pld_ray import plugins
    from pld_ray.config.experiment import experiments_folder
    from pld_ray.losses import REGISTRY

    word = yaml.safe_load(name)  # "on" is no word in YAML
    if word != name or not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise InputError(f"init {name}: expected small letters, digits and _, such as my_method")
    suffixes = (".yaml", ".py", ".schema.json")
    paths = {suffix: folder / f"{name}{suffix}" for suffix in suffixes}
    for path in paths.values():
        if path.exists():
            raise InputError(f"init {name}: {path} exists already; expected a new name or --folder")
    if keyword.iskeyword(name) or name in REGISTRY or importlib.util.find_spec(name):
        raise InputError(f"init {name}: this name is taken; expected another, such as {name}_2")
    folder.mkdir(parents=True, exist_ok=True)
    title = name.replace("_", " ").capitalize()
    for suffix, path in list(paths.items())[:2]:
        template = experiments_folder() / "templates" / f"{TEMPLATE}{suffix}"
        text = template.read_text(encoding="utf-8").replace(TEMPLATE, name)
        path.write_text(text.replace("My method", title), encoding="utf-8")
    plugins.load(str(paths[".py"].absolute()))
    schema(to=paths[".schema.json"])
    typer.echo(f"{paths['.yaml']} and {paths['.py']} are there; next: pld-ray run {paths['.yaml']}")


@app.command()
def schema(
    plugin: Plugins = None,
    to: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="File to write. By default, the schema is printed."),
    ] = None,
) -> None:
    """Print the JSON Schema of experiments, with the losses of plug-ins.

    Editors that know YAML schemas use the one that the first line of a file
    names: # yaml-language-server: $schema=schema.json
    """
    from pld_ray.config.schema import experiment_schema

    text = json.dumps(experiment_schema(), indent=1, ensure_ascii=False)
    if to is None:
        typer.echo(text)
        return
    try:
        to.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--to {to}: cannot be written: {error.strerror}") from None
