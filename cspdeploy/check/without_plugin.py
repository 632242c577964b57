"""Files that end in TensorRT's plugin, which no engine here has: what lies in front of it is checked in its place."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from cspdeploy.check.subject import Candidate, Subject
from cspdeploy.core.detection.spec import TRT_OUTPUTS, Suppression
from cspdeploy.core.errors import InputError
from cspdeploy.core.onnx_edit import cut_part, with_metadata
from cspdeploy.core.onnx_file import check_external_data
from cspdeploy.core.onnx_graph import Graph, Node, read_onnx

__all__ = ["PLUGIN", "PLUGIN_NOTE", "cut_off", "suppressed_tensors", "without_plugins"]

PLUGIN = "EfficientNMS_TRT"
PLUGIN_NOTE = f"the plugin {PLUGIN} itself is not run: its boxes and scores are compared in front of it"

_SUPPRESSED = ("decode/boxes", "decode/scores")
"""As the export names them in front of a suppression in the graph, which goes over a part of them."""
_FIXED = {"background_class": -1, "box_coding": 0, "score_activation": 0, "class_agnostic": 0}
"""No class is background, corners, scores as they are, class by class: what boxes and scores of the contract need. The
plugin's own defaults: NVIDIA/TensorRT, plugin/efficientNMSPlugin/README.md; a missing attribute is one of them."""
_DEFAULTS = _FIXED | {"score_threshold": 0.25, "iou_threshold": 0.5, "max_output_boxes": 100}


def without_plugins(subject: Subject, folder: Path) -> Subject:
    """The subject with each such file in place of itself cut off in front of the plugin.

    Args:
        folder: for the copies; must outlive what is returned.
    """
    return dataclasses.replace(
        subject, candidates=tuple(_cut(made, folder, _rule_of(subject)) for made in subject.candidates)
    )


def _rule_of(subject: Subject) -> Suppression | None:
    detection = subject.manifest.spec.detection if subject.manifest is not None else None
    return detection.suppression if detection is not None else None


def plugin_fault(node: Node, graph: Graph, rule: Suppression) -> str:
    """Why the plugin would not leave the boxes that the manifest tells of, or empty: attributes, inputs, outputs."""
    asked = _FIXED | {
        "score_threshold": rule.score_threshold, "iou_threshold": rule.iou_threshold,
        "max_output_boxes": rule.max_detections,
    }  # fmt: skip
    for name, expected in asked.items():
        got = node.attributes.get(name, _DEFAULTS[name])
        if not isinstance(got, int | float) or not math.isclose(got, expected, rel_tol=1e-6):  # stored as float32
            return f"{PLUGIN}: {name} is {got!r}, expected {expected}"
    if len(node.inputs) != 2:  # their order is seen by their numbers, which are compared in it
        return f"{PLUGIN}: takes {list(node.inputs)}, expected boxes, then scores"
    given = _aliases(graph)
    outputs = tuple(given.get(value.name, value.name) for value in graph.outputs)
    if tuple(value.name for value in graph.outputs) != TRT_OUTPUTS or outputs != node.outputs:
        return f"{PLUGIN}: gives {list(node.outputs)}, the graph's outputs are {list(outputs)}"
    return ""


def _aliases(graph: Graph) -> dict[str, str]:
    """Names that an Identity gives to a tensor."""
    return {node.outputs[0]: node.inputs[0] for node in graph.nodes if node.operator == "Identity"}


def suppressed_tensors(graph: Graph) -> tuple[str, ...]:
    """Boxes and scores of all candidates in front of the suppression; empty where there is none in the graph."""
    plugin = next((node for node in graph.nodes if node.operator == PLUGIN), None)
    if plugin is not None:
        return tuple(plugin.inputs[:2])
    made = {name for node in graph.nodes for name in node.outputs}
    return _SUPPRESSED if made.issuperset(_SUPPRESSED) else ()


def cut_off(path: Path, *, targets: Sequence[str], folder: Path) -> Path:
    """A copy of an ONNX file, under its name, that ends in these tensors.

    Args:
        folder: where it is written, with copies of the files that hold its weights.

    Raises:
        InputError: it cannot be read, or its weights lie outside its folder.
    """
    check_external_data(path)
    model = read_onnx(path)
    data, _, _ = cut_part(path.read_bytes(), model.graph, targets=targets, given={})
    folder.mkdir(parents=True, exist_ok=True)
    for location in model.external_data:
        (folder / location).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path.parent / location, folder / location)
    copy = folder / path.name
    copy.write_bytes(with_metadata(data, model.metadata))
    return copy


def _cut(made: Candidate, folder: Path, rule: Suppression | None) -> Candidate:
    """As it is where there is no plugin in it: its engine then says what is wrong with the file."""
    if made.decode != "trt" or made.absent:
        return made
    try:
        model = read_onnx(made.path)
        targets = suppressed_tensors(model.graph)
        named = tuple(value.name for value in model.graph.outputs) == made.output_names
        plugin = next((node for node in model.graph.nodes if node.operator == PLUGIN), None)
        if not named or plugin is None:
            return made
        fault = plugin_fault(plugin, model.graph, rule) if rule is not None else ""
        path = cut_off(made.path, targets=targets, folder=folder)
    except (InputError, OSError):
        return made
    return dataclasses.replace(
        made, path=path, decode="decoded", output_names=targets, output_dtypes=("float32", "float32"), cut=True,
        plugin_fault=fault,
    )  # fmt: skip
