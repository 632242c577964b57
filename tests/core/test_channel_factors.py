"""Factors on channels: stored and read again, and folded into weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from cspdeploy.core.channel_factors import fold_factors, pack_factors, unpack_factors
from cspdeploy.core.errors import InputError


@dataclass
class _Node:
    operator: str
    attributes: dict[str, Any] = field(default_factory=dict)


def test_comes_back_as_it_was_stored() -> None:
    same = np.array([1.0, 2.5, 9.9], np.float32)
    text = pack_factors({"b": same, "a": same, "plain": np.ones(4, np.float32)})
    found = unpack_factors(text)
    assert sorted(found) == ["a", "b"]
    np.testing.assert_allclose(found["a"], same, rtol=2**-11)
    assert len(text) < len(pack_factors({"a": same})) + 10, "what two tensors share is stored once"


def test_nothing_is_stored_of_a_network_that_is_as_it_was() -> None:
    assert pack_factors({"a": np.ones(3, np.float32)}) == ""
    assert unpack_factors("") == {}


@pytest.mark.parametrize("text", ["no JSON", "[]", "{}", '{"tensors":{"a":1},"rows":["AAA="]}',
                                  '{"tensors":{"a":0},"rows":["A"]}', '{"tensors":{"a":0},"rows":[3]}'])  # fmt: skip
def test_refuses_what_cannot_be_read(text: str) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        unpack_factors(text)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_refuses_factors_that_are_none(value: float) -> None:
    with pytest.raises(InputError, match="those of a are not all positive and finite"):
        unpack_factors(pack_factors({"a": np.array([2.0, value])}))


def test_folds_into_a_grouped_convolution() -> None:
    weight, taken, made = np.ones((4, 2, 1, 1)), np.array([1.0, 2.0, 4.0, 8.0]), np.array([1.0, 3.0, 5.0, 7.0])
    found = fold_factors(_Node("Conv", {"group": 2}), weight, taken=taken, made=made)
    np.testing.assert_allclose(found[:, :, 0, 0], [[1, 0.5], [3, 1.5], [1.25, 0.625], [1.75, 0.875]])


@pytest.mark.parametrize("transposed", [0, 1])
def test_folds_into_a_product(transposed: int) -> None:
    taken, made = np.array([1.0, 2.0]), np.array([1.0, 3.0, 5.0])
    weight = np.ones((3, 2) if transposed else (2, 3))
    found = fold_factors(_Node("Gemm", {"transB": transposed}), weight, taken=taken, made=made)
    expected = made / taken[:, None]
    np.testing.assert_allclose(found, expected.T if transposed else expected)
