"""Plug-ins: files and packages of users that hold losses, networks and datasets.

    my_method.py -> load: import it; its decorators register what it holds
                 -> a digest of its source, in the id of each trial that uses something of it
                 -> a copy in the store, from which workers and later runs load it

Nothing here knows what can be registered: a registry calls `provide` for each new name.
"""

from __future__ import annotations

import ast
import atexit
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import shutil
import sys
import sysconfig
import tempfile
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pld_ray.errors import InputError
from pld_ray.imports import without_collection

GROUP = "pld_ray.plugins"  # the entry points of installed packages
Provided = tuple[str, str]  # a kind, such as "loss", and a name


@dataclass(frozen=True)
class Plugin:
    """The source of a plug-in.

    Attributes:
        name: The name of its module.
        place: Where it was found, for messages.
        files: The content of its module and of all modules that it imports from its own folder, by
            their path relative to this folder.
    """

    name: str
    place: str
    files: tuple[tuple[str, bytes], ...]

    @property
    def digest(self) -> str:
        """The hash of the source, as 16 hex digits."""
        digest = hashlib.sha256()
        for path, content in self.files:
            digest.update(f"{path} {len(content)}\n".encode() + content)
        return digest.hexdigest()[:16]

    def archive(self) -> bytes:
        """Return the files as a zip archive, from which Python can import."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            folders = {f"{above}/" for path, _ in self.files for above in Path(path).parents[:-1]}
            for path in sorted(folders):  # without them, folders without __init__.py are not found
                archive.writestr(zipfile.ZipInfo(path), b"")
            for path, content in self.files:
                archive.writestr(zipfile.ZipInfo(path), content)
        return buffer.getvalue()


LOADED: dict[str, Plugin] = {}  # by the name of the module
PROVIDED: dict[Provided, Plugin] = {}
_current: list[Plugin] = []  # the plug-in that is imported now
_undo: dict[str, list[Callable[[], object]]] = {}  # by the name of the module
_owners: dict[str, str] = {}  # which plug-in has imported each module; others may use it too
_places: dict[str, str] = {}  # where it was imported from: a folder or an archive


def provide(kind: str, name: str, module: str, undo: Callable[[], object]) -> None:
    """Note that a registry has a new name, if it is from the plug-in that is imported now.

    Args:
        kind: The kind of the registry: "loss" or "dataset".
        name: The new name.
        module: The module that registers it. A plug-in may import others that register names too.
        undo: Removes the name from the registry, for a newer version of the plug-in.
    """
    if _current and module in {_module(path) for path, _ in _current[-1].files}:
        PROVIDED[kind, name] = _current[-1]
        _undo.setdefault(_current[-1].name, []).append(undo)


def used(names: Iterable[Provided]) -> dict[str, Plugin]:
    """Return the plug-ins that provide some of the names, by the names of the plug-ins."""
    found = (PROVIDED.get(name) for name in names)
    return {plugin.name: plugin for plugin in found if plugin is not None}


def load(source: str) -> Plugin:
    """Import a plug-in, or a newer version of it. An unchanged one is not imported again.

    Args:
        source: The absolute path of a Python file, or the name of an installed module or package.

    Raises:
        InputError: It is not there, it cannot be imported, or its name is in use.
    """
    path = Path(source)
    if path.suffix == ".py" or os.sep in source:
        name, folder, first = path.stem, path.parent, _own(path)
    else:
        name = source
        folder, first = _installed(name)
    package = "" if path.suffix == ".py" else name.partition(".")[0]
    plugin = Plugin(name, source, tuple(sorted(_sources(folder, first, package))))
    known = LOADED.get(name)
    if known is not None and known.digest == plugin.digest:
        return known
    if known is not None and known.place != source:
        raise InputError(
            f"plug-in {source}: another plug-in has the name {name!r}, {known.place}: expected "
            "different names"
        )
    for file, _ in plugin.files:
        _check_free(_module(file), plugin, str(folder))
    return _load(plugin, str(folder))


def load_archive(name: str, digest: str, content: bytes) -> Plugin:
    """Import a plug-in from an archive that `Plugin.archive` made.

    Args:
        name: The name of its module.
        digest: The digest of its source.
        content: The archive.

    Raises:
        InputError: The archive is damaged, or the plug-in cannot be imported.
    """
    damaged = f"plug-in {name}: its copy {name}-{digest}.zip in the storage is damaged"
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            files = tuple((name, archive.read(name)) for name in names)
    except (zipfile.BadZipFile, ValueError) as error:
        raise InputError(f"{damaged}: {error}") from None
    plugin = Plugin(name, name, files)
    if plugin.digest != digest:
        raise InputError(damaged)
    # Python imports from a file; it stays as long as the process can import from it.
    file = Path(tempfile.mkdtemp(prefix="pld-ray-plugin-")) / f"{name}.zip"
    file.write_bytes(content)
    atexit.register(shutil.rmtree, file.parent, ignore_errors=True)
    return _load(plugin, str(file))


@cache
def load_installed() -> None:
    """Import the plug-ins that installed packages declare as entry points."""
    for entry in importlib.metadata.entry_points(group=GROUP):
        load(entry.module)


def location(error: BaseException) -> str:
    """Return where in a plug-in an error was raised, such as "my_method.py, line 7: ", or ""."""
    files = {
        os.path.join(_places[plugin.name], path): path
        for plugin in LOADED.values()
        for path, _ in plugin.files
    }
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in files:
            return f"{files[frame.filename]}, line {frame.lineno}: "
    return ""


@contextmanager
def errors_told(what: str) -> Iterator[None]:
    """Turn an error that a plug-in raises in the `with` block into one sentence.

    Args:
        what: What fails, such as "loss huber".

    Raises:
        InputError: Code of a plug-in has raised an error.
    """
    try:
        yield
    except (InputError, OSError):
        raise
    except Exception as error:
        if not (where := location(error)):
            raise
        said = str(error).strip().partition("\n")[0]
        raise InputError(f"{what}: {where}{type(error).__name__}: {said}") from error


def _load(plugin: Plugin, where: str) -> Plugin:
    """Import a plug-in from a folder or an archive, instead of an older version."""
    _forget(plugin.name)
    modules = {_module(path) for path, _ in plugin.files}
    for path, content in plugin.files:
        owner = _owners.get(_module(path))
        if owner is None or (path, content) not in LOADED[owner].files:
            # such as one that was imported from the folder of the driver
            sys.modules.pop(_module(path), None)
            # Python would take the compiled file of an older version with this time and size.
            with suppress(OSError):
                Path(importlib.util.cache_from_source(os.path.join(where, path))).unlink()
    importlib.invalidate_caches()
    there = set(sys.modules)  # of the script that uses the plug-in, which may lie beside it
    LOADED[plugin.name], _places[plugin.name] = plugin, where
    _current.append(plugin)
    sys.path.insert(0, where)
    try:
        with without_collection():
            if any(b"timm" in content for _, content in plugin.files):
                importlib.import_module("pld_ray.models.networks")  # their names come first
            before = _entrypoints()
            importlib.import_module(plugin.name)
        _owners.update((each, plugin.name) for each in modules - _owners.keys())
        _check_followed(plugin, where, sys.modules.keys() - there)
        for network, module in _entrypoints().items():
            if module in modules:
                if before.get(network, module) not in modules:
                    raise InputError(
                        f"network {network!r}: {before[network]} has this name already: expected "
                        "another name"
                    )
                PROVIDED["network", network] = plugin
    except Exception as error:
        reason = _reason(error, where)
        _owners.update((each, plugin.name) for each in modules - _owners.keys())
        _forget(plugin.name)
        raise InputError(f"plug-in {plugin.place}: {reason}") from error
    finally:
        _current.pop()
        # It stays for imports inside functions: last, so that it hides no module of others. An
        # archive stays first: a worker may have the folder of the driver on its path too.
        sys.path.remove(where)
        if plugin.name in LOADED:
            sys.path.insert(0 if where.endswith(".zip") else len(sys.path), where)
    return plugin


def _forget(name: str) -> None:
    """Remove a plug-in: what it has registered, and its modules."""
    plugin = LOADED.pop(name, None)
    if plugin is None:
        return
    for undo in _undo.pop(name, []):
        undo()
    for provided in [each for each, owner in PROVIDED.items() if owner.name == name]:
        if provided[0] != "network":  # timm's registry keeps the network
            del PROVIDED[provided]
    for module in [module for module, owner in _owners.items() if owner == name]:
        sys.modules.pop(module, None)
        del _owners[module]
    place = _places.pop(name)
    if not _current:  # else its import has failed, and nothing was appended yet
        with suppress(ValueError):  # the user's code may have removed it
            sys.path.remove(place)


def _check_free(module: str, plugin: Plugin, where: str) -> None:
    """Raise InputError if a module of a plug-in hides a module from elsewhere."""
    if module in sys.modules:
        spec = sys.modules[module].__spec__
    elif "." in module:
        return
    else:
        spec = importlib.util.find_spec(module)
    origin = getattr(spec, "origin", None)
    if spec is not None and not str(origin).startswith(where + os.sep):
        raise InputError(
            f"plug-in {plugin.place}: there is a module {module!r} already ({origin}): expected "
            "another name"
        )


def _reason(error: Exception, where: str) -> str:
    """Return what went wrong in an import, and in which line of the plug-in."""
    lines = [
        f"{Path(frame.filename).name}, line {frame.lineno}: "
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith(where)
    ]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}, line {error.lineno}: {error.msg}"
    said = str(error).splitlines()[0] if str(error) else ""
    named = said if isinstance(error, InputError) else f"{type(error).__name__}: {said}"
    return (lines[-1] if lines else "") + named


def _entrypoints() -> dict[str, str]:
    """Return the module of each network that timm knows."""
    if "timm" not in sys.modules:
        return {}
    import timm

    return {name: timm.model_entrypoint(name).__module__ for name in timm.list_models()}


def _check_followed(plugin: Plugin, where: str, imported: Iterable[str]) -> None:
    """Raise InputError if a plug-in has imported a file of its folder that its digest lacks.

    Args:
        plugin: The plug-in.
        where: The folder or archive that it comes from.
        imported: The modules that it has imported.
    """
    known = {os.path.join(where, path) for path, _ in plugin.files}
    known |= {
        os.path.join(place, path)
        for name, place in _places.items()
        if name in LOADED
        for path, _ in LOADED[name].files
    }
    package = os.path.join(where, plugin.name.partition(".")[0])
    folder = package if os.path.isdir(package) else where
    for name in imported:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(folder + os.sep) and file not in known and _followed(Path(file)):
            raise InputError(
                f"{file} is imported, and no import statement names it: expected `import` or "
                "`from ... import`, so that it is part of the digest"
            )


def _followed(path: Path) -> bool:
    """Return whether a file can be part of a plug-in: not if it is installed, or ours."""
    installed = {sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")}
    ours = Path(__file__).parents[1]
    return not any(path.is_relative_to(folder) for folder in installed) and not any(
        path.is_relative_to(ours / package) for package in ("pld_ray", "analysis")
    )


def _own(path: Path) -> list[Path]:
    """Return the files of a plug-in that is a file or a folder with __init__.py."""
    package = (path / "__init__.py").is_file()
    if not package and not (path.is_file() and path.suffix == ".py"):
        raise InputError(f"plug-in {path}: expected a Python file, such as my_method.py")
    if not path.stem.isidentifier():
        raise InputError(
            f"plug-in {path}: {path.stem!r} cannot be imported: expected a file name of letters, "
            "digits and underscores"
        )
    return sorted(path.rglob("*.py")) if package else [path]


def _installed(name: str) -> tuple[Path, list[Path]]:
    """Return the folder above an installed module, and its files."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise InputError(
            f"plug-in {name!r}: expected a Python file, such as my_method.py, or the name of an "
            "installed package"
        )
    file = Path(spec.origin)
    above = file.parents[name.count(".") + (file.name == "__init__.py")]
    top = above / name.partition(".")[0]
    return above, sorted(top.rglob("*.py")) if top.is_dir() else [file]


def _sources(folder: Path, first: list[Path], package: str) -> Iterator[tuple[str, bytes]]:
    """Yield the content of files and of all that they import from their folder, by relative path.

    The imports are read from the source, so that those inside functions are found too. For a
    package, only its own modules are followed: other packages may lie in the same folder.
    """
    waiting, seen = list(first), set(first)
    while waiting:
        path = waiting.pop()
        content = path.read_bytes()
        yield path.relative_to(folder).as_posix(), content
        try:
            tree = ast.parse(content)
        except (SyntaxError, ValueError):
            continue  # the import says what is wrong
        for name in _imported(tree, path.relative_to(folder).parent.parts):
            for file in _files(folder, name):
                if file not in seen and package in ("", name[0]) and (package or _followed(file)):
                    seen.add(file)
                    waiting.append(file)


def _imported(tree: ast.Module, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield the parts of the names that a module imports; `package` is where the module is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = (*above, *(node.module.split(".") if node.module else ()))
            yield from ((*module, alias.name) for alias in node.names)


def _files(folder: Path, name: tuple[str, ...]) -> Iterator[Path]:
    """Yield the files below a folder that the import of a name runs."""
    for length in range(1, len(name) + 1):
        place = folder.joinpath(*name[:length])
        for file in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if file.is_file():
                yield file


def _module(path: str) -> str:
    """Return the name of the module in a file: a/b.py is a.b, and a/__init__.py is a."""
    parts = path.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
