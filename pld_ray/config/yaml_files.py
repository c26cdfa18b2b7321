"""Reads YAML files as plain values; errors name the file and the line.

Python objects, duplicate keys and aliases that expand to very many values are errors.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pld_ray.errors import InputError


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that reads 1e-3 as a number and rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} appears twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(  # YAML 1.1 reads 1e-3 as a string, because it has no dot
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


MOST_VALUES = 100_000  # limit for one document, after all aliases are expanded


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values of a node; a node that contains itself counts as above the limit."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # the count of a node inside itself
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text to plain values.

    Args:
        text: The YAML text.
        where: The source of the text, such as the path of a file, for error messages.

    Returns:
        The plain values, or None for an empty document.

    Raises:
        InputError: The text is not valid YAML; the message names the line.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > MOST_VALUES:
            raise ValueError(f"its aliases expand to more than {MOST_VALUES:,} values")
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{where}{line}: not valid YAML: {problem}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        InputError: The file cannot be read, is not valid YAML, or does not hold a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{path}: expected a mapping of fields, got {type(value).__name__}")
    return value
