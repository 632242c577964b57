from __future__ import annotations

import pytest

from cspdeploy.core.catalog import DEFAULT_OPSET
from cspdeploy.core.errors import InputError
from cspdeploy.core.targets import TARGETS
from cspdeploy.quant.placements import PLACEMENTS, Placement, find_placement

VNNI = frozenset({"avx2", "avx512f", "avx512_vnni"})
MAX_INT16 = 32767
REFUSED = {"opencv-4", "opencv-4.11", "coreml-via-ort", "nnapi-via-ort"}


@pytest.mark.parametrize("row", PLACEMENTS.values(), ids=lambda row: row.name)
def test_every_row_says_why_and_who_says_so(row: Placement) -> None:
    assert len(row.why) > 40
    assert "/" in row.source
    assert 13 <= row.min_opset <= row.max_opset


@pytest.mark.parametrize("row", PLACEMENTS.values(), ids=lambda row: row.name)
def test_symmetric_grids_are_signed(row: Placement) -> None:
    assert not row.symmetric or row.activation == "int8"


def test_this_machines_instructions_choose_the_row() -> None:
    assert find_placement(None, features=VNNI, machine="x86_64").weight_limit == 127
    assert find_placement(None, features=frozenset({"avx2", "amx_int8"}), machine="x86_64").name == "ort-cpu"
    assert find_placement(None, features=frozenset({"avx2"}), machine="x86_64").name == "ort-cpu-avx2"
    assert find_placement(None, features=frozenset(), machine="AMD64").name == "ort-cpu"
    assert find_placement(None, features=frozenset({"asimddp"}), machine="aarch64").name == "arm64"
    assert find_placement("ort-1.16", features=frozenset({"avx2"}), machine="x86_64").weight_limit < 127


def test_two_products_fit_in_16_bits_without_vnni() -> None:
    limit = PLACEMENTS["ort-cpu-avx2"].weight_limit
    assert 2 * 255 * limit <= MAX_INT16 < 2 * 255 * (limit + 1)


def test_tensorrt_takes_zero_points_of_zero() -> None:
    row = find_placement("tensorrt-10")
    assert (row.symmetric, row.activation, row.before_activation) == (True, "int8", False)


def test_target_narrows_the_opsets() -> None:
    assert find_placement("ort-1.10", features=VNNI, machine="x86_64").max_opset == 15
    assert find_placement("tensorrt-8.6").max_opset <= TARGETS["tensorrt-8.6"].max_opset
    assert find_placement("TRT-10").name == "tensorrt"
    assert find_placement("tensorrt-8.6").max_opset == 17
    assert (
        find_placement("tensorrt-10").max_opset >= DEFAULT_OPSET
    )  # else an export that names no opset would end there


@pytest.mark.parametrize("name", sorted(TARGETS.keys() - REFUSED))
def test_every_other_target_has_a_row(name: str) -> None:
    row = find_placement(name)
    assert row.name in PLACEMENTS
    assert row.max_opset <= TARGETS[name].max_opset


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_target_without_a_verified_form_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=name):
        find_placement(name)


def test_unknown_target_offers_the_nearest() -> None:
    with pytest.raises(InputError) as caught:
        find_placement("openvin")
    assert "openvino" in caught.value.fix
