"""Both ways from an image to the input, Pillow's and the built-in one, are one way."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import pytest
from PIL import Image

import cspdeploy
from cspdeploy.core.errors import InputError
from cspdeploy.core.pixels import pillow
from cspdeploy.core.preprocess import decoder, load_image, preprocess, read_pixels, resize_image, resize_pixels
from cspdeploy.core.spec import Preprocess

ROOT = Path(cspdeploy.__file__).parents[1]
CONTRACT = Preprocess(
    height_px=48, width_px=40, resize="crop", crop_pct=0.887, interpolation="bilinear", channel_order="rgb",
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
)  # fmt: skip
SIZES = [(120, 91), (31, 200), (300, 17), (48, 40), (1, 1), (20, 20), (40, 48)]


def _noise(height: int, width: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def _file(array: npt.NDArray[np.uint8], kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("resize", ["crop", "stretch", "letterbox"])
def test_three_ways_to_fit_by_three_filters(resize: Any, interpolation: Any) -> None:
    contract = dataclasses.replace(CONTRACT, resize=resize, interpolation=interpolation)
    for size in SIZES:
        image = _noise(*size)
        expected = resize_image(load_image(image), contract)
        assert expected.shape == (48, 40, 3)
        for by in ("built in", "pillow", "auto"):
            np.testing.assert_array_equal(resize_pixels(image, contract, by=by), expected)


def test_releases_of_pillow_that_resize_in_another_order_do_not_do_it_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to Pillow 12 the width always came first, which shows where the height shrinks by far more."""
    tall = _noise(300, 60)
    contract = dataclasses.replace(CONTRACT, resize="stretch", interpolation="bicubic")
    expected = resize_pixels(tall, contract, by="built in")
    # What such a release makes: the width alone, then the height alone.
    width_first = Image.fromarray(tall).resize((40, 300), Image.Resampling.BICUBIC)
    assert not np.array_equal(np.asarray(width_first.resize((40, 48), Image.Resampling.BICUBIC)), expected)

    def as_pillow_12(image: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
        return resize(resize(image, (size[0], image.height), resampling), size, resampling)

    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", as_pillow_12)
    monkeypatch.setattr(pillow, "PILLOW_MAJOR", 12)
    np.testing.assert_array_equal(resize_pixels(tall, contract, by="pillow"), expected)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "PPM"])
def test_a_file_gives_the_same_input_bit_by_bit(kind: str) -> None:
    files = [_file(_noise(70, 90), kind), _file(_noise(90, 50)[..., 0], kind)]
    expected = preprocess(files, CONTRACT, by="pillow")
    np.testing.assert_array_equal(preprocess(files, CONTRACT, by="built in"), expected)
    np.testing.assert_array_equal(preprocess(files, CONTRACT), expected)


def test_missing_file_empty_file_and_wrong_array(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    for source, reason in (
        (tmp_path / "none.png", "No such file"), (tmp_path / "empty.jpg", "empty file"), ("a\0b", "null"),
        (np.zeros((4, 4), np.float32), "image array"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=reason):
            read_pixels(source, by="built in")


def test_a_hairline_image_is_refused_or_small() -> None:
    wide = CONTRACT.with_size(256, 256)
    with pytest.raises(InputError, match="too thin"):
        resize_pixels(np.zeros((8000, 1, 3), np.uint8), wide, by="built in")


def test_who_decodes_can_be_asked() -> None:
    assert decoder() == f"Pillow {PIL.__version__}"


WITHOUT_PILLOW = """
import json, sys
from pathlib import Path
sys.modules["PIL"] = None
from cspdeploy.core.errors import InputError
from cspdeploy.core.preprocess import decoder, load_image, preprocess, read_pixels
from cspdeploy.core.codec import from_json
from cspdeploy.core.spec import Preprocess

folder = Path(sys.argv[1])
contract = from_json(Preprocess, json.loads((folder / "contract.json").read_text()))
x_NCHW = preprocess([folder / "a.jpg", folder / "b.png"], contract)
(folder / "made.bin").write_bytes(x_NCHW.tobytes())

def error(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except InputError as error:
        return [error.message, error.fix]

print(json.dumps({
    "decoder": decoder(),
    "gif": error(read_pixels, folder / "c.gif"),
    "image": error(load_image, folder / "a.jpg"),
    "pillow": error(preprocess, [folder / "a.jpg"], contract, by="pillow"),
}))
"""


def _python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_a_device_without_pillow_makes_the_same_input(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(_file(_noise(70, 90), "JPEG"))
    (tmp_path / "b.png").write_bytes(_file(_noise(41, 33), "PNG"))
    (tmp_path / "c.gif").write_bytes(_file(_noise(9, 9), "GIF"))
    (tmp_path / "contract.json").write_text(json.dumps(dataclasses.asdict(CONTRACT)))
    done = _python(WITHOUT_PILLOW, str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["decoder"] == "built in"
    assert found["gif"] == [f"{tmp_path}/c.gif: GIF is read by Pillow, which is not installed", "pip install pillow"]
    assert found["image"] == found["pillow"] == ["Pillow is not installed", "pip install pillow"]
    made = np.frombuffer((tmp_path / "made.bin").read_bytes(), np.float32).reshape(2, 3, 48, 40)
    np.testing.assert_array_equal(made, preprocess([tmp_path / "a.jpg", tmp_path / "b.png"], CONTRACT, by="pillow"))


def test_pillow_is_not_loaded_before_it_is_needed() -> None:
    """An array of the right size needs no Pillow at all, and neither does the import."""
    code = """
import sys
import numpy as np
from cspdeploy.core.preprocess import preprocess
from cspdeploy.core.spec import Preprocess
contract = Preprocess(height_px=4, width_px=4, resize="crop", crop_pct=1.0, interpolation="bilinear",
                      channel_order="rgb", mean=(0.0,) * 3, std=(1.0,) * 3)
preprocess([np.zeros((4, 4, 3), np.uint8)], contract)
sys.exit("PIL" in sys.modules)
"""
    done = _python(code)
    assert done.returncode == 0, done.stderr


TOO_SMALL = """
import resource, sys
import numpy as np
from cspdeploy.core.errors import InputError
from cspdeploy.core.preprocess import read_pixels, resize_pixels
from cspdeploy.core.spec import Preprocess

by = sys.argv[1]
contract = Preprocess(height_px=8000, width_px=8000, resize="stretch", crop_pct=1.0, interpolation="bilinear",
                      channel_order="rgb", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
data = sys.stdin.buffer.read()
small = np.zeros((400, 400, 3), np.uint8)
read_pixels(data[:3] and b"P5 1 1 255\\n\\0", by=by)
resize_pixels(small, Preprocess(**{name: getattr(contract, name) for name in contract.__slots__} | {
    "height_px": 300, "width_px": 300}), by=by)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (60 << 20), used + (60 << 20)))
for call in (lambda: read_pixels(data, by=by), lambda: resize_pixels(small, contract, by=by)):
    try:
        call()
    except InputError as error:
        print(error.message, "|", error.fix)
"""


@pytest.mark.parametrize("by", ["built in", "pillow"])
def test_an_image_too_large_for_the_memory_is_bad_input(by: str) -> None:
    buffer = io.BytesIO()
    Image.new("L", (8000, 6000)).save(buffer, "PNG")
    done = subprocess.run(
        [sys.executable, "-c", TOO_SMALL, by], input=buffer.getvalue(), capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().splitlines() == [
        "image bytes: too large for the memory here | shrink the image",
        "image of 400x400 px: too large to be resized in the memory here | shrink the image",
    ]


def test_an_empty_folder_called_pil_is_no_pillow(tmp_path: Path) -> None:
    """Python takes it for a package: a look for the name alone finds it, and an import of PIL succeeds."""
    (tmp_path / "PIL").mkdir()
    code = "import PIL, numpy; from cspdeploy.core.preprocess import decoder; print(decoder(), PIL.__file__)"
    (tmp_path / "packages").mkdir()
    for path in Path(np.__file__).parents[1].glob("numpy*"):
        (tmp_path / "packages" / path.name).symlink_to(path)
    folders = os.pathsep.join(map(str, (tmp_path, ROOT, tmp_path / "packages")))
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env={**os.environ, "PYTHONPATH": folders}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "built in None\n"), done.stderr
