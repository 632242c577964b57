"""An ONNX file from elsewhere, in the form that the later steps take: one file, known shapes, an opset of our range."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import inliner, shape_inference, version_converter

from cspdeploy.core.errors import InputError
from cspdeploy.core.onnx_file import external_data_files
from cspdeploy.core.onnx_graph import DEFAULT_DOMAIN
from cspdeploy.core.types import StepRecord
from cspdeploy.export.decompose import decompose
from cspdeploy.export.rewrite import count_operators, without_weights, write_model

__all__ = ["MAX_FILE_BYTES", "adopt_onnx"]

MAX_FILE_BYTES = (1 << 31) - 1
"""A protocol buffer holds no more, so neither does an ONNX file without external data."""
MIN_IR_VERSION = 4
"""Before it every weight had to be listed as an input too."""

Shapes = Mapping[str, tuple[int | str, ...]]


def adopt_onnx(
    source: Path,
    target: Path,
    *,
    sha256: str,
    shapes: Shapes,
    opset: int | None = None,
    operators: frozenset[str] = frozenset(),
) -> StepRecord:
    """Copy `source` to `target` with its weights inside, its own functions written out, and these shapes.

    Args:
        sha256: of `source`, for the record.
        shapes: of every input and output; a free dimension is a name.
        opset: to convert it to; None: its own.
        operators: to be written with older ones.

    Raises:
        InputError: more than 2 GB, or it cannot be converted to that opset.
    """
    _refuse_large(source)
    model = onnx.load(source)
    before = count_operators(model.graph)
    if model.functions:
        model = inliner.inline_local_functions(model)
    written = decompose(model, operators)
    own = _opset(model)
    if opset is not None and opset != own:
        model = _convert(model, source, opset)
    external = external_data_files(source)
    _drop_weights_from_inputs(model)
    _fix_shapes(model.graph, shapes)
    _name_nodes(model.graph)
    write_model(model, target)
    detail = f"copied from {source.name} (SHA-256 {sha256[:12]}), opset {_opset(model)}"
    detail += f", converted from {own}" if _opset(model) != own else ""
    detail += ", weights of other files inside" if external else ""
    detail += "".join(f", {count} {name} in older operators" for name, count in written.items())
    facts = {
        "source_sha256": sha256, "opset_before": own, "opset": _opset(model), "external_data": external,
        "decomposed": written, "shapes": {name: list(shape) for name, shape in shapes.items()},
        "operators_before": before, "operators_after": count_operators(model.graph),
    }  # fmt: skip
    return StepRecord(name="onnx", outcome="done", detail=detail, facts=facts)


def _refuse_large(source: Path) -> None:
    names = external_data_files(source)
    size = source.stat().st_size + sum((source.parent / name).stat().st_size for name in names)
    if size > MAX_FILE_BYTES:
        raise InputError(
            f"{source}: {size / 1e9:.1f} GB with the weights that it keeps in {len(names)} other files, an ONNX file "
            "holds 2 GB",
            fix=f"verify it as it is: cspdeploy verify {source}",
        )


def _opset(model: onnx.ModelProto) -> int:
    return next((int(entry.version) for entry in model.opset_import if entry.domain in ("", DEFAULT_DOMAIN)), 1)


def _convert(model: onnx.ModelProto, source: Path, opset: int) -> onnx.ModelProto:
    """One opset at a time, so that what the converter does not know can be judged by itself."""
    own = _opset(model)
    for step in range(own, opset, 1 if opset > own else -1):
        following = step + 1 if opset > own else step - 1
        try:
            model = version_converter.convert_version(model, following)
        except Exception as error:  # the converter is native code that raises RuntimeError and its own
            if not _is_valid_in(model, following):
                reason = " ".join(str(error).split())[-160:]
                raise InputError(
                    f"{source}: has opset {own}, cannot be converted to {opset}: at {following} ({reason})",
                    fix=f"export it with opset {opset} where it was made",
                ) from error
            _set_opset(model, following)
    return model


def _is_valid_in(model: onnx.ModelProto, opset: int) -> bool:
    """Whether the graph is, as it stands, one of that opset.

    The converter knows nothing of operators whose new version only takes more types. Whether the meaning is the same
    too is seen where the copy is compared with the file.
    """
    if opset > _opset(model):
        return False  # upwards the same words may mean something new
    light = without_weights(model)
    _set_opset(light, opset)
    try:
        onnx.checker.check_model(light)
        shape_inference.infer_shapes(light, strict_mode=True, check_type=True)
    except (onnx.checker.ValidationError, shape_inference.InferenceError):
        return False
    return True


def _set_opset(model: onnx.ModelProto, opset: int) -> None:
    for entry in model.opset_import:
        if entry.domain in ("", DEFAULT_DOMAIN):
            entry.version = opset


def _drop_weights_from_inputs(model: onnx.ModelProto) -> None:
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    if len(inputs) != len(graph.input):
        kept = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in inputs]
        del graph.input[:]
        graph.input.extend(kept)
    model.ir_version = max(model.ir_version, MIN_IR_VERSION)


def _fix_shapes(graph: onnx.GraphProto, shapes: Shapes) -> None:
    """Write the shapes of inputs and outputs; what the file says of other tensors may not fit them and goes."""
    for value in (*graph.input, *graph.output):
        shape = value.type.tensor_type.shape
        del shape.dim[:]
        for dim in shapes[value.name]:
            added = shape.dim.add()
            if isinstance(dim, int):
                added.dim_value = dim
            else:
                added.dim_param = dim
    del graph.value_info[:]


def _name_nodes(graph: onnx.GraphProto) -> None:
    """A name for every node that has none: reports call nodes by name."""
    taken = {node.name for node in graph.node}
    for index, node in enumerate(graph.node):
        if not node.name:
            name = f"{node.op_type}_{index}"
            while name in taken:
                name += "_"
            node.name = name
            taken.add(name)
