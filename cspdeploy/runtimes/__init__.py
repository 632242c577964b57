"""Engines behind one `Session` protocol. A runtime is one file here that defines `RUNTIMES`; nothing else lists it."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import re
import typing

from cspdeploy.core.errors import InputError, RuntimeUnavailableError
from cspdeploy.runtimes.base import Runtime

__all__ = ["all_runtimes", "require_runtime"]


@functools.cache
def all_runtimes() -> dict[str, Runtime]:
    """Every runtime of this folder by name, whether or not it can be used here. Loads no engine."""
    import pkgutil

    found: dict[str, Runtime] = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        name = f"{__name__}.{module.name}"
        if not _defines_runtimes(name):
            continue
        for runtime in importlib.import_module(name).RUNTIMES:
            if runtime.name in found:
                raise ValueError(f"runtime '{runtime.name}' is defined twice")
            found[runtime.name] = runtime
    return dict(sorted(found.items(), key=lambda item: item[1].device != "cpu"))


def _defines_runtimes(name: str) -> bool:
    """Told from the source: what lies beside the runtimes and is none may import its engine at its top."""
    spec = importlib.util.find_spec(name)
    get_source = getattr(spec.loader, "get_source", None) if spec else None  # zipimporter has it too
    source = get_source(name) if get_source is not None else None
    return source is not None and re.search(r"^RUNTIMES\b", source, re.MULTILINE) is not None


def require_runtime(name: str) -> Runtime:
    """The runtime of that name, which must be usable here. Where the name tells the file, no other one is read.

    Raises:
        InputError: unknown name.
        RuntimeUnavailableError: its engine or device is missing.
    """
    found = _find_runtime(name)
    if found is None:
        runtimes = all_runtimes()
        near = difflib.get_close_matches(name, runtimes, n=1)
        fix = f"--runtime {near[0]}" if near else "cspdeploy doctor"
        raise InputError(f"--runtime {name}: unknown, expected one of {', '.join(runtimes)}", fix=fix)
    missing = found.missing()
    if missing is not None:
        raise RuntimeUnavailableError(f"--runtime {name}: {missing[0]}", fix=missing[1])
    return found


def _find_runtime(name: str) -> Runtime | None:
    """A device opens one engine: "ort-cpu" is looked for in ort.py first. To read all of them takes some 10 ms."""
    for stem in dict.fromkeys((name.rpartition("-")[0], name)):
        module = f"{__name__}.{stem.replace('-', '_')}"
        if stem and stem.replace("-", "_").isidentifier() and _is_here(module) and _defines_runtimes(module):
            found = [one for one in importlib.import_module(module).RUNTIMES if one.name == name]
            if found:
                return typing.cast("Runtime", found[0])
    return all_runtimes().get(name)


def _is_here(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
