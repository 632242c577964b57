"""What an application may ask of an opened artifact without computing anything."""

from __future__ import annotations

from collections.abc import Mapping

from cspdeploy.core.detection.spec import Suppression
from cspdeploy.core.spec import Preprocess, Task
from cspdeploy.edge.calls import Calls
from cspdeploy.edge.opening import OpenedArtifact

__all__ = ["ArtifactFacts"]


class ArtifactFacts:
    """The read-only properties of a `Predictor`."""

    def __init__(self, opened: OpenedArtifact) -> None:
        self._facts, self._calls = opened, Calls(opened)

    @property
    def task(self) -> Task:
        """What it gives: "classify", "features", "detect" or "segment"."""
        return self._facts.task

    @property
    def untrained(self) -> bool:
        """The weights have never seen data, and no answer means anything."""
        return self._facts.provenance.untrained

    @property
    def labels(self) -> tuple[str, ...]:
        """In the order of the class scores; empty where a single file carries none, and classes are numbers."""
        return self._facts.labels

    @property
    def model(self) -> str:
        """Its name."""
        return self._facts.model

    @property
    def artifact(self) -> str:
        """Its kind."""
        return self._facts.kind

    @property
    def preprocess(self) -> Preprocess:
        """The contract that images are prepared by."""
        return self._facts.contract

    @property
    def suppression(self) -> Suppression | None:
        """Of a detector: how boxes are chosen unless a call says otherwise; None for anything else."""
        return self._facts.detection.suppression if self._facts.detection is not None else None

    @property
    def input_shape(self) -> tuple[int | str, ...]:
        """Of `raw`, as the file declares it; a free dimension is a name."""
        return self._facts.input_shape

    @property
    def provider(self) -> str:
        """Where it runs, read from the session after it was opened: "CPUExecutionProvider"."""
        return self._calls.opened.provider

    @property
    def placement(self) -> Mapping[str, int]:
        """Nodes on each provider after the engine's own optimisation; empty where the engine does not tell."""
        return self._calls.opened.session.placement

    @property
    def note(self) -> str:
        """What to know before it is used here: it was optimised for another machine; else empty."""
        return self._facts.note

    @property
    def hash_checked(self) -> bool:
        """The file is the one of its manifest. False for a single file, of which nobody here knows the hash."""
        return self._facts.hash_checked
