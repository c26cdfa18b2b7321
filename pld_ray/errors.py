"""Bad input: one sentence for the user, and the nearest valid name to offer."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user wrote cannot be used. The command line prints it and exits with 2.

    One line, whatever the input that it quotes holds.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def nearest(word: str, valid: Iterable[str], limit: int = 12) -> str:
    """Close a sentence: the likeliest meaning of `word`, or what would be accepted."""
    names = sorted(set(valid))
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    shown = ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
    return f"accepted: {shown}"
