"""YAML as plain values: no objects, no key twice, no endless aliases; errors name their line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pld_ray.errors import InputError


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-3 as a number and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} stands twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(  # YAML 1.1 asks for a dot in 1e-3
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


MOST_VALUES = 100_000  # of a document, with all that its aliases stand for


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node holds; a node that is its own part holds infinitely many."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # met again before its parts are counted
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


def parse_yaml(text: str, where: str) -> Any:
    """YAML text to plain values; InputError with the line if it does not parse."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {MOST_VALUES:,} values")
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{where}{line}: not valid YAML: {problem}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{path}: expected a mapping of fields, got {type(value).__name__}")
    return value
