"""Pages of the documentation that are made from the code, and links that leave the documentation.

mkdocs calls the functions `on_*` (see `hooks` in mkdocs.yml).
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

import typer
import typer.cli
from mkdocs.structure.files import File

import pld_ray
from pld_ray.cli.main import app
from pld_ray.config.schema import experiment_schema, loss_schema
from pld_ray.losses.registry import REGISTRY, public_names

ROOT = Path(__file__).parent.parent
# Files of the repository that are pages too, by the path of the page.
PAGES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
}
Schema = dict[str, Any]


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not files of this folder."""
    made = {page: (ROOT / source).read_text(encoding="utf-8") for page, source in PAGES.items()}
    made |= {
        "reference/fields.md": fields(),
        "reference/losses.md": losses(),
        "reference/commands.md": commands(),
        "reference/api.md": api(),
    }
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links between files of the repository to their pages.

    A link to a file that is no page, such as a test, becomes its name.
    """
    here = page.file.src_uri
    source = PAGES.get(here, f"docs/{here}")
    back = {source: page for page, source in PAGES.items()}

    def link(found: re.Match[str]) -> str:
        mark, text, target = found.groups()
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            return found.group()
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        to = back.get(place, place.removeprefix("docs/"))
        if to == place:
            return text if "`" in text else f"`{text}`"
        relative = posixpath.relpath(to, posixpath.dirname(here) or ".")
        return f"{mark}[{text}]({relative}{'#' + anchor if anchor else ''})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", link, markdown)


# ---------------------------------------------------------------- fields of an experiment


def fields() -> str:
    """Return the page of all fields, with types, defaults and bounds."""
    schema = experiment_schema()
    parts: dict[str, Schema] = schema["$defs"]
    text = [
        "# Fields of an experiment",
        "All fields, from the code. `pld-ray schema` prints the same for editors. In `grid`, a "
        "field has a list of values. `x` is short for `{name: x}` where a part has a name.",
        "## Top level",
        _table(schema),
        "## base",
        "The settings that all trials share. `grid`, `overrides` and `search.space` name these "
        "fields with dots, such as `optimizer.lr`.",
        _table(parts["Settings"]),
    ]
    for name in sorted(parts.keys() - {"Settings", "Loss", "Recipe"}):
        text += [f"## {name}", parts[name].get("description", ""), _table(parts[name])]
    return "\n\n".join(text) + "\n"


def _table(schema: Schema) -> str:
    lines = ["| Field | Type | Default | Meaning |", "| --- | --- | --- | --- |"]
    if not any("description" in field for field in schema.get("properties", {}).values()):
        lines = [line.rsplit(" | ", 1)[0] + " |" for line in lines]
    for name, field in schema.get("properties", {}).items():
        default = ""
        if "default" in field:
            default = f"`{json.dumps(field['default'])}`"
            if isinstance(field["default"], dict) and field["default"]:
                default = "see its part"
        row = f"| `{name}` | {_kind(field)} | {default} |"
        if "Meaning" in lines[0]:
            row += " {} |".format(field.get("description", "").replace("|", "\\|"))
        lines.append(row)
    return "\n".join(lines)


def _kind(field: Schema) -> str:
    """Return the type of a field in words, with its bounds."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        pages = {"Loss": "[loss](losses.md)", "Settings": "[settings](#base)"}
        return pages.get(name, f"[{name}](#{name.lower()})")
    if "anyOf" in field:
        kinds = list(dict.fromkeys(_kind(part) for part in field["anyOf"]))
        return " or ".join(kind for kind in kinds if kind != "null") + (
            " or none" if "null" in kinds else ""
        )
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    kind = field.get("type", "any")
    if kind == "array":
        return f"list of {_kind(field['items'])}" if "items" in field else "list"
    names = {"object": "mapping", "integer": "integer", "string": "text", "boolean": "true, false"}
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[key]}" for key, sign in signs.items() if key in field]
    return " ".join([names.get(kind, kind), ", ".join(bounds)]).strip()


# ---------------------------------------------------------------- losses, commands, Python


def losses() -> str:
    """Return the page of all losses."""
    text = [
        "# Losses",
        "What `loss:` can name, from the code. Each loss is also a torch module of the same "
        "formula: see [Python](api.md#losses).",
    ]
    takes = {"logits": "its logits", "order": "its logits and their order", "features": "features"}
    for name, params in sorted(REGISTRY.items()):
        schema = loss_schema(params)
        schema["properties"].pop("name")
        taken = takes.get(params.takes, "nothing")
        said = f"{params.label} in tables. From the teacher: {taken}."
        text += [f"## {name}", said + " Two views of each image." * params.paired]
        text.append(schema["description"])
        if schema["properties"]:
            text.append(_table(schema))
    return "\n\n".join(text) + "\n"


def commands() -> str:
    """Return the page of all commands, as `--help` describes them."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="pld-ray")
    text = typer.cli.get_docs_for_click(obj=command, ctx=context, name="pld-ray")
    return text.replace("# `pld-ray`", "# Commands", 1)


def api() -> str:
    """Return the page of all public names, for mkdocstrings."""
    found = public_names()
    losses = {name: module for name, module in found.items() if name.endswith("Loss")}
    losses |= {name: found[name] for name in ("Features", "teacher_order")}
    home = {name: f"pld_ray.{module}" for name, module in pld_ray._HOME.items()}
    groups = {
        "Experiments": ["run", "plan", "status", "results", "Results", "Experiment"],
        "Your own loop": ["Distiller", "fit", "evaluate", "save", "PLDKnowledgeDistillation"],
        "Plug-ins": [name for name in home if name.startswith("register_")],
    }
    groups["More"] = sorted(home.keys() - {name for names in groups.values() for name in names})
    text = ["# Python", "All names are imported from `pld_ray`, such as `from pld_ray import fit`."]
    for title, names in groups.items():
        text += [f"## {title}", *(f"::: {home[name]}.{name}" for name in names)]
    text += ["## Losses", *(f"::: {module}.{name}" for name, module in sorted(losses.items()))]
    return "\n\n".join(text) + "\n"
