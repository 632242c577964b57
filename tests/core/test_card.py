import dataclasses
import json
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from cspdeploy.core.card import CARD_KEY, SUMMARY_KEY, ModelCard, read_card, stamp_card
from cspdeploy.core.errors import InputError
from cspdeploy.core.onnx_graph import read_onnx
from cspdeploy.core.spec import Preprocess, Provenance
from cspdeploy.core.types import Frontend

CARD = ModelCard(
    model="tiny", artifact="onnx", task="classify", labels=("a", "b ü"),
    preprocess=Preprocess(
        height_px=32, width_px=32, resize="crop", crop_pct=1.0, interpolation="bilinear", channel_order="rgb",
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
    ),
    outputs=("logits",), provenance=Provenance(source="trained", origin="here"), tool="cspdeploy 9",
    frontend=Frontend(top_k=1),
)  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    model = helper.make_model(graph)
    model.metadata_props.add(key="theirs", value="stays")
    onnx.save(model, tmp_path / "x.onnx")
    return tmp_path / "x.onnx"


def card_in(path: Path) -> ModelCard | None:
    return read_card(read_onnx(path).metadata, name=path.name)


def test_a_stamped_file_gives_the_card_back_and_stays_valid_with_its_other_metadata(file: Path) -> None:
    before = onnx.load(file).graph
    stamp_card(file, CARD)
    assert card_in(file) == CARD
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert model.graph == before
    assert {entry.key: entry.value for entry in model.metadata_props}["theirs"] == "stays"
    assert [path.name for path in file.parent.iterdir()] == ["x.onnx"]


def test_a_second_stamp_takes_the_place_of_the_first_and_the_same_card_gives_the_same_bytes(file: Path) -> None:
    stamp_card(file, CARD)
    once = file.read_bytes()
    stamp_card(file, dataclasses.replace(CARD, model="other"))
    assert sum(entry.key == CARD_KEY for entry in onnx.load(file).metadata_props) == 1
    assert card_in(file) == dataclasses.replace(CARD, model="other")
    stamp_card(file, CARD)
    assert file.read_bytes() == once


def test_random_weights_are_called_untrained_in_the_sentence_that_viewers_show(file: Path) -> None:
    stamp_card(file, dataclasses.replace(CARD, provenance=Provenance(source="random")))
    assert "UNTRAINED" in read_onnx(file).metadata[SUMMARY_KEY]
    assert "UNTRAINED" not in CARD.summary


def test_a_file_without_a_card_has_none(file: Path) -> None:
    assert card_in(file) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "schema_version None"),
        ('{"schema_version": 99}', "schema_version 99"),
        (json.dumps({"schema_version": 1, "model": "x"}), "missing key"),
        ("[" * 100_000, "not JSON"),
        ("x" * (2**24 + 1), "at most"),
    ],
)
def test_a_card_that_cannot_be_one_is_refused_by_name(text: str, reason: str) -> None:
    with pytest.raises(InputError, match=r"^x\.onnx: ") as caught:
        read_card({CARD_KEY: text}, name="x.onnx")
    assert reason in caught.value.message
