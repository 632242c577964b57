"""A detector's files in a form that can be looked into: without suppression, or with nothing behind the heads.

Boxes that a graph has suppressed have no counterpart in the network, and no engine here has TensorRT's plugin. What
they are chosen from has one: boxes and scores of all candidates. Where those are not in a file, its heads' maps are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt

from cspdeploy.check.subject import Candidate, Subject
from cspdeploy.check.without_plugin import cut_off, suppressed_tensors
from cspdeploy.core.catalog import EAGER
from cspdeploy.core.detection.decisions import SCORE_GAIN
from cspdeploy.core.detection.postprocess import candidates_of
from cspdeploy.core.detection.spec import Detection
from cspdeploy.core.errors import InputError
from cspdeploy.core.onnx_graph import read_onnx

__all__ = ["DetectorForm", "bring_into", "detection_of", "form_of", "in_golden_form", "note_on", "score_gains"]

Array = npt.NDArray[Any]
DetectorForm = Literal["", "decoded", "raw"]
"""What both sides give: their own outputs, candidates, or the heads' maps."""


def detection_of(subject: Subject | None) -> Detection | None:
    """How the outputs of its network become boxes; None where they do not."""
    return subject.manifest.spec.detection if subject is not None and subject.manifest is not None else None


def form_of(made: Candidate | None, detection: Detection | None) -> DetectorForm:
    """The form in which a candidate is looked into, and so its reference too."""
    if made is None or detection is None or made.decode is None:
        return ""
    if made.format == "onnx" and made.decode == "ultralytics":
        return "raw"  # one tensor, whose parts have no names
    return "raw" if made.decode == "raw" else "decoded"


def bring_into(made: Candidate, form: DetectorForm, detection: Detection | None, *, folder: Path) -> Candidate:
    """The candidate with the outputs of that form: a cut copy of a file, the network itself without its decoding.

    Args:
        folder: for the copy; must outlive what is returned.

    Raises:
        InputError: it has no such tensors inside.
    """
    if detection is None or not form or made.absent or made.decode in (None, form):
        return made
    if made.format == EAGER and made.spec is not None and form == "raw":
        raw = dataclasses.replace(detection, decode="raw")
        spec = dataclasses.replace(made.spec, detection=raw, outputs=raw.network_outputs)
        return dataclasses.replace(made, spec=spec, output_names=raw.network_outputs, decode="raw")
    targets: tuple[str, ...] = ()
    if made.format == "onnx":
        graph = read_onnx(made.path).graph
        wanted = detection.raw_outputs if form == "raw" else suppressed_tensors(graph)
        inside = {name for node in graph.nodes for name in node.outputs}
        targets = wanted if inside.issuperset(wanted) else ()
    if not targets:
        what = "maps of the heads" if form == "raw" else "boxes and scores of all candidates"
        raise InputError(
            f"{made.path}: its outputs are those of '{made.decode}', and it has no {what} inside",
            fix="cspdeploy blame with files of the same --decode",
        )
    path = cut_off(made.path, targets=targets, folder=folder)
    return dataclasses.replace(made, path=path, decode=form, output_names=targets, output_dtypes=(), cut=True)


def note_on(made: Candidate, form: DetectorForm) -> str:
    """What of a candidate is not looked into, or empty."""
    if not form or made.decode == form:
        return ""
    if form == "raw":
        return "looked into as far as the maps of the heads: what decodes them is not"
    return "looked into as far as boxes and scores of all candidates: the suppression behind them is not"


def in_golden_form(outputs: Mapping[str, Array], subject: Subject, form: DetectorForm) -> dict[str, Array]:
    """Outputs under the names of the golden ones, and decoded where those are.

    Args:
        outputs: in the order of that form.
    """
    detection = detection_of(subject)
    if detection is None or not form:
        return dict(outputs)
    own = dict(zip(detection.raw_outputs if form == "raw" else subject.outputs_fp64, outputs.values(), strict=True))
    if form == "raw" != detection.network_decode:
        boxes_NA4, scores_NAC = candidates_of(own, detection, "raw")
        return dict(zip(subject.outputs_fp64, (boxes_NA4, scores_NAC), strict=True))
    return own


def score_gains(form: DetectorForm) -> Mapping[int, float]:
    """By how much the budget of an output is widened in INT8, by its place: that of scores, as `verify` does."""
    return {1: SCORE_GAIN} if form == "decoded" else {}
