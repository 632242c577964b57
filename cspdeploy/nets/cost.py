"""What a network costs: parameters, weights, multiply-accumulates, activations, and the memory that they need.

A MAC is one multiplication and one addition. Convolutions and linear layers are counted, as in published tables;
norms, activations, sums and pools are not. Darknet's BFLOPs are two for each MAC of the same layers.

Everything is found by one forward pass on PyTorch's meta device: shapes alone, no memory, no arithmetic. Its own
kernels for that device are slow to load and to run, so the common operations get their shapes from
`cspdeploy.nets.shapes`; any other one goes to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cspdeploy.core.spec import ModelSpec
from cspdeploy.nets.exported import as_exported
from cspdeploy.nets.registry import build
from cspdeploy.nets.shapes import SHAPES

__all__ = ["Cost", "measure_cost", "measure_module"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one image in float32.

    Attributes:
        num_parameters: the learnable ones.
        num_conv_weights: weights of convolutions and linear layers, without biases and norms: the "#Parameter" of the
            CSPNet authors' tables.
        num_macs: of convolutions and linear layers.
        num_activations: output elements of convolutions and linear layers.
        peak_activation_bytes: the most that tensors need at one moment of the forward pass. The operations run one
            after the other, as the network is written. A tensor lives from the operation that makes it to the last
            one that reads it, the network's outputs to the end; what an operation reads and what it makes are there
            together. Views and operations in place make nothing, nor does a batch norm that alone reads a
            convolution, for every artifact has it folded away. Not counted: weights, results that nothing reads (the
            indices of a max pooling), an engine's workspace.
    """

    num_parameters: int
    num_conv_weights: int
    num_macs: int
    num_activations: int
    peak_activation_bytes: int

    @property
    def bflops(self) -> float:
        """Billions of operations as Darknet prints them for convolutions: two for each MAC."""
        return 2 * self.num_macs / 1e9


def measure_cost(spec: ModelSpec) -> Cost:
    """Cost of what is exported of `spec`, at its input size.

    Raises:
        InputError: no such network can be built.
    """
    with torch.device("meta"), _WithoutInit():
        model = as_exported(build(spec), spec)
    return measure_module(model, height_px=spec.preprocess.height_px, width_px=spec.preprocess.width_px)


def measure_module(model: nn.Module, *, height_px: int, width_px: int) -> Cost:
    """Cost of a module on the meta device that takes `[1, 3, height_px, width_px]`. Leaves it in evaluation mode."""
    macs = activations = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs, activations
        weight: Tensor = module.weight  # type: ignore[assignment]
        macs += output.numel() * (weight.numel() // len(weight))  # an output is the dot product with one weight row
        activations += output.numel()

    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    x_NCHW = torch.empty(1, 3, height_px, width_px, device="meta")
    tape = _Tape(model)
    try:
        with torch.no_grad(), tape:
            outputs = model.eval()(x_NCHW)
    finally:
        for hook in hooks:
            hook.remove()
    return Cost(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_conv_weights=sum(layer.weight.numel() for layer in layers),
        num_macs=macs,
        num_activations=activations,
        peak_activation_bytes=tape.peak_bytes(outputs),
    )


_FILLS = frozenset(
    {
        "constant_", "fill_", "kaiming_normal_", "kaiming_uniform_", "normal_", "ones_", "trunc_normal_", "uniform_",
        "zero_", "zeros_",
    }
)  # fmt: skip


class _WithoutInit(TorchFunctionMode):
    """Leaves out the values of fresh weights, which a network of shapes alone has no place for."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _FILLS:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class _Step:
    """One operation: the storages that it reads and those that it makes, by their addresses."""

    operation: Any
    reads: tuple[int, ...]
    makes: tuple[int, ...]


class _Tape(TorchDispatchMode):
    """Writes down every operation on activations, with its shape from `SHAPES` if it is there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._weights = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._storages: dict[int, torch.UntypedStorage] = {}
        """Kept, so that no address is given out twice."""
        self._steps: list[_Step] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to say so to the compiler would load it

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        compute = SHAPES.get(func, func)
        result = compute(*args, **(kwargs or {}))
        reads = self._addresses((args, kwargs))
        makes = tuple(address for address in self._addresses(result) if address not in reads)
        self._steps.append(_Step(func, reads, makes))
        return result

    def _addresses(self, value: Any) -> tuple[int, ...]:
        found = []
        for tensor in _tensors(value):
            address = _address(tensor)
            if address not in self._weights:
                self._storages[address] = tensor.untyped_storage()
                found.append(address)
        return tuple(found)

    def peak_bytes(self, outputs: Any) -> int:
        """See `Cost.peak_activation_bytes`."""
        kept = self._addresses(outputs)
        renamed = self._folded_norms(kept)

        def named(addresses: tuple[int, ...]) -> set[int]:
            return {renamed.get(address, address) for address in addresses}

        last_read: dict[int, int] = {}
        for i, step in enumerate(self._steps):
            last_read.update(dict.fromkeys(named(step.reads), i))
        last_read.update(dict.fromkeys(named(kept), len(self._steps)))
        alive: set[int] = set()
        peak = 0
        for i, step in enumerate(self._steps):
            alive |= {address for address in named(step.reads + step.makes) if address in last_read}
            peak = max(peak, sum(self._storages[address].nbytes() for address in alive))
            alive = {address for address in alive if last_read[address] > i}
        return peak

    def _folded_norms(self, outputs: tuple[int, ...]) -> dict[int, int]:
        """Output of each batch norm that alone reads a convolution, to the output of that convolution."""
        made_by_conv = {step.makes[0] for step in self._steps if step.operation is aten.convolution.default}
        readers = dict.fromkeys(outputs, 1)
        for step in self._steps:
            for address in set(step.reads):
                readers[address] = readers.get(address, 0) + 1
        return {
            step.makes[0]: step.reads[0]
            for step in self._steps
            if step.operation is aten.native_batch_norm.default
            and step.reads[0] in made_by_conv
            and readers[step.reads[0]] == 1
        }


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
