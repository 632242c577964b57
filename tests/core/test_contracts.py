from __future__ import annotations

import json
from pathlib import Path

import pytest

from cspdeploy.core.codec import to_json
from cspdeploy.core.contracts import CONTRACTS, find_contract
from cspdeploy.core.errors import InputError
from cspdeploy.core.spec import Preprocess
from cspdeploy.nets.network import darknet_contract, imagenet_contract


def test_named_contracts_are_those_of_the_networks() -> None:
    assert find_contract("imagenet", size_px=(224, 192)) == imagenet_contract(crop_pct=0.875).with_size(224, 192)
    assert find_contract("darknet", size_px=(256, 256)) == darknet_contract(256)
    assert find_contract("unit", size_px=(64, 64)).resize == "stretch"


@pytest.mark.parametrize("name", CONTRACTS)
def test_named_contract_of_a_free_input_needs_a_size(name: str) -> None:
    with pytest.raises(InputError, match="height and width are free") as caught:
        find_contract(name, size_px=None)
    assert "--size HxW" in caught.value.fix


@pytest.mark.parametrize(
    "wrap", [lambda c: c, lambda c: {"preprocess": c, "name": "m"}, lambda c: {"spec": {"preprocess": c}}]
)
def test_contract_of_a_file(tmp_path: Path, tiny_contract: Preprocess, wrap: object) -> None:
    path = tmp_path / "contract.json"
    path.write_text(json.dumps(wrap(to_json(tiny_contract))))  # type: ignore[operator]
    assert find_contract(str(path), size_px=None) == tiny_contract
    assert find_contract(str(path), size_px=(32, 32)) == tiny_contract


def test_contract_for_another_size_is_not_bent(tmp_path: Path, tiny_contract: Preprocess) -> None:
    path = tmp_path / "contract.json"
    path.write_text(json.dumps(to_json(tiny_contract)))
    with pytest.raises(InputError, match="is for 32x32 px, the network's input has 64x32 px") as caught:
        find_contract(str(path), size_px=(64, 32))
    assert "height_px to 64" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1]", "expected an object"), ("{", "not JSON"), ("{}", "missing"),
        ('{"preprocess": {"height_px": 0}}', "preprocess"), ('{"spec": 3}', "expected an object"),
    ],
)  # fmt: skip
def test_file_that_is_no_contract(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "contract.json"
    path.write_text(text)
    with pytest.raises(InputError, match=reason) as caught:
        find_contract(str(path), size_px=(32, 32))
    assert caught.value.fix


def test_unknown_name_asks_for_the_near_one() -> None:
    with pytest.raises(InputError, match="imagenet, unit, darknet") as caught:
        find_contract("imagnet", size_px=(32, 32))
    assert caught.value.fix.startswith("did you mean 'imagenet'?")
