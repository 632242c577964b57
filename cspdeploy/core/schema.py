"""JSON Schema of our dataclasses, by the rules of `cspdeploy.core.codec`: what `to_json` writes is valid by it."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from typing import Any, Literal, Union

from cspdeploy.core.codec import JsonObject

__all__ = ["DIALECT", "json_schema"]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SCALARS: dict[Any, JsonObject] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    bool: {"type": "boolean"},
    # JSON has no word for them, so the codec writes strings.
    float: {"anyOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}]},
    type(None): {"type": "null"},
    Any: {},
}


def json_schema(kind: type, *, title: str) -> JsonObject:
    """The schema (2020-12) of the JSON that `to_json` makes of `kind`, a dataclass.

    Every field is required, since every field is written, and there are no others. A field `schema_version` has its
    default as its only value. Dataclasses inside are in `$defs`, by name.

    Raises:
        TypeError: a field whose type has no form in JSON.
    """
    definitions: dict[str, JsonObject] = {}
    body = _object(kind, definitions)
    schema: JsonObject = {"$schema": DIALECT, "title": title, **body}
    if definitions:
        schema["$defs"] = dict(sorted(definitions.items()))
    return schema


def _object(kind: Any, definitions: dict[str, JsonObject]) -> JsonObject:
    hints = typing.get_type_hints(kind)
    properties: JsonObject = {}
    for field in dataclasses.fields(kind):
        if field.name == "schema_version":
            properties[field.name] = {"const": field.default}
        else:
            properties[field.name] = _of_hint(hints[field.name], definitions, where=f"{kind.__name__}.{field.name}")
    summary = (inspect.getdoc(kind) or "").partition("\n\n")[0].replace("\n", " ")
    return {
        "description": summary, "type": "object", "properties": properties, "required": list(properties),
        "additionalProperties": False,
    }  # fmt: skip


def _of_hint(hint: Any, definitions: dict[str, JsonObject], *, where: str) -> JsonObject:
    if hint in _SCALARS:
        return dict(_SCALARS[hint])
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = {}  # a class that holds itself is met again before it is done
            definitions[hint.__name__] = _object(hint, definitions)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_of_hint(one, definitions, where=where) for one in arguments]}
    if origin is tuple:
        return _array(arguments, definitions, where=where)
    if origin is dict and arguments[0] is str:
        return {"type": "object", "additionalProperties": _of_hint(arguments[1], definitions, where=where)}
    raise TypeError(f"{where}: {hint} has no form in JSON")


def _array(members: tuple[Any, ...], definitions: dict[str, JsonObject], *, where: str) -> JsonObject:
    if len(members) == 2 and members[1] is Ellipsis:
        return {"type": "array", "items": _of_hint(members[0], definitions, where=where)}
    items = [_of_hint(member, definitions, where=where) for member in members]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
