"""A few lines of code on the page, with what to install and what to know."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from cspdeploy.core.types import Artifact, Manifest
from cspdeploy.report.html.markup import Markup, join, tag

__all__ = ["Snippet", "snippet_markup"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snippet:
    """A language: how the page calls it, what to install, and what to know of its pixels."""

    name: str
    title: str
    install: str
    note: str
    write: Callable[[Manifest, Artifact], str]


def snippet_markup(snippet: Snippet, source: str) -> Markup:
    """The source with its strings and comments set apart."""
    tokens = re.split(r'("(?:[^"\\\n]|\\.)*"|//[^\n]*)', source)
    parts = [
        token if i % 2 == 0 else tag("span", token, class_="string" if token.startswith('"') else "comment")
        for i, token in enumerate(tokens)
    ]
    return tag(
        "section",
        tag("h3", snippet.title),
        tag("p", tag("code", snippet.install), class_="install"),
        tag("pre", tag("code", *parts, class_=f"language-{snippet.name}"), tabindex="0"),
        tag("p", join(snippet.note), class_="remark"),
        class_="snippet",
    )  # fmt: skip
