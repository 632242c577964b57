from __future__ import annotations

import onnx
import pytest

from cspdeploy.core.errors import InputError
from cspdeploy.core.targets import COMPOSITES, OPERATOR_SINCE, TARGETS, Target, find_target

CASES = [pytest.param(target, id=name) for name, target in TARGETS.items()]


def test_operators_and_their_opsets_are_those_of_onnx() -> None:
    first: dict[str, int] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            first[schema.name] = min(first.get(schema.name, schema.since_version), schema.since_version)
    newest = max(OPERATOR_SINCE.values())
    assert {name: since for name, since in first.items() if since <= newest} == OPERATOR_SINCE
    assert {name: composite.since for name, composite in COMPOSITES.items()} == {
        name: first[name] for name in COMPOSITES
    }


@pytest.mark.parametrize("target", CASES)
def test_every_row_and_rule_names_its_source(target: Target) -> None:
    sources = [target.caps_source, target.operators_source, target.free_dims_source]
    sources += [rule.source for rule in (*target.rules, *target.dtypes, *target.patterns)]
    assert all("/" in source for source in sources), sources  # a repository, a thread or an address
    assert all(rule.takes and rule.fix for rule in (*target.rules, *target.dtypes, *target.patterns))


@pytest.mark.parametrize("target", CASES)
def test_a_target_speaks_of_operators_that_there_are(target: Target) -> None:
    assert (target.operators or set()) <= set(OPERATOR_SINCE)
    for rule in target.rules:
        assert set(rule.operators) <= set(OPERATOR_SINCE), rule
        # A rule on an operator that the target lacks anyway would never be read.
        assert target.operators is None or set(rule.operators) & target.operators, rule


@pytest.mark.parametrize("target", CASES)
def test_what_a_target_lacks_or_does_not_know_yet_is_decomposed(target: Target) -> None:
    for name, composite in COMPOSITES.items():
        lacks = target.operators is not None and name not in target.operators
        assert (name in target.decompose) == (lacks or composite.since > target.max_opset), name


def test_mish_is_decomposed_for_old_runtimes_and_for_those_without_it() -> None:
    assert {name for name in TARGETS if "Mish" not in TARGETS[name].decompose} == {
        "ort-1.14", "ort-1.16", "ort-web", "tensorrt-10", "openvino", "ort-cuda",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("ort>=1.16", "ort-1.16"), ("ORT-1.12", "ort-1.12"), ("opencv-4", "opencv-4"), (" openvino ", "openvino"),
        ("tensorrt-8.6", "tensorrt-8.6"), ("trt-10", "tensorrt-10"), ("coreml", "coreml-via-ort"),
        ("nnapi-via-ort", "nnapi-via-ort"), ("ort-web", "ort-web"), ("onnxruntime-mobile", "ort-mobile"),
    ],
)  # fmt: skip
def test_names_and_aliases(spelled: str, name: str) -> None:
    assert find_target(spelled).name == name


def test_no_spelling_means_two_targets() -> None:
    spellings = [spelling for target in TARGETS.values() for spelling in (target.name, *target.aliases)]
    assert len(spellings) == len(set(spellings))
    assert all(spelling == spelling.lower() for spelling in spellings)


def test_an_unknown_target_gets_the_nearest_name() -> None:
    with pytest.raises(InputError) as caught:
        find_target("tensorrt8.6")
    assert "target 'tensorrt8.6': unknown" in caught.value.message
    assert "did you mean 'tensorrt-8.6'?" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "opset", "ir"),
    # onnxruntime.ai/docs/reference/compatibility.html
    [("ort-1.10", 15, 8), ("ort-1.12", 17, 8), ("ort-1.14", 18, 8), ("ort-1.16", 19, 9)],
)
def test_caps_of_onnx_runtime(name: str, opset: int, ir: int) -> None:
    target = find_target(name)
    assert (target.max_opset, target.max_ir, target.dynamic_batch) == (opset, ir, True)


def test_where_the_batch_may_be_free() -> None:
    fixed = {name for name, target in TARGETS.items() if not target.dynamic_batch}
    assert fixed == {"coreml-via-ort", "nnapi-via-ort"}
