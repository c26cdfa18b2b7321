"""The commands for a start: `pld-ray init` and `pld-ray schema`."""

from __future__ import annotations

import json
import keyword
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
        Path, typer.Option(help="Folder to write to; it is created if needed.")
    ] = Path(),
) -> None:
    """Write an experiment NAME.yaml and a plug-in NAME.py with a loss, which run as they are.

    A schema.json beside them lets editors complete and check the YAML.
    """
    from pld_ray import plugins
    from pld_ray.config.experiment import experiments_folder
    from pld_ray.losses import REGISTRY

    if not name.isidentifier() or not name.isascii() or name != name.lower():
        raise InputError(f"init {name}: expected small letters, digits and _, such as my_method")
    paths = {suffix: folder / f"{name}{suffix}" for suffix in (".yaml", ".py")}
    for path in paths.values():
        if path.exists():
            raise InputError(f"init {name}: {path} exists already; expected a new name or --folder")
    if keyword.iskeyword(name) or name in REGISTRY:
        raise InputError(f"init {name}: this name is taken; expected another, such as {name}_2")
    folder.mkdir(parents=True, exist_ok=True)
    title = name.replace("_", " ").capitalize()
    for suffix, path in paths.items():
        template = experiments_folder() / "templates" / f"{TEMPLATE}{suffix}"
        text = template.read_text(encoding="utf-8").replace(TEMPLATE, name)
        path.write_text(text.replace("My method", title), encoding="utf-8")
    plugins.load(str(paths[".py"].absolute()))
    schema(to=folder / "schema.json")
    typer.echo(f"{paths['.yaml']} and {paths['.py']} are there; next: pld-ray run {paths['.yaml']}")


@app.command()
def schema(
    plugin: Plugins = None,
    to: Annotated[
        Path | None, typer.Option(help="File to write. By default, the schema is printed.")
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
    else:
        to.write_text(text + "\n", encoding="utf-8")
