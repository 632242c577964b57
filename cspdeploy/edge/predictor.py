"""From a bundle and an image to classes, through the preprocessing that the bundle was proven with.

Shapes: N images, H height, W width, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from cspdeploy.core.errors import InputError
from cspdeploy.core.metrics import softmax, top_k
from cspdeploy.core.preprocess import ImageSource
from cspdeploy.core.spec import Preprocess, Task
from cspdeploy.edge.calls import Calls
from cspdeploy.edge.images import ChannelOrder, Feed, require_channel_order, require_images
from cspdeploy.edge.opening import OpenedArtifact, open_artifact
from cspdeploy.edge.results import Prediction, Result, StreamItem

__all__ = ["Prediction", "Predictor", "Result", "StreamItem"]

Array = npt.NDArray[Any]


class Predictor:
    """An artifact, ready. Open it with `Predictor.open`; close it, or use it in a `with` block.

    Any number of threads may use one predictor: answers are those of one thread alone. On ONNX Runtime calls run side
    by side (each with the threads of the one session; `num_threads=1` is the best use of many callers); on other
    engines one waits for the other.
    """

    def __init__(self, opened: OpenedArtifact, *, channel_order: ChannelOrder = "rgb") -> None:
        self._facts, self._calls = opened, Calls(opened)
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
            Path(bundle), artifact=artifact, runtime=runtime, num_threads=num_threads,
            key=Path(key) if key is not None else None,
        )  # fmt: skip
        return cls(opened, channel_order=order)

    @property
    def task(self) -> Task:
        """What it gives: "classify", "features" or "detect"."""
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

    def __call__(self, image: ImageSource, *, top: int = 5) -> Result:
        """The `top` likeliest classes of one image, likeliest first.

        Args:
            image: a path, the bytes of a file, or an array `[H, W]`, `[H, W, 1]` or `[H, W, 3]` uint8.

        Raises:
            InputError: not an image, or the artifact gives no classes.
        """
        return self.predict([image], top=top)[0]

    def predict(self, images: Iterable[ImageSource], *, top: int = 5) -> list[Result]:
        """The same for any number of images, in calls of as many as the artifact takes; none gives an empty list.

        Args:
            images: a list, an iterator, or an array `[N, H, W, 3]`. A camera may fill one buffer again and again: an
                image is copied before the next one is asked for.

        Raises:
            InputError: as above; the first image that is none ends it (`stream` goes on). Or it is one image, which is
                not taken for a batch of its rows.
        """
        self._require_classes()
        _require_top(top)
        require_images(images, call="predict")
        return [
            result
            for outputs in self._batched(self._feed.prepare(image) for image in images)
            for result in self._results(outputs, top)
        ]

    def stream(self, images: Iterable[ImageSource], *, top: int = 5) -> Iterator[StreamItem]:
        """The same one by one, without end if need be: the next image is decoded while the current one is computed.

        A result is there as soon as it is known, and does not wait for the next image. An image that cannot be used
        gives an item with `error`, and the stream goes on; what `images` itself raises ends it.

        Args:
            images: as in `predict`; is iterated in another thread, at most two ahead. Each is a call of its own: an
                artifact of a fixed batch of eight computes eight for it, which `predict` fills with images.

        Raises:
            InputError: the artifact gives no classes, the predictor is closed, or it is one image.
        """
        self._require_classes()
        _require_top(top)
        require_images(images, call="stream")
        self._calls.opened  # noqa: B018 (a closed one says so now, and not at the first image)
        return self._stream(images, top)

    def _stream(self, images: Iterable[ImageSource], top: int) -> Iterator[StreamItem]:
        from cspdeploy.edge.stream import prepare_ahead

        for item in prepare_ahead(images, self._feed.prepare):
            if isinstance(item.made, InputError):
                yield StreamItem(source=item.source, error=item.made)
                continue
            result = self._results(_floats(self._calls.together([item.made])), top)[0]
            yield StreamItem(source=item.source, result=result)

    def features(self, image: ImageSource) -> dict[str, Array]:
        """Feature maps of one image, by name, `[C, h, w]` float32 each.

        Raises:
            InputError: not an image, or the artifact gives no features.
        """
        if self.task != "features":
            raise InputError(
                f"{self.model}: gives {', '.join(self._facts.outputs)}, not features",
                fix="predictor(image) for classes, predictor.outputs(image) for what there is",
            )
        return {name: maps[0] for name, maps in self.outputs(image).items()}

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

    def _results(self, outputs: Mapping[str, Array], top: int) -> list[Result]:
        logits_NC = outputs[self._facts.outputs[0]]
        if self.labels and logits_NC.shape[1] != len(self.labels):
            raise InputError(
                f"{self.model}: {logits_NC.shape[1]} classes and {len(self.labels)} labels", fix="export it again"
            )
        probabilities_NC = softmax(logits_NC)
        return [
            Result(
                predictions=tuple(
                    Prediction(label=self._label(int(i)), index=int(i), probability=float(row[i])) for i in best
                ),
                untrained=self.untrained,
            )
            for best, row in zip(top_k(logits_NC, top), probabilities_NC, strict=True)
        ]

    def _label(self, index: int) -> str:
        return self.labels[index] if self.labels else f"class {index}"

    def _require_classes(self) -> None:
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


def _require_top(top: object) -> None:
    if isinstance(top, bool) or not isinstance(top, (int, np.integer)) or top < 1:
        raise InputError(f"top: got {top!r}, expected a whole number of at least 1", fix="top=1")
