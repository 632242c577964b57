"""Whether a node keeps a rule of a target: one function a kind of rule. Each says what the node has, or nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cspdeploy.check.lint_scope import Scope
from cspdeploy.core.errors import InputError
from cspdeploy.core.onnx_graph import Node, Tensor
from cspdeploy.core.targets import Rule

__all__ = ["breaks_rule"]


def breaks_rule(rule: Rule, node: Node, scope: Scope) -> str:
    """What the node has instead; empty where it keeps the rule, or where the file does not tell."""
    if rule.only_if is not None and _text(node.attributes.get(rule.only_if[0])) != rule.only_if[1]:
        return ""
    return _CHECKS[rule.kind](rule, node, scope)


def _text(value: object) -> object:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _element_type(rule: Rule, node: Node, scope: Scope) -> str:
    for position in rule.positions:
        value = scope.value(node.inputs[position]) if position < len(node.inputs) and node.inputs[position] else None
        if value is not None and value.dtype not in ("undefined", *rule.values):
            return f"input {position} of {value.dtype}"
    return ""


def _constant(rule: Rule, node: Node, scope: Scope) -> str:
    for position in rule.positions:
        if position < len(node.inputs) and node.inputs[position] and node.inputs[position] not in scope.constants:
            return f"input {position} ('{node.inputs[position]}') is computed while it runs"
    return ""


def _spatial(rule: Rule, node: Node, scope: Scope) -> str:
    kernel = node.attributes.get("kernel_shape")
    num = len(kernel) if isinstance(kernel, tuple) else None
    if num is None and len(node.inputs) > 1:  # a convolution without the attribute: two dimensions are channels
        weights = scope.value(node.inputs[1])
        num = None if weights is None or weights.shape is None else len(weights.shape) - 2
    return "" if num is None or num in rule.values else f"{num} spatial dimensions"


def _rank(rule: Rule, node: Node, scope: Scope) -> str:
    value = scope.value(node.inputs[0]) if node.inputs else None
    if value is None or value.shape is None or len(value.shape) in rule.values:
        return ""
    return f"an input of {len(value.shape)} dimensions"


def _attribute(rule: Rule, node: Node, scope: Scope) -> str:
    value = node.attributes.get(rule.attribute, rule.default)
    text = _text(value)
    return "" if text is None or text in rule.values else f"{rule.attribute} {text!r}"


def _unused_output(rule: Rule, node: Node, scope: Scope) -> str:
    for position in rule.positions:
        if position < len(node.outputs) and node.outputs[position]:
            return f"output {position} ('{node.outputs[position]}')"
    return ""


def _zero_point(rule: Rule, node: Node, scope: Scope) -> str:
    tensor = _third_input(node, scope)
    if tensor is None:
        return ""
    try:
        values = tensor.array()
    except InputError:  # a type that numpy lacks, such as float8, for which there is no asymmetric form
        return ""
    num = int(np.count_nonzero(values))
    return f"{num} of {values.size} zero points are not 0, the first {values[values != 0].flat[0]}" if num else ""


def _zero_point_dtype(rule: Rule, node: Node, scope: Scope) -> str:
    dtype = _quantised_dtype(node, scope)
    return "" if dtype in ("", *rule.values) else f"quantised values of {dtype}"


def _quantised_dtype(node: Node, scope: Scope) -> str:
    """Type of the integers. Without a zero point QuantizeLinear makes uint8, DequantizeLinear takes what comes."""
    if len(node.inputs) > 2 and node.inputs[2]:
        value = scope.value(node.inputs[2])
        return value.dtype if value is not None else ""
    if node.operator == "QuantizeLinear":
        return "" if "output_dtype" in node.attributes else "uint8"
    value = scope.value(node.inputs[0]) if node.inputs else None
    return value.dtype if value is not None and value.dtype != "undefined" else ""


def _third_input(node: Node, scope: Scope) -> Tensor | None:
    name = node.inputs[2] if len(node.inputs) > 2 else ""
    where: Scope | None = scope
    while where is not None:
        if name in where.graph.initializers:
            return where.graph.initializers[name]
        for maker in where.graph.nodes:
            if name and maker.operator == "Constant" and name in maker.outputs:
                value = maker.attributes.get("value")
                return value if isinstance(value, Tensor) else None
        where = where.outer
    return None


def _form(rule: Rule, node: Node, scope: Scope) -> str:
    if rule.attribute and rule.attribute not in node.attributes:
        return ""
    with_attribute = f" with the attribute {rule.attribute}" if rule.attribute else ""
    return f"{node.operator}{with_attribute} of opset {scope.model.opsets.get(node.domain)}"


_CHECKS: dict[str, Callable[[Rule, Node, Scope], str]] = {
    "constant": _constant, "spatial": _spatial, "rank": _rank, "attribute": _attribute,
    "unused-output": _unused_output, "zero-point": _zero_point, "zero-point-dtype": _zero_point_dtype, "form": _form,
    "element-type": _element_type,
}  # fmt: skip
