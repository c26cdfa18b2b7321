"""Errors in the user's input: one sentence each, with the closest valid names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The user's input is not valid. The command line prints the message and exits with code 2.

    The message is always one line: characters of quoted input that cannot be printed are escaped.

    Args:
        message: What is wrong, where, and what was expected.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class MissingError(InputError):
    """Something that the input names is not on this machine. It can be elsewhere."""


def nearest(word: str, valid: Iterable[str], limit: int = 12) -> str:
    """Return the end of an error message that helps with an unknown name.

    Args:
        word: The unknown name.
        valid: The valid names.
        limit: The maximum number of valid names to list.

    Returns:
        "did you mean ...?" with up to three similar names if there are any, else "accepted: ..."
        with the valid names.
    """
    names = sorted(set(valid))
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    shown = ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
    return f"accepted: {shown}"
