"""The rooms of the code: every import goes to a room that the importing room says it uses."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EVERYWHERE = {
    "pld_ray",
    "pld_ray.errors",
    "pld_ray.imports",
    "pld_ray.plugins",
    "pld_ray.units",
}  # what every room may import


def rooms():
    """Each room, and the rooms that the last line of its docstring names."""
    found = {}
    for init in sorted(ROOT.glob("*/*/__init__.py")):
        package, name = init.parts[-3:-1]
        if package not in ("pld_ray", "analysis"):
            continue
        doc = ast.get_docstring(ast.parse(init.read_text())) or ""
        uses = re.search(r"^Uses: ([^.]*(?:\.\w[^.]*)*)\.$", doc, re.MULTILINE)
        assert uses and "Enters: " in doc and "Leaves: " in doc, f"{init}: say what it uses"
        names = uses[1].replace("\n", " ").split(", ") if uses[1] != "nothing" else []
        found[f"{package}.{name}"] = {
            each if "." in each or each == "analysis" else f"{package}.{each}" for each in names
        }
    return found


def imports(path):
    """Modules that a file imports, at its top or inside a function, with their lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name


def broken(path, source, uses):
    """The arrows of a file that its room does not allow."""
    room = ".".join(path.parts[:2])
    allowed = {room, *EVERYWHERE, *uses[room]}
    found = []
    for line, module in imports(source):
        package, *rest = module.split(".")
        if package in ("pld_ray", "analysis"):
            target = ".".join([package, *rest[:1]])
            target = target if target in uses or target in EVERYWHERE else package
            if target not in allowed and package not in allowed - EVERYWHERE:
                found.append(f"{path}:{line}: {room} -> {target}")
    return found


def test_imports_go_only_to_the_rooms_that_are_named():
    uses = rooms()
    assert {"pld_ray.losses", "pld_ray.config", "pld_ray.sweep", "analysis.tables"} <= uses.keys()
    files = [path for room in uses for path in (ROOT / room.replace(".", "/")).rglob("*.py")]
    assert len(files) > 80
    arrows = [a for path in files for a in broken(path.relative_to(ROOT), path, uses)]
    assert arrows == [], "\n".join(arrows)


def test_no_room_is_used_by_one_that_it_uses():
    uses = {room: set(names) for room, names in rooms().items()}
    analysis = {room for room in uses if room.startswith("analysis.")}
    for names in uses.values():
        if "analysis" in names:
            names.discard("analysis")
            names.update(analysis)
    while uses:  # take away the rooms that use none of those left
        free = [room for room, names in uses.items() if not names & uses.keys()]
        assert free, f"a circle of rooms: {uses}"
        for room in free:
            del uses[room]


@pytest.mark.parametrize(
    ("room", "line", "arrow"),
    [
        ("config", "import pld_ray.sweep.runner", "pld_ray.config -> pld_ray.sweep"),
        ("losses", "from pld_ray.config import trial", "pld_ray.losses -> pld_ray.config"),
        ("distill", "from pld_ray.cli.main import main", "pld_ray.distill -> pld_ray.cli"),
        ("sweep", "    from analysis.tables import best", "pld_ray.sweep -> analysis.tables"),
        ("config", "from pld_ray.errors import InputError", None),
        ("config", "from pld_ray.config.merge import merge", None),
    ],
)
def test_a_wrong_arrow_is_named(tmp_path, room, line, arrow):
    file = tmp_path / "new.py"
    file.write_text(f"def function():\n    {line.strip()}\n")
    found = broken(Path("pld_ray", room, "new.py"), file, rooms())
    assert found == ([f"pld_ray/{room}/new.py:2: {arrow}"] if arrow else [])


def test_what_makes_plans_imports_neither_torch_nor_ray():
    heavy = {"torch", "ray", "timm", "torchvision"}
    light = (
        "losses/__init__",
        "losses/registry",
        "losses/parameters",
        "losses/sorting",
        "config/*",
        "store/*",
    )
    for pattern in (
        *light,
        "data/datasets",
        "data/registry",
        "data/sources/*",
        "distill/bank_plan",
        "distill/bank_format",
    ):
        for path in (ROOT / "pld_ray").glob(f"{pattern}.py"):
            top = ast.parse(path.read_text()).body
            names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
            names |= {n.module for n in top if isinstance(n, ast.ImportFrom) and n.module}
            assert not {name.split(".")[0] for name in names} & heavy, path
