"""Where ONNX Runtime has put each node of a session, and the copies between devices that it added. Imports no onnx."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cspdeploy.core.types import PlacedNode
from cspdeploy.runtimes.ort_open import ON_GPU, TENSORRT, session_options

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["find_copies", "read_assignment", "read_copies"]


def read_assignment(session: onnxruntime.InferenceSession) -> tuple[PlacedNode, ...]:
    """Nodes with their providers, from the engine's own record (ONNX Runtime 1.23 and later; else empty)."""
    try:
        subgraphs = session.get_provider_graph_assignment_info()
    except (AttributeError, RuntimeError):
        return ()
    return tuple(
        PlacedNode(provider=subgraph.ep_name, node=node.name, operator=node.op_type)
        for subgraph in subgraphs
        for node in subgraph.get_nodes()
    )


def read_copies(
    source: str | bytes, *, providers: Sequence[Any], provider: str, optimise: bool
) -> tuple[PlacedNode, ...] | None:
    """The copies in a model's finished graph, by opening it once more; None where that is not possible.

    They are inserted after the assignment that the engine records, so they are read from the graph that it writes. A
    graph that holds engines of TensorRT it refuses to write, and to build them once more would take minutes.
    """
    if provider == TENSORRT:
        return None
    import onnxruntime

    from cspdeploy.runtimes.ort_cuda import open_quietly
    from cspdeploy.runtimes.ort_providers import keep_pairs

    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "optimised.onnx"
            options = session_options(optimise=optimise)
            options.optimized_model_filepath = str(path)
            # Weights beside it, so that a model of any size can be written.
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", "optimised.data"
            )  # fmt: skip
            switched_off = keep_pairs(provider, options) or None
            with open_quietly() if provider in ON_GPU else contextlib.nullcontext():
                onnxruntime.InferenceSession(
                    source, options, providers=list(providers), disabled_optimizers=switched_off
                )
            return find_copies(path, provider=provider)
    except Exception:  # nothing may be written, no memory for a second session, ...: not known
        return None


def find_copies(path: Path, *, provider: str) -> tuple[PlacedNode, ...]:
    """The copies to and from the host in a graph that the engine has written after placing it on `provider`.

    Raises:
        InputError: not an ONNX file.
    """
    from cspdeploy.core.onnx_graph import read_onnx, walk_nodes

    return tuple(
        PlacedNode(provider=provider, node=node.name, operator=node.operator)
        for node in walk_nodes(read_onnx(path).graph)
        if node.operator in ("MemcpyFromHost", "MemcpyToHost")
    )
