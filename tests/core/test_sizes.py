from __future__ import annotations

import pytest

from cspdeploy.core.sizes import base_kind, golden_file, size_of, sized_kind, split_kind


@pytest.mark.parametrize(
    ("kind", "split"),
    [
        ("onnx", ("onnx", None)),
        ("onnx-int8@320x256", ("onnx-int8", (320, 256))),
        ("a@b/tiny@48x40", ("a@b/tiny", (48, 40))),
        ("photo@2x.onnx", ("photo@2x.onnx", None)),
        ("onnx@0x40", ("onnx@0x40", None)),
        ("onnx@48x", ("onnx@48x", None)),
        ("onnx@\N{ARABIC-INDIC DIGIT FOUR}8x40", ("onnx@\N{ARABIC-INDIC DIGIT FOUR}8x40", None)),
    ],
)
def test_a_kind_is_split_only_at_a_size(kind: str, split: tuple[str, tuple[int, int] | None]) -> None:
    assert split_kind(kind) == split
    assert (base_kind(kind), size_of(kind)) == split
    assert sized_kind(*split) == kind


def test_golden_images_are_named_by_their_size() -> None:
    assert (golden_file(None), golden_file((320, 256))) == ("golden.npz", "golden.320x256.npz")
