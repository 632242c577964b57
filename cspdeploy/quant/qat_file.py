"""What quantisation-aware training leaves behind: one safetensors file with integers, steps and grids, and its record.

`integers/W` int8 and `scales/W` float32 of each quantised weight W, `values/T` float32 of whatever else was trained or
equalised (of every weight, before it is trained); grids and record are JSON in the header, so that they cannot fall out
of step with the tensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cspdeploy.core.channel_factors import pack_factors, unpack_factors
from cspdeploy.core.codec import JsonObject
from cspdeploy.core.errors import InputError
from cspdeploy.quant.place import Layout
from cspdeploy.quant.plan import Grid, QuantPlan, WeightGrid

__all__ = ["QatOrigin", "TrainedPlan", "find_qat", "graph_fingerprint", "load_qat", "qat_path", "write_qat"]

FORMAT = 1
_UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError)
_ANEW = "train again: cspdeploy train MODEL --qat --overwrite"


@dataclass(frozen=True, slots=True, kw_only=True)
class QatOrigin:
    """What a plan was trained for: it fits nothing else.

    Attributes:
        weights_sha256: of the float weights' file that it started from.
        placement: name of the row of `placements`.
        fingerprint: `graph_fingerprint` of the prepared graph.
        height_px, width_px: of the network's input.
    """

    weights_sha256: str
    placement: str
    fingerprint: str
    height_px: int
    width_px: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainedPlan:
    """A plan whose weights were trained.

    Attributes:
        record: how it was trained and what that brought, for the manifest.
    """

    plan: QuantPlan
    origin: QatOrigin
    record: JsonObject
    path: Path

    def require_fit(self, origin: QatOrigin, layout: Layout) -> None:
        """Refuse another network, weights, size or placement than it was trained for.

        Raises:
            InputError: names what differs.
        """
        told = {
            "weights_sha256": "other weights", "placement": f"placement {origin.placement}",
            "height_px": f"{origin.height_px} px height", "width_px": f"{origin.width_px} px width",
            "fingerprint": "another graph (by opset, batch, simplifier or split convolutions)",
        }  # fmt: skip
        differing = [told[name] for name in told if getattr(self.origin, name) != getattr(origin, name)]
        if not differing and (set(layout.tensors), set(layout.weights)) != (
            set(self.plan.grids),
            set(self.plan.weights),
        ):
            differing = ["another layout of the grids"]
        if differing:
            raise InputError(
                f"{self.path}: was trained for something else, this is of {', '.join(dict.fromkeys(differing))}",
                fix=f"export as it was trained, or {_ANEW}, or move the file away",
            )


def qat_path(folder: Path, placement: str) -> Path:
    """Of the trained plan for a placement, in the model's folder."""
    return folder / f"qat-{placement}.safetensors"


def find_qat(folder: Path, placement: str) -> Path | None:
    """The trained plan of a model for a placement, if it has one."""
    path = qat_path(folder, placement)
    return path if path.is_file() else None


def graph_fingerprint(model: onnx.ModelProto) -> str:
    """SHA-256 over operators, attributes, names, and the shapes of the weights; their values and the opset aside."""
    found = hashlib.sha256()
    for node in model.graph.node:
        attributes = sorted(a.SerializeToString(deterministic=True) for a in node.attribute if a.name != "doc_string")
        told = [node.op_type, node.domain, list(node.input), list(node.output), [a.hex() for a in attributes]]
        found.update(json.dumps(told).encode())
    tensors = sorted((tensor.name, tensor.data_type, list(tensor.dims)) for tensor in model.graph.initializer)
    found.update(json.dumps([tensors, [value.name for value in model.graph.output]]).encode())
    return found.hexdigest()


def write_qat(path: Path, plan: QuantPlan, *, origin: QatOrigin, record: JsonObject) -> None:
    """Write beside, then rename; the same plan and record give the same bytes."""
    tensors: dict[str, np.ndarray[Any, Any]] = {f"scales/{name}": grid.scales for name, grid in plan.weights.items()}
    tensors |= {f"integers/{name}": whole for name, whole in plan.integers.items()}
    tensors |= {f"values/{name}": value for name, value in plan.values.items() if name not in plan.integers}
    header = {
        "format": FORMAT, "origin": dataclasses.asdict(origin), "record": record,
        "grids": {name: dataclasses.asdict(grid) for name, grid in plan.grids.items()},
        "weights": {name: {"axis": grid.axis, "limit": grid.limit} for name, grid in plan.weights.items()},
        "biases": {name: list(pair) for name, pair in plan.biases.items()}, "factors": pack_factors(plan.factors),
    }  # fmt: skip
    ready = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(save(ready, metadata={"qat": json.dumps(header)}))
    beside.replace(path)


def load_qat(path: Path) -> TrainedPlan:
    """Read what `write_qat` wrote.

    Raises:
        InputError: missing, not such a file, of another format, or with values that are not finite or off their grid.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {})["qat"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        if header["format"] != FORMAT:
            raise InputError(f"{path}: format {header['format']}, expected {FORMAT}", fix=_ANEW)
        plan = _plan(header, tensors)
        origin, record = QatOrigin(**header["origin"]), dict(header["record"])
    except _UNREADABLE as error:
        raise InputError(f"{path}: not a plan of quantisation-aware training ({error})", fix=_ANEW) from error
    _require_sound(plan, path)
    return TrainedPlan(plan=plan, origin=origin, record=record, path=path)


def _plan(header: JsonObject, tensors: Mapping[str, np.ndarray[Any, Any]]) -> QuantPlan:
    weights = {
        name: WeightGrid(scales=tensors[f"scales/{name}"], axis=int(row["axis"]), limit=int(row["limit"]))
        for name, row in header["weights"].items()
    }
    integers, values = (
        {name.removeprefix(kind): value for name, value in tensors.items() if name.startswith(kind)}
        for kind in ("integers/", "values/")
    )
    values |= {name: weights[name].dequantise(whole) for name, whole in integers.items()}
    return QuantPlan(
        grids={name: Grid(**row) for name, row in header["grids"].items()}, weights=weights, values=values,
        integers=integers, biases={name: (pair[0], pair[1]) for name, pair in header["biases"].items()},
        factors={name: f.astype(np.float32) for name, f in unpack_factors(header.get("factors", "")).items()},
    )  # fmt: skip


def _require_sound(plan: QuantPlan, path: Path) -> None:
    """Nothing is trusted from outside: a NaN in a scale would be in every output."""
    broken = [name for name, value in plan.values.items() if not np.isfinite(value).all()]
    broken += [name for name, grid in plan.grids.items() if not (0 < grid.scale < float("inf"))]
    for name, grid in plan.weights.items():
        whole = plan.integers.get(name, np.zeros(0, np.int8))
        sound = whole.dtype == np.int8 and (grid.scales > 0).all() and np.isfinite(grid.scales).all()
        if not sound or np.abs(whole.astype(np.int16)).max(initial=0) > grid.limit:
            broken.append(name)
    if broken:
        raise InputError(f"{path}: values that no training leaves, in {', '.join(sorted(broken)[:4])}", fix=_ANEW)
