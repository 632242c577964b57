"""What a package says of its weights to whoever passes it on: licence and origin, as a page of plain text."""

from __future__ import annotations

import re
from pathlib import Path

from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import ModelSpec

__all__ = ["LICENCE_FILE", "licence_page", "read_licence"]

LICENCE_FILE = "LICENCE.txt"
MAX_LICENCE_BYTES = 1 << 20
"""The longest licence in common use, the GPL, has 35 KB."""
TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".html", ".pdf"})
_FILE_NAME = re.compile(r"(licen[sc]e|copying|notice)([.-].*)?", re.IGNORECASE)
"""What such files are called; no licence is."""


def read_licence(given: str) -> str:
    """The text of a licence: of the file of that name, where there is one; else what was given, such as "Apache-2.0".

    Raises:
        InputError: the name of a file that is not there; a file that is not text, or too large for a licence.
    """
    if not given.strip():
        return ""
    path = Path(given)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # too long for a name, or with a NUL: a text then
        is_file = False
    if not is_file:
        one_word = len(given.split()) == 1
        named = "/" in given or path.suffix.lower() in TEXT_SUFFIXES or _FILE_NAME.fullmatch(given) is not None
        if one_word and named:
            raise InputError(
                f"--licence {given}: no such file", fix="name a file, or the licence: --licence Apache-2.0"
            )
        return given.strip()
    try:
        with path.open("rb") as file:
            data = file.read(MAX_LICENCE_BYTES + 1)
        text = data.decode("utf-8")
    except OSError as error:
        raise InputError(f"--licence {given}: {error.strerror or error}", fix="make it readable") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--licence {given}: not text in UTF-8", fix="give its text as a file, or its name") from error
    if len(data) > MAX_LICENCE_BYTES or "\0" in text or not text.strip():
        raise InputError(
            f"--licence {given}: {len(data)} bytes, expected a text of 1 to {MAX_LICENCE_BYTES}",
            fix="give its text as a file, or its name",
        )
    return text.replace("\r\n", "\n").strip()


def licence_page(spec: ModelSpec, licence: str) -> str:
    """The page: what is known of the weights, and the licence's text where it is longer than a line."""
    origin = spec.provenance
    long = "\n" in licence
    named = origin.licence or ("see below" if long else "not stated")
    facts = {
        "model": spec.name,
        "licence": licence if licence and not long else named,
        "weights": "UNTRAINED: random, no answer means anything" if origin.untrained else origin.source,
        "origin": origin.origin,
        "data": origin.dataset,
        "made by": origin.command,
        "SHA-256": origin.weights_sha256,
    }
    if origin.accuracy is not None:
        found = origin.accuracy
        facts["accuracy"] = (
            f"top-1 {100 * found.top1:.2f} %, top-5 {100 * found.top5:.2f} % on {found.dataset} "
            f"({found.num_images} images)"
        )
    lines = [f"{name + ':':<10} {' '.join(text.split())}" for name, text in facts.items() if text]
    page = "The weights in this package\n\n" + "\n".join(lines) + "\n"
    return f"{page}\n{'-' * 72}\n\n{licence}\n" if long else page
