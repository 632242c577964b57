"""What a `Predictor` answers with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from cspdeploy.core.errors import InputError
from cspdeploy.core.preprocess import ImageSource

__all__ = ["Answer", "DetectedBox", "Detections", "Prediction", "Result", "StreamItem"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One class with its softmax probability in [0, 1]."""

    label: str
    index: int
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result(Sequence[Prediction]):
    """The likeliest classes of one image, likeliest first. Is itself the sequence of its predictions.

    Attributes:
        untrained: the weights have never seen data, and no answer means anything.
    """

    predictions: tuple[Prediction, ...]
    untrained: bool = False

    def __len__(self) -> int:
        return len(self.predictions)

    def __iter__(self) -> Iterator[Prediction]:
        return iter(self.predictions)

    @overload
    def __getitem__(self, index: int) -> Prediction: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Prediction, ...]: ...
    def __getitem__(self, index: int | slice) -> Prediction | tuple[Prediction, ...]:
        return self.predictions[index]


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectedBox:
    """One object of a picture.

    Attributes:
        score: objectness times class, in [0, 1].
        left, top, right, bottom: in pixels of the picture as it was given, turned upright as its EXIF says, from its
            upper left corner; never beyond its edges.
    """

    label: str
    index: int
    score: float
    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Detections(Sequence[DetectedBox]):
    """The boxes of one image, best first; none is a result, too. Is itself the sequence of its boxes.

    Attributes:
        untrained: the weights have never seen data, and no answer means anything.
    """

    boxes: tuple[DetectedBox, ...]
    untrained: bool = False

    def __len__(self) -> int:
        return len(self.boxes)

    def __iter__(self) -> Iterator[DetectedBox]:
        return iter(self.boxes)

    @overload
    def __getitem__(self, index: int) -> DetectedBox: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[DetectedBox, ...]: ...
    def __getitem__(self, index: int | slice) -> DetectedBox | tuple[DetectedBox, ...]:
        return self.boxes[index]


Answer = Result | Detections
"""Of a classifier, and of a detector."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StreamItem:
    """One image of a stream: either its result, or why there is none.

    Attributes:
        source: as the stream was given it, and no copy: of a buffer that is filled again it shows a later image. The
            result is that of the image that it held when it was taken.
        result: None where the image could not be used.
        error: None where it could.
    """

    source: ImageSource
    result: Answer | None = None
    error: InputError | None = None
