"""From a bundle and an image to classes, boxes or a map of classes, through the preprocessing that was proven.

Shapes: N images, H height, W width, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cspdeploy.core.errors import InputError
from cspdeploy.core.preprocess import ImageSource
from cspdeploy.edge.classifying import likeliest_classes, require_top
from cspdeploy.edge.facts import ArtifactFacts
from cspdeploy.edge.images import ChannelOrder, Feed, require_channel_order, require_images
from cspdeploy.edge.opening import OpenedArtifact, open_artifact
from cspdeploy.edge.results import Answer, DetectedBox, Detections, Prediction, Result, StreamItem

if TYPE_CHECKING:
    from cspdeploy.edge.detecting import BoxRule

__all__ = ["DetectedBox", "Detections", "Prediction", "Predictor", "Result", "StreamItem"]

Array = npt.NDArray[Any]


class Predictor(ArtifactFacts):
    """An artifact, ready. Open it with `Predictor.open`; close it, or use it in a `with` block.

    Any number of threads may use one predictor: answers are those of one thread alone. On ONNX Runtime calls run side
    by side (each with the threads of the one session; `num_threads=1` is the best use of many callers); on other
    engines one waits for the other.
    """

    def __init__(self, opened: OpenedArtifact, *, channel_order: ChannelOrder = "rgb") -> None:
        super().__init__(opened)
        self._feed = Feed(contract=opened.contract, frontend=opened.frontend, channel_order=channel_order)

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str],
        *,
        artifact: str = "onnx",
        runtime: str = "ort-cpu",
        num_threads: int = 0,
        channel_order: str = "rgb",
        key: str | os.PathLike[str] | None = None,
        device: int | None = None,
    ) -> Predictor:
        """Open an artifact of a bundle. Needs no write access anywhere.

        The artifact and all small files are compared with their hashes first. The other artifacts are not looked at:
        `python -m cspdeploy.edge selftest` checks all.

        Args:
            bundle: the folder, its manifest.json, or one ONNX file that carries a card (then that is the artifact, and
                its hash is known to nobody: `hash_checked` is False).
            artifact: kind of artifact: "onnx", "onnx-fp16", "onnx-int8", "onnx-u8", ..., "torchscript"; of a bundle of
                several sizes "onnx@320x320" for the 320 px one, which brings its own preprocessing. Of a single file
                its own kind; "onnx" takes it whatever it is.
            runtime: "ort-cpu", "ort-cuda", "openvino", "torchscript-cpu", ... It runs there or not at all.
            num_threads: of the engine inside one call; 0: as it chooses.
            channel_order: of the arrays that the application gives: "rgb", or "bgr" as OpenCV has them. Image files
                need no word of it, whatever order the network was trained with.
            key: file of the Ed25519 public key that must have signed the bundle; None asks for no signature.
            device: of a runtime on GPUs, which of those that CUDA shows to this process; None: the first.

        Raises:
            InputError: not a bundle, no such artifact in it, or the runtime does not read it; a key that is none.
            TamperedError: a file is not the one of the manifest, or the manifest is not the one that was signed.
            RuntimeUnavailableError: the runtime is not here, or did not take the work.
            MissingExtraError: a signature is to be checked without the package `cryptography`.
        """
        order = require_channel_order(channel_order)
        if not isinstance(bundle, (str, os.PathLike)):
            raise InputError(f"bundle: got {type(bundle).__name__}, expected a path", fix="name the bundle's folder")
        opened = open_artifact(
            Path(bundle), artifact=artifact, runtime=runtime, num_threads=num_threads, device=device,
            key=Path(key) if key is not None else None,
        )  # fmt: skip
        return cls(opened, channel_order=order)

    def __call__(
        self, image: ImageSource, *, top: int = 5, score: float | None = None, iou: float | None = None,
        max_detections: int | None = None,
    ) -> Answer:  # fmt: skip
        """Of a classifier the `top` likeliest classes of one image, of a detector its boxes; best first.

        Args:
            image: a path, the bytes of a file, or an array `[H, W]`, `[H, W, 1]` or `[H, W, 3]` uint8.
            top: classes; of a classifier.
            score: boxes must score more than that; None: as it was exported. Of a detector, as the two that follow.
            iou: a box goes where a better one of its class overlaps it by more than that.
            max_detections: boxes, at most. Where the graph suppresses, it has decided: the score may be raised and the
                boxes may be fewer, and nothing else.

        Raises:
            InputError: not an image, the artifact gives neither classes nor boxes, or an option is not of its kind.
        """
        return self.predict([image], top=top, score=score, iou=iou, max_detections=max_detections)[0]

    def predict(
        self, images: Iterable[ImageSource], *, top: int = 5, score: float | None = None, iou: float | None = None,
        max_detections: int | None = None,
    ) -> list[Answer]:  # fmt: skip
        """The same for any number of images, in calls of as many as the artifact takes; none gives an empty list.

        Args:
            images: a list, an iterator, or an array `[N, H, W, 3]`. A camera may fill one buffer again and again: an
                image is copied before the next one is asked for.
            top: as above, and the others likewise.

        Raises:
            InputError: as above; the first image that is none ends it (`stream` goes on). Or it is one image, which is
                not taken for a batch of its rows.
        """
        rule = self._rule(top, score=score, iou=iou, max_detections=max_detections)
        require_images(images, call="predict")
        sizes_px: list[tuple[int, int]] = []

        def parts() -> Iterator[Array]:
            for image in images:
                fed = self._feed.fed(image)
                sizes_px.append(fed.size_px)
                yield fed.x

        found: list[Answer] = []
        for outputs in self._batched(parts()):
            found += self._answers(outputs, rule, sizes_px[len(found) :])
        return found

    def stream(
        self, images: Iterable[ImageSource], *, top: int = 5, score: float | None = None, iou: float | None = None,
        max_detections: int | None = None,
    ) -> Iterator[StreamItem]:  # fmt: skip
        """The same one by one, without end if need be: the next image is decoded while the current one is computed.

        A result is there as soon as it is known, and does not wait for the next image. An image that cannot be used
        gives an item with `error`, and the stream goes on; what `images` itself raises ends it.

        Args:
            images: as in `predict`; is iterated in another thread, at most two ahead. Each is a call of its own: an
                artifact of a fixed batch of eight computes eight for it, which `predict` fills with images.
            top: as in `predict`, and the others likewise.

        Raises:
            InputError: the artifact gives neither classes nor boxes, the predictor is closed, it is one image, or an
                option is not of its kind.
        """
        rule = self._rule(top, score=score, iou=iou, max_detections=max_detections)
        require_images(images, call="stream")
        self._calls.opened  # noqa: B018 (a closed one says so now, and not at the first image)
        return self._stream(images, rule)

    def _stream(self, images: Iterable[ImageSource], rule: int | BoxRule) -> Iterator[StreamItem]:
        from cspdeploy.edge.stream import prepare_ahead

        for item in prepare_ahead(images, self._feed.fed):
            if isinstance(item.made, InputError):
                yield StreamItem(source=item.source, error=item.made)
                continue
            outputs = _floats(self._calls.together([item.made.x]))
            yield StreamItem(source=item.source, result=self._answers(outputs, rule, [item.made.size_px])[0])

    def features(self, image: ImageSource) -> dict[str, Array]:
        """Feature maps of one image, by name, `[C, h, w]` float32 each.

        Raises:
            InputError: not an image, or the artifact gives no features.
        """
        if self.task != "features":
            raise InputError(
                f"{self.model}: gives {', '.join(self._facts.outputs)}, not features",
                fix="predictor(image) for classes or boxes, predictor.outputs(image) for what there is",
            )
        return {name: maps[0] for name, maps in self.outputs(image).items()}

    def segment(self, image: ImageSource) -> npt.NDArray[np.int64]:
        """Class of every pixel of one image, `[h, w]` int64 of the picture's own size, turned upright as EXIF says.

        Each pixel has the best class of the pixel of the network's input that it lies in; -1 where the contract's crop
        keeps it from the network.

        Raises:
            InputError: not an image, the artifact is no segmenter, or a score is NaN.
        """
        if self.task != "segment":
            fix = {"features": "predictor.features(image)", "detect": "predictor(image) gives its boxes"}
            raise InputError(
                f"{self.model}: gives {', '.join(self._facts.outputs)}, not a class of every pixel",
                fix=fix.get(self.task, "predictor(image) gives the classes of the image"),
            )
        from cspdeploy.edge.segmenting import class_map

        fed = self._feed.fed(image)
        logits_NCHW = _floats(self._calls.together([fed.x]))[self._facts.outputs[0]]
        return class_map(logits_NCHW[0], self._facts, size_px=fed.size_px)

    def outputs(self, *images: ImageSource) -> dict[str, Array]:
        """All outputs by name, `[N, ...]` each; floats as float32.

        Raises:
            InputError: not an image, or none at all.
        """
        if not images:
            raise InputError("no image given, expected at least one")
        parts = list(self._batched(self._feed.prepare(image) for image in images))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def logits(self, *images: ImageSource) -> npt.NDArray[np.float32]:
        """Raw class scores `[N, C]`.

        Raises:
            InputError: an image cannot be read, or the artifact gives no classes.
        """
        self._require_classes()
        return self.outputs(*images)[self._facts.outputs[0]]

    def raw(self, x: Array) -> dict[str, Array]:
        """All outputs for a tensor that is preprocessed already, in one call.

        Args:
            x: of `input_shape`: `[N, 3, H, W]` float32, normalised as `preprocess` says; `[N, H, W, 3]` uint8 for an
                artifact with its preprocessing in the graph.

        Raises:
            InputError: another type, shape or number of images, values that are not normalised, or NaN.
        """
        self._feed.check_raw(x, shape=self.input_shape)
        return _floats(self._calls.once(x))

    def close(self) -> None:
        """Let go of the session. Calls that run are finished; it may be closed twice."""
        self._calls.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _batched(self, parts: Iterable[Array]) -> Iterator[dict[str, Array]]:
        return map(_floats, self._calls.batched(parts))

    def _rule(self, top: int, *, score: float | None, iou: float | None, max_detections: int | None) -> int | BoxRule:
        """What is wanted: a number of classes, or boxes."""
        if self.task == "detect":
            from cspdeploy.edge.detecting import rule_of

            return rule_of(self._facts, score=score, iou=iou, max_detections=max_detections)
        self._require_classes()
        require_top(top)
        given = {"score": score, "iou": iou, "max_detections": max_detections}
        for name in (name for name, value in given.items() if value is not None):
            raise InputError(f"{name}: {self.model} gives classes, not boxes", fix="leave it away, or top=5")
        return top

    def _answers(
        self, outputs: Mapping[str, Array], rule: int | BoxRule, sizes_px: Sequence[tuple[int, int]]
    ) -> Sequence[Answer]:
        """Of one call. More sizes than images may be known already: a call is closed by the image that follows it."""
        if isinstance(rule, int):
            return likeliest_classes(outputs, self._facts, rule)
        from cspdeploy.edge.detecting import boxes_in_pictures

        num = len(next(iter(outputs.values())))
        return boxes_in_pictures(outputs, self._facts, rule, sizes_px=sizes_px[:num])

    def _require_classes(self) -> None:
        if self.task == "detect":
            raise InputError(f"{self.model}: gives boxes, not classes", fix="predictor(image) gives its boxes")
        if self.task == "segment":
            raise InputError(
                f"{self.model}: gives a class of every pixel, not of the image",
                fix="read it in Python: cspdeploy.edge.Predictor.open(BUNDLE).segment(IMAGE)",
            )
        if self.task != "classify":
            raise InputError(
                f"{self.model}: gives {', '.join(self._facts.outputs)}, not classes",
                fix="read them in Python: cspdeploy.edge.Predictor.open(BUNDLE).outputs(IMAGE)",
            )


def _floats(outputs: Mapping[str, Array]) -> dict[str, Array]:
    """Floating-point outputs as float32, others as they are."""
    return {
        name: array.astype(np.float32, copy=False) if np.issubdtype(array.dtype, np.floating) else array
        for name, array in outputs.items()
    }
