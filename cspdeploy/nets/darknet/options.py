"""One section of a cfg as it is written, and its typed reading: every value checked, every error with its line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NoReturn

from cspdeploy.core.errors import InputError

__all__ = ["Section", "shortened"]

_INT = re.compile(r"[+-]?[0-9]{1,18}")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")


@dataclass(slots=True, kw_only=True)
class Section:
    """A section as written, and its typed reading."""

    type: str
    line: int
    index: int
    """Of the layer; -1 for [net]."""
    source: str
    options: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Value and line by key."""

    @property
    def where(self) -> str:
        """File, line and layer, for messages."""
        layer = f"layer {self.index} " if self.index >= 0 else ""
        return f"{self.source}:{self.line}: {layer}[{self.type}]"

    def fail(self, key: str, problem: str, *, fix: str = "mend the cfg") -> NoReturn:
        """Raise an `InputError` about a key, at its line."""
        line = self.options[key][1] if key in self.options else self.line
        layer = f"layer {self.index} " if self.index >= 0 else ""
        raise InputError(f"{self.source}:{line}: {layer}[{self.type}] {key}: {problem}", fix=fix)

    def integer(self, key: str, default: int | None = None) -> int:
        """A value; without a default the key must be there. As all readers here, fails on anything else."""
        text = self._text(key, None if default is None else str(default))
        return int(text) if _INT.fullmatch(text) else self.fail(key, f"got {shortened(text)}, expected an integer")

    def flag(self, key: str) -> bool:
        """Whether the key has a value other than 0."""
        return self.integer(key, 0) != 0

    def number(self, key: str, default: float) -> float:
        """A value, finite."""
        text = self._text(key, str(default))
        return float(text) if _FLOAT.fullmatch(text) else self.fail(key, f"got {shortened(text)}, expected a number")

    def integers(self, key: str) -> tuple[int, ...]:
        """A list, which must be there."""
        items = self._text(key).split(",")
        if not all(map(_INT.fullmatch, items)):
            self.fail(key, f"got {shortened(','.join(items))}, expected integers with commas between")
        return tuple(map(int, items))

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list, which must be there."""
        items = self._text(key).split(",")
        if not all(map(_FLOAT.fullmatch, items)):
            self.fail(key, f"got {shortened(','.join(items))}, expected numbers with commas between")
        return tuple(map(float, items))

    def choice(self, key: str, default: str, known: tuple[str, ...]) -> str:
        """One of the known words."""
        text = self._text(key, default)
        return text if text in known else self.fail(key, f"got {shortened(text)}, expected one of {', '.join(known)}")

    def refuse(self, *, unless: dict[str, str]) -> None:
        """Refuse keys that would change the result, unless they have the value that changes nothing."""
        for key, harmless in unless.items():
            text = self._text(key, harmless)
            same = float(text) == float(harmless) if _FLOAT.fullmatch(text) and harmless else text == harmless
            if not same:
                only = f"only {harmless} is supported" if harmless else "not supported"
                self.fail(key, f"got {shortened(text)}, {only}", fix="use a network without it")

    def _text(self, key: str, default: str | None = None) -> str:
        if key in self.options:
            return self.options[key][0]
        return default if default is not None else self.fail(key, "missing")


def shortened(text: str) -> str:
    """As written, in quotes, cut after 40 characters."""
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
