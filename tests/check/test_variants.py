from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cspdeploy.check.variants import (
    CUDA_GRAPH,
    PLAIN,
    graph_variant,
    require_variants,
    select_variants,
    variants_of,
)
from cspdeploy.core.errors import InputError
from cspdeploy.runtimes.base import CudaOptions, SessionRequest

REQUEST = SessionRequest(
    path=Path("net.onnx"), tf32=True, num_threads=3, cuda=CudaOptions(device=2, conv_search="exhaustive")
)


@pytest.mark.parametrize(
    ("runtime", "names"),
    [
        (
            "torch-cuda",
            ["", "channels-last", "fp16", "fp16 channels-last", "compile fp16", "compile fp16 channels-last"],
        ),
        ("ort-cuda", ["", "cuda-graph", "nhwc", "nhwc cuda-graph"]),
        ("ort-tensorrt", ["", "cuda-graph"]),
        ("torch-cpu", ["", "channels-last", "compile"]),
        ("openvino", [""]),
    ],
)
def test_every_runtime_has_the_plain_variant_first(runtime: str, names: list[str]) -> None:
    assert [one.name for one in variants_of(runtime)] == names
    assert variants_of(runtime)[0].apply(REQUEST) == REQUEST
    assert all(one.note for one in variants_of(runtime)[1:])


def test_a_variant_sets_what_it_is_named_for_and_nothing_else() -> None:
    found = {one.name: one.apply(REQUEST) for one in variants_of("torch-cuda")}
    for layout in ("", " channels-last"):
        made = found[f"compile fp16{layout}"]
        assert (made.cuda.half, made.cuda.channels_last, made.cuda.compile) == (True, bool(layout), "max-autotune")
        assert (made.cuda.device, made.cuda.conv_search, made.tf32, made.num_threads) == (2, "exhaustive", True, 3)
    assert not found["channels-last"].cuda.half
    graph = {one.name: one.apply(REQUEST) for one in variants_of("ort-cuda")}["nhwc cuda-graph"]
    assert graph == dataclasses.replace(
        REQUEST, cuda_graph=True, cuda=dataclasses.replace(REQUEST.cuda, channels_last=True)
    )


def test_all_variants_of_a_runtime_are_different_requests() -> None:
    for runtime in ("torch-cpu", "torch-cuda", "ort-cuda", "ort-tensorrt"):
        made = [repr(one.apply(REQUEST)) for one in variants_of(runtime)]
        assert len(set(made)) == len(made)


def test_what_is_selected() -> None:
    def names(runtime: str, *, every: bool = False, of: tuple[str, ...] = (), graph: bool = False) -> list[str]:
        return [one.name for one in select_variants(runtime, every=every, names=of, cuda_graph=graph)]

    assert names("ort-cuda") == [PLAIN]
    assert names("ort-cuda", of=("nhwc", "fp16")) == [PLAIN, "nhwc"]
    assert names("ort-cuda", graph=True) == [PLAIN, CUDA_GRAPH]
    assert names("ort-cuda", every=True, graph=True) == [PLAIN, CUDA_GRAPH, "nhwc", "nhwc cuda-graph"]
    assert names("torch-cuda", of=(CUDA_GRAPH,)) == [PLAIN, CUDA_GRAPH]  # none of its list, but it can capture
    assert names("torchscript-cuda", every=True, graph=True) == [PLAIN, CUDA_GRAPH]
    assert names("ort-cpu", every=True, graph=True) == [PLAIN]
    assert graph_variant("openvino") is None


def test_variant_that_no_runtime_has() -> None:
    require_variants(["ort-cuda", "torch-cpu"], ["nhwc", "compile", CUDA_GRAPH])
    with pytest.raises(InputError, match="--variant nhcw: unknown, expected one of cuda-graph, nhwc") as caught:
        require_variants(["ort-cuda"], ["nhcw"])
    assert "nhwc" in caught.value.fix
    with pytest.raises(InputError, match="have no variants"):
        require_variants(["ort-cpu"], ["nhwc"])
