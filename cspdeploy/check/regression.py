"""A new bundle against an old one: what held and no longer does, what grew, what became slower. Shapes: N images."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path

from cspdeploy.check.frontend_rows import network_outputs, on_images
from cspdeploy.check.latency import gpu_settings, measure_latency
from cspdeploy.check.opening import CheckedSession, start_session
from cspdeploy.check.regression_boxes import compare_boxes, suppression_of
from cspdeploy.check.regression_rows import Judgement, judge_rows
from cspdeploy.check.rung_check import run_all
from cspdeploy.check.rungs import Rung, list_rungs
from cspdeploy.check.settings import Progress, VerifySettings
from cspdeploy.check.subject import ORIGINAL, Subject, bundle_subjects
from cspdeploy.check.without_plugin import without_plugins
from cspdeploy.core.catalog import ACCURACY_BUDGET, EAGER
from cspdeploy.core.errors import CspDeployError, InputError
from cspdeploy.core.metrics import relative_l2, top_k
from cspdeploy.core.preprocess import preprocess
from cspdeploy.core.results import ParityRow, Regression
from cspdeploy.core.sizes import Size, base_kind, size_label, size_of
from cspdeploy.runtimes.base import Outputs

__all__ = ["compare_bundles", "require_comparable"]

_NOT_RUN = ("not-checkable", "crash", "hang", "error")
"""Verdicts of rows that have no outputs to compare."""

Key = tuple[str, str]
"""Artifact and runtime."""


def compare_bundles(
    old: Path, new: Path, *, old_rows: Iterable[ParityRow], new_rows: Iterable[ParityRow], settings: VerifySettings,
    progress: Progress = lambda what, done, total: None,
) -> tuple[Regression, ...]:  # fmt: skip
    """Compare every artifact on every runtime of either bundle.

    Outputs are compared on the new bundle's golden images, each bundle preparing them by its own contract. They are
    judged where both were made from the same weights; other weights give other outputs, which are only shown. Latency
    is measured in pairs, old and new interleaved.

    Args:
        old_rows, new_rows: what `verify` found for each bundle; rows of other bundles are passed over.
        settings: runtimes, latency (None: not measured), isolation and time limit.

    Raises:
        InputError: a bundle cannot be read, or its classes or outputs are not those of the other.
        TamperedError: a file is not the one of its manifest.
    """
    before, after = require_comparable(old, new)
    then, now = _by_key(old_rows, before), _by_key(new_rows, after)
    keys = list(dict.fromkeys([*now, *then]))
    found = []
    with tempfile.TemporaryDirectory(prefix="cspdeploy-") as copies:
        pairs = {
            size: _Pair(before[size], after[size], settings, folder=Path(copies) / (size_label(size) or "first"))
            for size in after if size in before
        }  # fmt: skip
        for done, key in enumerate(keys):
            progress(f"against {old.name}: {key[0]} on {key[1]}", done, len(keys))
            if key in then and key in now:
                found.append(pairs[size_of(key[0])].compare(key, then[key], now[key]))
            else:
                found.append(_only_one(key, then.get(key), now.get(key)))
    return tuple(found)


def _by_key(rows: Iterable[ParityRow], subjects: Mapping[Size | None, Subject]) -> dict[Key, ParityRow]:
    """The rows of artifacts: the network itself and the preprocessing are not shipped."""
    artifacts = {
        (subject.name, made.artifact)
        for subject in subjects.values()
        for made in subject.candidates
        if base_kind(made.artifact) not in (EAGER, ORIGINAL)
    }
    return {(row.artifact, row.runtime): row for row in rows if (row.bundle, row.artifact) in artifacts}


def _only_one(key: Key, then: ParityRow | None, now: ParityRow | None) -> Regression:
    """An artifact on a runtime of which one bundle has nothing."""
    artifact, runtime = key
    return Regression(
        artifact=artifact, runtime=runtime, verdict="new" if now else "gone",
        reason="" if now else "in the old bundle, not in the new one",
        old_verdict=then.verdict if then else "", new_verdict=now.verdict if now else "",
        old_bytes=then.num_bytes if then else None, new_bytes=now.num_bytes if now else None,
    )  # fmt: skip


def require_comparable(old: Path, new: Path) -> tuple[dict[Size | None, Subject], dict[Size | None, Subject]]:
    """Both bundles by size, of which the old one can stand in for the new one.

    Raises:
        InputError: one cannot be read, or its classes or outputs are not those of the other.
        TamperedError: a file is not the one of its manifest.
    """
    before, after = ({subject.size_px: subject for subject in bundle_subjects(place)} for place in (old, new))
    common = [size for size in after if size in before]
    if not common:
        raise InputError(f"--against {old}: has no input size of {new}", fix="compare bundles of the same sizes")
    for size in common:
        _require_alike(before[size], after[size])
    return before, after


def _require_alike(old: Subject, new: Subject) -> None:
    shapes = [{name: array.shape[1:] for name, array in one.outputs_fp64.items()} for one in (old, new)]
    what = ""
    if old.task != new.task or shapes[0] != shapes[1]:
        what = f"its outputs are {_describe(shapes[0])}, those of {new.name} {_describe(shapes[1])}"
    elif old.labels != new.labels:
        pair = next((pair for pair in zip_longest(old.labels, new.labels) if pair[0] != pair[1]), ("", ""))
        what = f"its {len(old.labels)} classes are not those of {new.name}: '{pair[0]}' there, '{pair[1]}' here"
    elif old.manifest is None or new.manifest is None or new.golden is None:
        what = "is no bundle"
    if what:
        raise InputError(f"--against {old.name}: {what}", fix="compare bundles of the same classes and outputs")


def _describe(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())


class _Pair:
    """Two bundles at one size, their inputs ready. `folder`: for copies of files that no engine reads whole."""

    def __init__(self, old: Subject, new: Subject, settings: VerifySettings, *, folder: Path) -> None:
        self._settings = settings
        self._classes = new.task == "classify"
        self._same_weights = self._other_contract = False
        x_NCHW = next(iter(new.feeds.values()))
        if old.manifest is not None and new.manifest is not None and new.golden is not None:
            old_spec, new_spec = old.manifest.spec, new.manifest.spec
            sha256 = old_spec.provenance.weights_sha256
            self._same_weights = bool(sha256) and sha256 == new_spec.provenance.weights_sha256
            self._other_contract = old_spec.preprocess != new_spec.preprocess
            if self._other_contract:
                x_NCHW = preprocess(list(new.golden.images), old_spec.preprocess)
        if new.golden is not None:
            old = on_images(old, new.golden.images, x_NCHW)
        old, new = without_plugins(old, folder / "old"), without_plugins(new, folder / "new")
        self._untrained = old.untrained or new.untrained
        self._other_rule = suppression_of(old) != suppression_of(new)
        self._subjects = (old, new)
        self._rungs = [
            {
                (rung.candidate.artifact, rung.runtime.name): rung
                for rung in list_rungs(subject, runtimes=list(settings.runtimes), device=settings.device)
            }
            for subject in (old, new)
        ]

    def compare(self, key: Key, then: ParityRow, now: ParityRow) -> Regression:
        artifact, runtime = key
        found = Regression(
            artifact=artifact, runtime=runtime, verdict="same", old_verdict=then.verdict, new_verdict=now.verdict,
            old_bytes=then.num_bytes, new_bytes=now.num_bytes,
        )  # fmt: skip
        judgement = Judgement()
        precision = next(made.precision for made in self._subjects[1].candidates if made.artifact == artifact)
        judge_rows(then, now, judgement, accuracy_budget=ACCURACY_BUDGET[precision])
        if then.verdict not in _NOT_RUN and now.verdict not in _NOT_RUN:
            found = self._measure(found, then, now, judgement)
        return judgement.apply(found)

    def _measure(self, found: Regression, then: ParityRow, now: ParityRow, judgement: Judgement) -> Regression:
        """Outputs and latency, from a fresh session of each."""
        rungs = [rungs[(found.artifact, found.runtime)] for rungs in self._rungs]
        sessions = [start_session(rung.runtime, rung.request, self._settings) for rung in rungs]
        try:
            for session in sessions:
                session.wait()
            found, boxes = self._compare_outputs(found, rungs, sessions)
            self._judge_outputs(found, then, now, judgement, boxes=boxes)
            if self._settings.latency is not None and rungs[1].runtime.timed:
                found = self._time(found, rungs, sessions, judgement)
        except Exception as error:  # an engine may raise anything; the other pairs must still be compared
            text = error.message if isinstance(error, CspDeployError) else str(error) or type(error).__name__
            judgement.worse.append(f"could not be compared: {text.splitlines()[0][:200]}")
        finally:
            for session in sessions:
                session.close()
        return found

    def _compare_outputs(
        self, found: Regression, rungs: list[Rung], sessions: list[CheckedSession]
    ) -> tuple[Regression, str]:
        """The figures, and of a detector why its boxes are not those of the old one."""
        expected, got = (
            network_outputs(run_all(session, subject, rung.candidate), rung.candidate)
            for session, subject, rung in zip(sessions, self._subjects, rungs, strict=True)
        )
        old, new = ((subject, rung.candidate) for subject, rung in zip(self._subjects, rungs, strict=True))
        change = compare_boxes(got, expected, new=new, old=old)
        if change is not None:
            return dataclasses.replace(found, rel_l2=change.rel_l2, same_boxes=change.same_boxes), change.reason
        if [(name, array.shape) for name, array in got.items()] != [(name, a.shape) for name, a in expected.items()]:
            return dataclasses.replace(found, rel_l2=math.inf), ""
        distance = max(relative_l2(got[name], expected[name]) for name in expected)
        return dataclasses.replace(found, rel_l2=distance, top1_agreement=self._agreement(got, expected)), ""

    def _agreement(self, got: Outputs, expected: Outputs) -> float | None:
        name = next(iter(expected))
        if not self._classes or expected[name].ndim != 2:
            return None
        first = [top_k(outputs[name], 1)[:, 0] for outputs in (got, expected)]
        return float((first[0] == first[1]).mean())

    def _judge_outputs(
        self, found: Regression, then: ParityRow, now: ParityRow, judgement: Judgement, *, boxes: str
    ) -> None:
        if self._other_contract:
            judgement.remarks.append("other preprocessing: each prepared the images by its own; outputs are not judged")
        elif not self._same_weights:
            judgement.remarks.append("other weights: outputs are shown, not judged")
        elif boxes and self._other_rule:
            judgement.remarks.append("other thresholds of score or overlap: boxes are shown, not judged")
        elif boxes and not self._untrained:
            judgement.worse.append(f"of the same weights, {boxes}")
        elif found.rel_l2 is not None and then.limit is not None and now.limit is not None:
            # Each may be its own limit away from the same reference, and so both limits from the other.
            limit = then.limit + now.limit
            if not found.rel_l2 <= limit:
                judgement.worse.append(
                    f"outputs of the same weights differ by {found.rel_l2:.1e}, at most {limit:.1e} is explained"
                )

    def _time(
        self, found: Regression, rungs: list[Rung], sessions: list[CheckedSession], judgement: Judgement
    ) -> Regression:
        settings = self._settings.latency
        if settings is None:
            return found
        calls = {
            name: session.bind(subject.first_call(rung.candidate))
            for name, session, subject, rung in zip(("old", "new"), sessions, self._subjects, rungs, strict=True)
        }
        timings = measure_latency(calls, gpu_settings(settings) if rungs[1].runtime.device == "cuda" else settings)
        old, new = timings["old"], timings["new"]
        if new.verdict == "reference":
            return found
        figures = f"median {new.p50_ms:.3g} ms, was {old.p50_ms:.3g} ms"
        if new.verdict == "slower":
            judgement.worse.append(f"slower: {figures}")
        elif new.verdict == "faster":
            judgement.better.append(f"faster: {figures}")
        return dataclasses.replace(found, latency=new.verdict, ratio=new.ratio)
