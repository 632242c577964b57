from __future__ import annotations

import dataclasses
import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from cspdeploy.core.errors import InputError, RuntimeUnavailableError, TamperedError
from cspdeploy.core.golden import Golden, read_golden
from cspdeploy.core.metrics import relative_l2, softmax
from cspdeploy.core.types import Frontend
from cspdeploy.edge import Predictor, opening
from cspdeploy.export import simplify
from cspdeploy.pipeline.recipe import ExportRequest, export_bundle
from cspdeploy.runtimes import all_runtimes
from cspdeploy.runtimes.ort import OrtSession

MakeBundle = Callable[..., Path]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "tiny"))


@pytest.fixture(scope="module")
def golden(tiny_bundle: Path) -> Golden:
    return read_golden(tiny_bundle / "golden.npz")


@pytest.mark.parametrize(
    ("artifact", "runtime", "limit"),
    [
        ("onnx", "ort-cpu", 1e-5),
        ("torchscript", "torchscript-cpu", 1e-5),
        ("onnx-fp16", "ort-cpu", 1e-2),
        ("onnx-fp16", "fp16-rounding", 1e-2),
    ],
)
def test_answers_are_the_golden_ones(
    tiny_bundle: Path, golden: Golden, artifact: str, runtime: str, limit: float
) -> None:
    logits = Predictor.open(tiny_bundle, artifact=artifact, runtime=runtime).logits(*golden.images)
    assert logits.dtype == np.float32
    assert relative_l2(logits, golden.outputs_fp64["logits"]) < limit


def test_batch_over_a_fixed_batch_model_is_each_image_by_itself(tiny_bundle: Path, golden: Golden) -> None:
    predictor = Predictor.open(tiny_bundle)
    together = predictor.logits(*golden.images[:7])
    assert together.shape == (7, 10)
    for i in range(7):
        assert np.array_equal(predictor.logits(golden.images[i])[0], together[i])


@pytest.mark.parametrize("batch", [2, 4, 7, "N"])
@pytest.mark.parametrize("num_images", [1, 4, 9])
def test_last_call_of_a_fixed_batch_is_filled_up(
    make_bundle: MakeBundle, colours: np.ndarray, expected_logits: np.ndarray, batch: int | str, num_images: int
) -> None:
    predictor = Predictor.open(make_bundle(batch=batch))
    assert np.allclose(predictor.logits(*colours[:num_images]), expected_logits[:num_images], atol=1e-5)
    found = predictor.predict(iter(colours[:num_images]), top=1)
    assert [result[0].index for result in found] == expected_logits[:num_images].argmax(axis=1).tolist()


def test_a_free_batch_runs_in_calls_that_memory_bears(make_bundle: MakeBundle, colours: np.ndarray) -> None:
    predictor = Predictor.open(make_bundle(batch="N"))
    session, sizes = predictor._calls.opened.session, []
    run = session.run
    session.run = lambda feeds: (sizes.append(len(feeds["input"])), run(feeds))[1]  # type: ignore[method-assign]
    assert len(predictor.predict([*colours, *colours])) == 18
    assert sizes == [8, 8, 2]


def test_prediction_is_likeliest_first_with_softmax(tiny_bundle: Path, golden: Golden) -> None:
    predictor = Predictor.open(tiny_bundle)
    found = predictor(golden.images[0], top=4)
    expected = softmax(golden.outputs_fp64["logits"])[0]
    assert [prediction.index for prediction in found] == np.argsort(-expected)[:4].tolist()
    for prediction in found:
        assert prediction.label == f"label {prediction.index}"
        assert prediction.probability == pytest.approx(expected[prediction.index], rel=1e-4)
    assert sum(prediction.probability for prediction in predictor(golden.images[0], top=99)) == pytest.approx(1)
    assert len(predictor(golden.images[0], top=99)) == 10


def test_path_bytes_and_array_are_the_same_image(tiny_bundle: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (40, 50, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    (tmp_path / "photo.png").write_bytes(buffer.getvalue())
    predictor = Predictor.open(str(tiny_bundle))
    expected = predictor(pixels)
    for source in (buffer.getvalue(), tmp_path / "photo.png", str(tmp_path / "photo.png")):
        assert predictor(source) == expected


def test_no_image(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="no image given"):
        Predictor.open(tiny_bundle).logits()


def test_not_an_image(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_text("words")
    with pytest.raises(InputError, match=r"photo\.png: not an image"):
        Predictor.open(tiny_bundle)(tmp_path / "photo.png")


def test_unknown_artifact_names_those_that_are_there(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="no artifact 'onnx-int8', it has torchscript, onnx, onnx-fp16") as caught:
        Predictor.open(tiny_bundle, artifact="onnx-int8")
    assert caught.value.fix.startswith("--artifact ")


@pytest.mark.parametrize(
    ("artifact", "runtime"),
    [("onnx", "torchscript-cpu"), ("torchscript", "ort-cpu"), ("onnx", "fp16-rounding"), ("onnx", "torch-cpu")],
)
def test_runtime_that_does_not_read_the_artifact(tiny_bundle: Path, artifact: str, runtime: str) -> None:
    with pytest.raises(InputError, match=f"--runtime {runtime}: does not read '{artifact}'"):
        Predictor.open(tiny_bundle, artifact=artifact, runtime=runtime)


def test_unknown_and_absent_runtime(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="--runtime ort-gpu: unknown"):
        Predictor.open(tiny_bundle, runtime="ort-gpu")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RuntimeUnavailableError, match="ort-cuda"):
        Predictor.open(tiny_bundle, runtime="ort-cuda")


@pytest.mark.parametrize("file", ["tiny.onnx", "golden.npz", "labels.txt"])
def test_changed_file_is_refused(bundle: Path, file: str) -> None:
    content = bytearray((bundle / file).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / file).write_bytes(content)
    with pytest.raises(TamperedError, match=file.replace(".", r"\.")):
        Predictor.open(bundle)


def test_only_the_artifact_that_is_opened_costs_a_hash(bundle: Path) -> None:
    (bundle / "tiny.torchscript.pt").write_bytes(b"changed")
    assert Predictor.open(bundle).hash_checked
    with pytest.raises(TamperedError, match="torchscript"):
        Predictor.open(bundle, artifact="torchscript", runtime="torchscript-cpu")


def test_half_copied_file_is_told_so(bundle: Path) -> None:
    whole = (bundle / "tiny.onnx").read_bytes()
    (bundle / "tiny.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TamperedError, match=f"{len(whole) // 2} of {len(whole)} bytes: copied in part"):
        Predictor.open(bundle)
    (bundle / "tiny.onnx").unlink()
    with pytest.raises(InputError, match=r"tiny\.onnx: missing"):
        Predictor.open(bundle)


def test_file_that_is_replaced_while_it_is_opened(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process that copies over the bundle at this very moment."""
    opened = OrtSession.__init__

    def replace_it(self: OrtSession, model: Any, **options: Any) -> None:
        opened(self, model, **options)
        shutil.copy(bundle / "tiny.onnx", bundle / ".copy")
        (bundle / ".copy").replace(bundle / "tiny.onnx")

    monkeypatch.setattr(OrtSession, "__init__", replace_it)
    with pytest.raises(TamperedError, match="has changed while it was opened"):
        Predictor.open(bundle)


def test_folder_without_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest\.json"):
        Predictor.open(tmp_path)


def _edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_untrained_weights_are_told(bundle: Path) -> None:
    assert not Predictor.open(bundle).untrained
    _edit(bundle, lambda data: data["spec"]["provenance"].update(source="random"))
    assert Predictor.open(bundle).untrained


def test_labels_that_do_not_fit_the_classes(bundle: Path) -> None:
    _edit(bundle, lambda data: data.update(labels=data["labels"][:3]))
    with pytest.raises(InputError, match="labels"):
        Predictor.open(bundle)


def test_artifact_without_inputs(bundle: Path) -> None:
    _edit(bundle, lambda data: data["artifacts"][1].update(inputs=[]))
    with pytest.raises(InputError, match="manifest"):
        Predictor.open(bundle)


def test_outputs_by_name_and_no_classes_of_a_features_bundle(
    tiny_models: Path, tmp_path: Path, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simplify, "_CHILD", ["false"])
    report = export_bundle(ExportRequest(model="tiny", models=tiny_models, output=tmp_path, features=True))
    predictor = Predictor.open(report.folder)
    assert predictor.task == "features"
    found = predictor.outputs(*golden.images[:3])
    expected = read_golden(Path(report.folder) / "golden.npz").outputs_fp64
    assert list(found) == ["features_s4", "features_s8"]
    for name, maps in found.items():
        assert relative_l2(maps, expected[name][:3]) < 1e-5
    with pytest.raises(InputError, match="not classes") as caught:
        predictor(golden.images[0])
    assert ".outputs(IMAGE)" in caught.value.fix
    one = predictor.features(golden.images[0])
    assert {name: maps.shape for name, maps in one.items()} == {name: maps.shape[1:] for name, maps in found.items()}


def test_classifier_gives_no_features(tiny_bundle: Path, golden: Golden) -> None:
    with pytest.raises(InputError, match="tiny: gives logits, not features"):
        Predictor.open(tiny_bundle).features(golden.images[0])


# --- what it is and where it runs ---


def test_it_says_where_it_runs(tiny_bundle: Path) -> None:
    predictor = Predictor.open(tiny_bundle / "manifest.json", num_threads=1)
    assert predictor.provider == "CPUExecutionProvider"
    assert set(predictor.placement) == {"CPUExecutionProvider"}
    assert (predictor.model, predictor.artifact, predictor.input_shape) == ("tiny", "onnx", (1, 3, 32, 32))


def test_provider_that_did_not_take_the_work(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine says that it has CUDA, opens without a word, and computes on the CPU."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this engine has CUDA")
    cuda = dataclasses.replace(all_runtimes()["ort-cuda"], missing=lambda: None)
    monkeypatch.setattr(opening, "require_runtime", {"ort-cuda": cuda}.__getitem__)
    with (
        pytest.warns(UserWarning, match="Specified provider"),
        pytest.raises(RuntimeUnavailableError, match="the session runs on CPU") as caught,
    ):
        Predictor.open(tiny_bundle, runtime="ort-cuda")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("num_threads", [-1, True, "x", 1.5, None])
def test_threads_that_are_no_number(tiny_bundle: Path, num_threads: Any) -> None:
    with pytest.raises(InputError, match="num_threads"):
        Predictor.open(tiny_bundle, num_threads=num_threads)


@pytest.mark.parametrize("top", [0, "3", 2.5, True, None])
def test_no_top(tiny_bundle: Path, golden: Golden, top: Any) -> None:
    with pytest.raises(InputError, match=f"top: got {top!r}"):
        Predictor.open(tiny_bundle)(golden.images[0], top=top)


@pytest.mark.parametrize("place", [None, 7])
def test_place_that_is_no_path(place: Any) -> None:
    with pytest.raises(InputError, match=r"bundle: got \w+, expected a path"):
        Predictor.open(place)


@pytest.mark.parametrize(
    ("images", "told", "fix"),
    [
        ("photo.jpg", "one image (str)", "predictor(image)"),
        (Path("photo.jpg"), "one image (", "predictor(image)"),
        (b"\x89PNG", "one image (bytes)", "predictor(image)"),
        (np.zeros((20, 24, 3), np.uint8), "an array uint8 [20, 24, 3]", "([image]) for one image"),
        (np.zeros((20, 24), np.uint8), "an array uint8 [20, 24]", "([image]) for one image"),
        (np.zeros((5, 20, 24), np.uint8), "an array uint8 [5, 20, 24]", "(list(images)) for grey images"),
        (Image.new("RGB", (4, 4)), "a Image", "predictor(image)"),
        (7, "a int", "predictor(image)"),
    ],
)
def test_one_image_is_no_batch_of_its_rows(tiny_bundle: Path, images: Any, told: str, fix: str) -> None:
    predictor = Predictor.open(tiny_bundle)
    for call in (predictor.predict, predictor.stream):
        with pytest.raises(InputError) as caught:
            call(images)
        assert told in caught.value.message
        assert fix in caught.value.fix


def test_array_of_images_is_a_batch(tiny_bundle: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), np.uint8)
    predictor = Predictor.open(tiny_bundle)
    assert predictor.predict(images) == predictor.predict(list(images)) == [predictor(image) for image in images]


def test_closed(tiny_bundle: Path, golden: Golden) -> None:
    with Predictor.open(tiny_bundle) as predictor:
        assert len(predictor(golden.images[0], top=3)) == 3
    predictor.close()
    for use in (lambda: predictor(golden.images[0]), lambda: predictor.stream([]), lambda: predictor.provider):
        with pytest.raises(InputError, match="is closed"):
            use()


# --- preprocessing in the graph ---


@pytest.mark.parametrize("top_k", [0, 2])
@pytest.mark.parametrize("order", ["rgb", "bgr"])
@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize("batch", [1, 4, "N"])
def test_graph_with_preprocessing_answers_as_one_without(
    make_bundle: MakeBundle, colours: np.ndarray, expected_logits: np.ndarray, order: str, resize: bool,
    batch: int | str, top_k: int,
) -> None:  # fmt: skip
    frontend = Frontend(channel_order=order, resize=resize, top_k=top_k)  # type: ignore[arg-type]
    predictor = Predictor.open(make_bundle(frontend=frontend, batch=batch), artifact="onnx-u8")
    images = [image[: 40 - (i % 3)] for i, image in enumerate(colours)]  # of several sizes, which share no call
    assert np.allclose(predictor.logits(*images), expected_logits, atol=1e-5)
    found = predictor.predict(images, top=3)
    assert [[one.index for one in result] for result in found] == np.argsort(-expected_logits).tolist()
    if top_k:
        outputs = predictor.outputs(*images)
        assert outputs["classes"].dtype == np.int64
        assert np.array_equal(outputs["classes"][:, 0], expected_logits.argmax(axis=1))


# --- one dropped file ---


def test_one_file_with_a_card_needs_no_bundle(make_bundle: MakeBundle, tmp_path: Path, colours: np.ndarray) -> None:
    bundle = make_bundle(card=True, frontend=Frontend(channel_order="bgr"))
    expected = Predictor.open(bundle, artifact="onnx-u8")(colours[0])
    alone = shutil.copy(bundle / "mean.u8.onnx", tmp_path / "dropped.onnx")
    predictor = Predictor.open(alone)
    assert predictor(colours[0]) == expected
    assert not predictor.hash_checked
    assert (predictor.model, predictor.artifact, predictor.labels) == ("mean", "onnx-u8", ("red", "green", "blue"))


def test_one_file_is_not_another_artifact(make_bundle: MakeBundle, tmp_path: Path) -> None:
    alone = shutil.copy(make_bundle(card=True, frontend=Frontend()) / "mean.u8.onnx", tmp_path / "dropped.onnx")
    assert Predictor.open(alone, artifact="onnx-u8").artifact == "onnx-u8"
    with pytest.raises(InputError, match="is 'onnx-u8', asked for 'onnx-int8'"):
        Predictor.open(alone, artifact="onnx-int8")


def test_file_of_another_machine_is_told(bundle: Path) -> None:
    assert Predictor.open(bundle).note == ""
    _edit(bundle, lambda data: [one.update(machine="An Abacus") for one in data["artifacts"]])
    assert Predictor.open(bundle).note.startswith("optimised for another machine (An Abacus; this is ")


def test_one_file_without_a_card(tiny_bundle: Path, make_bundle: MakeBundle, tmp_path: Path) -> None:
    alone = shutil.copy(make_bundle() / "mean.onnx", tmp_path / "dropped.onnx")
    with pytest.raises(InputError, match="carries no card"):
        Predictor.open(alone)
    (tmp_path / "words.onnx").write_text("words")
    with pytest.raises(InputError, match="not an ONNX file"):
        Predictor.open(tmp_path / "words.onnx")
    with pytest.raises(InputError, match="TorchScript"):
        Predictor.open(tiny_bundle / "tiny.torchscript.pt")


def test_classes_without_labels_are_numbers(make_bundle: MakeBundle, colours: np.ndarray, tmp_path: Path) -> None:
    alone = shutil.copy(make_bundle(card=True, labels=()) / "mean.onnx", tmp_path / "dropped.onnx")
    predictor = Predictor.open(alone)
    assert predictor.labels == ()
    found = predictor(colours[0], top=1)[0]
    assert found.label == f"class {found.index}"


def test_other_labels_than_classes(make_bundle: MakeBundle, colours: np.ndarray, tmp_path: Path) -> None:
    alone = shutil.copy(make_bundle(card=True, labels=("one", "two")) / "mean.onnx", tmp_path / "dropped.onnx")
    with pytest.raises(InputError, match="3 classes and 2 labels"):
        Predictor.open(alone)(colours[0])


# --- raw tensors ---


def test_raw_input_is_the_input_itself(tiny_bundle: Path, golden: Golden) -> None:
    predictor = Predictor.open(tiny_bundle)
    found = predictor.raw(golden.x_NCHW[:1])
    assert np.array_equal(found["logits"], predictor.logits(golden.images[0]))
    with pytest.raises(InputError, match="got 2 images, this artifact takes exactly 1"):
        predictor.raw(golden.x_NCHW[:2])
    with pytest.raises(InputError, match="pixels / 255"):
        predictor.raw(np.full((1, 3, 32, 32), 255, np.float32))


# --- several at once ---


def test_threads_get_the_answers_of_one(tiny_bundle: Path, golden: Golden) -> None:
    predictor = Predictor.open(tiny_bundle, num_threads=1)
    alone = [predictor(image) for image in golden.images]
    start = threading.Barrier(4)

    def answer(first: int) -> list[object]:
        start.wait()
        return [predictor(image) for image in np.roll(golden.images, -first, axis=0)]

    with ThreadPoolExecutor(4) as pool:
        for first, found in enumerate(pool.map(answer, range(4))):
            assert found == [*alone[first:], *alone[:first]]


def test_engine_that_computes_one_call_at_a_time_gets_no_second(tiny_bundle: Path, golden: Golden) -> None:
    predictor = Predictor.open(tiny_bundle, artifact="torchscript", runtime="torchscript-cpu")
    session = predictor._calls.opened.session
    run, inside, most = session.run, [0], [0]

    def counted(feeds: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        found = run(feeds)
        inside[0] -= 1
        return found

    session.run = counted  # type: ignore[method-assign]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(predictor, [*golden.images[:8]]))
    assert most == [1]


# --- streams ---


def test_stream_goes_on_after_an_image_that_is_none(tiny_bundle: Path, golden: Golden) -> None:
    predictor = Predictor.open(tiny_bundle)
    sources = [golden.images[0], b"words", golden.images[1] / 255, golden.images[2]]
    found = list(predictor.stream(sources, top=2))
    assert [item.source is source for item, source in zip(found, sources, strict=True)] == [True] * 4
    assert [item.result for item in found] == [
        predictor(golden.images[0], top=2), None, None, predictor(golden.images[2], top=2)
    ]  # fmt: skip
    assert found[0].error is None
    assert "not an image" in str(found[1].error)
    assert "float64 in 0..1" in str(found[2].error)


def test_stream_gives_a_result_before_the_next_image_is_there(tiny_bundle: Path, golden: Golden) -> None:
    asked = threading.Event()

    def camera() -> Iterator[np.ndarray]:
        yield golden.images[0]
        assert asked.wait(30)  # the second picture comes only after the first answer
        yield golden.images[1]

    stream = Predictor.open(tiny_bundle).stream(camera())
    assert next(stream).result is not None
    asked.set()
    assert next(stream).result is not None
    assert list(stream) == []


def test_stream_of_no_end_is_taken_as_it_is_used_and_can_be_left(tiny_bundle: Path, golden: Golden) -> None:
    taken = [0]

    def camera() -> Iterator[np.ndarray]:
        while True:
            taken[0] += 1
            yield golden.images[0]

    stream = Predictor.open(tiny_bundle).stream(camera())
    for _ in range(3):
        next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert taken[0] <= 3 + 3
    assert all(thread.name != "cspdeploy-decode" for thread in threading.enumerate())


def test_source_that_breaks_ends_the_stream(tiny_bundle: Path, golden: Golden) -> None:
    def camera() -> Iterator[np.ndarray]:
        yield golden.images[0]
        raise OSError("unplugged")

    stream = Predictor.open(tiny_bundle).stream(camera())
    assert next(stream).result is not None
    with pytest.raises(OSError, match="unplugged"):
        next(stream)


@pytest.mark.parametrize("frontend", [None, Frontend(), Frontend(resize=True), Frontend(channel_order="bgr")])
def test_buffer_that_a_camera_fills_again(
    make_bundle: MakeBundle, colours: np.ndarray, frontend: Frontend | None
) -> None:
    """At its own size, so that nothing is resized on the way and a view would do."""
    predictor = Predictor.open(make_bundle(frontend=frontend, batch=4), artifact="onnx-u8" if frontend else "onnx")
    images = np.ascontiguousarray(colours[:, :32, :32])

    def camera() -> Iterator[np.ndarray]:
        buffer = np.empty_like(images[0])
        for image in images:
            buffer[...] = image
            yield buffer
            buffer[...] = 0  # the next picture is on its way

    expected = predictor.predict(list(images))
    assert len({result[0].probability for result in expected}) == len(images)
    assert predictor.predict(camera()) == expected
    assert [item.result for item in predictor.stream(camera())] == expected


# --- a device that may write nothing ---


def test_nothing_is_written(bundle: Path, golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in bundle.iterdir()}
    monkeypatch.delenv("HOME", raising=False)
    Predictor.open(bundle)(golden.images[0])  # tests/edge/test_device.py forbids it, for root as well
    assert {path.name: path.stat().st_mtime_ns for path in bundle.iterdir()} == before
