"""Text of unknown origin, such as a label or a file's name, on its way to a terminal."""

from __future__ import annotations

__all__ = ["one_line"]


def one_line(text: str) -> str:
    """On one line, without control characters: a name in a file of unknown origin may hold what a terminal obeys."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(text.split()))
