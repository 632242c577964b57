"""Frozen dataclasses to JSON and back, strictly.

Reading checks every value against the annotation of its field. Unknown keys, missing keys and wrong types
raise `InputError` with the path of the bad field (``$.artifacts[2].sha256``), because a manifest comes from outside.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Any, Literal, TypeVar, Union

from cspdeploy.core.errors import InputError

__all__ = ["JsonObject", "from_json", "to_json"]

T = TypeVar("T")

JsonObject = dict[str, Any]


def to_json(value: object) -> Any:
    """Turn a dataclass (or tuples, dicts, scalars of them) into values that `json.dumps` writes as they are.

    NaN and infinities become the strings "nan", "inf", "-inf", since JSON has no word for them.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def from_json(kind: type[T], data: object, *, where: str = "$") -> T:
    """Build `kind`, a dataclass, from parsed JSON.

    Args:
        kind: the dataclass to build.
        data: what `json.loads` gave.
        where: path of `data` in its document, for messages.

    Raises:
        InputError: unknown key, missing key or wrong type, with its path.
    """
    if not isinstance(data, dict):
        raise InputError(f"{where}: got {_name(data)}, expected an object")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise InputError(f"{where}.{unknown[0]}: unknown key, expected one of {', '.join(fields)}")
    values: JsonObject = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}.{name}: missing key")
    try:
        return kind(**values)
    except ValueError as error:  # __post_init__ of the dataclass
        raise InputError(f"{where}: {error}") from error


def _convert(hint: Any, value: object, where: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast("type[object]", hint), value, where=where)
    if origin is Literal:
        return _literal(hint, value, where)
    if origin in (Union, types.UnionType):
        return _optional(hint, value, where)
    if origin is tuple:
        return _tuple(hint, value, where)
    if origin is dict:
        return _dict(hint, value, where)
    return _scalar(hint, value, where)


def _literal(hint: Any, value: object, where: str) -> object:
    allowed = typing.get_args(hint)
    if not any(value == one and type(value) is type(one) for one in allowed):  # True == 1, 2.0 == 2
        raise InputError(f"{where}: got {value!r}, expected one of {', '.join(map(repr, allowed))}")
    return value


def _optional(hint: Any, value: object, where: str) -> object:
    members = typing.get_args(hint)
    if value is None and type(None) in members:
        return None
    concrete = [member for member in members if member is not type(None)]
    tagged = _tagged(concrete, value)
    if tagged is not None:
        return from_json(tagged, value, where=where)
    for member in concrete[:-1]:
        try:
            return _convert(member, value, where)
        except InputError:
            continue
    return _convert(concrete[-1], value, where)


def _tagged(members: list[Any], value: object) -> Any:
    """The dataclass of a union whose `type`, a literal of one word, is the value's: its errors are the right ones."""
    tag = value.get("type") if isinstance(value, dict) else None
    return next((member for member in members if tag is not None and _tag_of(member) == (tag,)), None)


@functools.cache
def _tag_of(member: Any) -> tuple[object, ...]:
    hint = typing.get_type_hints(member).get("type") if dataclasses.is_dataclass(member) else None
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _tuple(hint: Any, value: object, where: str) -> tuple[object, ...]:
    if not isinstance(value, list):
        raise InputError(f"{where}: got {_name(value)}, expected a list")
    members = typing.get_args(hint)
    if len(members) == 2 and members[1] is Ellipsis:
        return tuple(_convert(members[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(value) != len(members):
        raise InputError(f"{where}: got {len(value)} items, expected {len(members)}")
    pairs = zip(members, value, strict=True)
    return tuple(_convert(member, item, f"{where}[{i}]") for i, (member, item) in enumerate(pairs))


def _dict(hint: Any, value: object, where: str) -> JsonObject:
    if not isinstance(value, dict):
        raise InputError(f"{where}: got {_name(value)}, expected an object")
    member = typing.get_args(hint)[1]
    return {str(key): _convert(member, item, f"{where}.{key}") for key, item in value.items()}


def _scalar(hint: Any, value: object, where: str) -> object:
    if hint is float and isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise InputError(f"{where}: got {_name(value)}, expected {hint.__name__}")
    return value


def _name(value: object) -> str:
    return "null" if value is None else type(value).__name__
