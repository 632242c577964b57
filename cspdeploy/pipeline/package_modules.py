"""Which modules of cspdeploy a zip application needs: found by following imports, so that no list goes out of date."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.resources
import importlib.util
import marshal
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

from cspdeploy import runtimes
from cspdeploy.core.errors import InputError

__all__ = ["PackageFile", "compiled", "needed_files", "runtime_modules"]

ROOT = "cspdeploy"
_TYPING_ONLY = ("TYPE_CHECKING", "typing.TYPE_CHECKING")
_UNCHECKED_HASH = (1).to_bytes(4, "little")
"""Of PEP 552: the bytecode carries its source's hash, which is not compared at every start."""
_MARSHAL_VERSION = 2
"""The last whose bytes do not depend on how often an object happens to be referred to in the process that writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageFile:
    """A file of cspdeploy itself: `name` as in the installed package, "cspdeploy/core/types.py"."""

    name: str
    source: Path


def runtime_modules(formats: Iterable[str]) -> tuple[str, ...]:
    """Modules of the engines that open artifacts of these formats.

    They are found from their folder when a program runs, and so no import leads to them. What only judges others, and
    is no engine that an application would use, stays out: it needs torch or onnx.
    """
    wanted = set(formats)
    found = []
    for module in pkgutil.iter_modules(runtimes.__path__):
        name = f"{runtimes.__name__}.{module.name}"
        if "RUNTIMES" not in _assigned(_parse(_find(name))):
            continue
        rows = importlib.import_module(name).RUNTIMES
        if any(row.timed and row.role == "engine" and row.formats & wanted for row in rows):
            found.append(name)
    return tuple(sorted(found))


@functools.cache
def needed_files(start: tuple[str, ...]) -> tuple[PackageFile, ...]:
    """Every module that these modules can import, wherever in them the import stands, and the data files they name.

    Imports for type checkers alone do not count. A data file counts where a module beside it names it in a string.

    Args:
        start: names of modules of cspdeploy.

    Raises:
        InputError: cspdeploy itself is not installed as plain files.
    """
    modules: dict[str, ModuleSpec] = {}
    data: set[Path] = set()
    waiting = list(start)
    while waiting:
        name = waiting.pop()
        if name in modules:
            continue
        modules[name] = spec = _find(name)
        tree = _parse(spec)
        waiting += [parent for parent in _parents(name) if parent not in modules]
        waiting += [found for found in _imports(tree, spec) if found not in modules]
        data |= _named_data(tree, _origin(spec).parent)
    top = _origin(_find(ROOT)).parent.parent
    paths = {_origin(spec) for spec in modules.values()} | data
    return tuple(PackageFile(name=path.relative_to(top).as_posix(), source=path) for path in sorted(paths))


def compiled(files: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """Bytecode of modules, beside their sources: Python keeps none for what lies in a zip file.

    Without it a program of 65 modules was compiled at every start, in 0.24 s of CPU time; other versions of Python than
    this one still do that. The same sources and version give the same bytes.

    Args:
        files: name in the package: the file.
        folder: where to write, made here.
    """
    folder.mkdir()
    found: dict[str, Path] = {}
    for number, (name, source) in enumerate(sorted(files.items())):
        if source.suffix != ".py":
            continue
        data = source.read_bytes()
        code = compile(data, name, "exec", dont_inherit=True, optimize=0)
        try:
            bytecode = marshal.dumps(code, _MARSHAL_VERSION)
        except ValueError:  # holds a constant that is newer than this form: compiled at the start, as without
            continue
        found[f"{name}c"] = path = folder / f"{number}.pyc"
        path.write_bytes(importlib.util.MAGIC_NUMBER + _UNCHECKED_HASH + importlib.util.source_hash(data) + bytecode)
    return found


def _find(name: str) -> ModuleSpec:
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)
    return spec


def _origin(spec: ModuleSpec) -> Path:
    path = Path(spec.origin or "")
    if not spec.has_location or not path.is_file():
        raise InputError(
            f"{spec.name}: not installed as a file ({spec.origin}), so that it cannot be packed",
            fix="install cspdeploy with pip, and run it from there",
        )
    return path


def _parse(spec: ModuleSpec) -> ast.Module:
    return ast.parse(_origin(spec).read_bytes())


def _assigned(tree: ast.Module) -> set[str]:
    """Names that a module defines at its top."""
    targets: list[ast.expr] = []
    for node in tree.body:
        targets += node.targets if isinstance(node, ast.Assign) else []
        targets += [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _imports(tree: ast.AST, spec: ModuleSpec) -> Iterator[str]:
    """Modules of cspdeploy that a module imports; `from package import name` counts as both, where both exist."""
    for node in _run_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if _is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom):
            package = spec.name if spec.submodule_search_locations is not None else spec.name.rpartition(".")[0]
            dots = "." * node.level
            base = importlib.util.resolve_name(dots + (node.module or ""), package) if node.level else node.module or ""
            if not _is_ours(base):
                continue
            yield base
            if _find(base).submodule_search_locations is not None:
                names = (f"{base}.{alias.name}" for alias in node.names)
                yield from (name for name in names if importlib.util.find_spec(name) is not None)


def _run_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker reads."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) in _TYPING_ONLY:
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def _is_ours(name: str) -> bool:
    return name == ROOT or name.startswith(f"{ROOT}.")


def _named_data(tree: ast.AST, folder: Path) -> set[Path]:
    """Files that are no modules, beside a module that names them in a string."""
    beside = {path.name: path for path in folder.iterdir() if path.is_file() and path.suffix not in (".py", ".pyc")}
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return {beside[text] for text in strings if text in beside}
