"""A PyTorch network seen from inside: every operator that the dispatcher runs, eager or TorchScript.

Works on any session of PyTorch on the CPU, whatever module is in it. With `real` the same operators run in another
type: each floating-point tensor that reaches one is converted first, so that a TorchScript file whose constants are
frozen in float32 has an FP64 reference too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cspdeploy.core.errors import InputError
from cspdeploy.core.trace import Sink, TracedNode, Values
from cspdeploy.runtimes.base import Session

__all__ = ["TorchTrace"]

Array = npt.NDArray[Any]
Calls = Sequence[Mapping[str, Array]]


class TorchTrace:
    """A `TraceSource` over an open session of PyTorch on the CPU.

    Args:
        title: what runs on what, for the reader.
        real: the type to compute in; None: as the network is.
    """

    def __init__(self, session: Session, *, title: str, real: type[np.floating[Any]] | None = None) -> None:
        self.title = title
        self._session = session
        self._real = {np.float64: torch.float64, np.float32: torch.float32, None: None}[real]
        self._nodes: list[TracedNode] = []
        self._outputs: list[str] = []
        self._warm = False

    @property
    def nodes(self) -> Sequence[TracedNode]:
        """In the order of the run; known after `trace`."""
        return self._nodes

    @property
    def outputs(self) -> Sequence[str]:
        """Of the session, in its order; known after `trace`."""
        return self._outputs

    def trace(self, calls: Calls, sink: Sink, *, wanted: Collection[str] | None = None) -> None:
        """Run every call and give each floating-point tensor, or the wanted ones, to `sink` in the order of the run.

        Raises:
            InputError: it cannot be run.
        """
        for index, feeds in enumerate(calls):
            mode = _Watch(feeds, self._real, sink=sink, wanted=wanted, constants=index == 0)
            self._run(mode, feeds)

    def replay(self, calls: Calls, given: Values, targets: Sequence[str]) -> dict[str, list[Array]]:
        """The targets, where every consumer of a tensor of `given` takes the values given instead.

        Raises:
            InputError: it cannot be run.
        """
        found: dict[str, list[Array]] = {name: [] for name in targets}
        for index, feeds in enumerate(calls):
            values = {name: arrays[index] for name, arrays in given.items()}
            mode = _Watch(feeds, self._real, given=values, targets=found)
            self._run(mode, feeds)
        return found

    def _run(self, mode: _Watch, feeds: Mapping[str, Array]) -> None:
        try:
            with _plain_torchscript():
                if not self._warm:  # TorchScript rewrites its graph in the first runs, with operators of its own
                    self._session.run(feeds)
                    self._warm = True
                with _module_names(mode), mode:
                    found = self._session.run(feeds)
        except RuntimeError as error:
            reason = str(error).splitlines()[0][:200]
            raise InputError(f"{self.title}: cannot be run ({reason})", fix="cspdeploy verify, to see where") from error
        self._nodes = mode.nodes
        self._outputs = [name for array in found.values() if (name := mode.name_of_output(array))]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names every tensor by the operator that made it: "12" or, of several outputs, "12:1"."""

    def __init__(
        self,
        feeds: Mapping[str, Array],
        real: torch.dtype | None,
        *,
        sink: Sink | None = None,
        wanted: Collection[str] | None = None,
        constants: bool = False,
        given: Mapping[str, Array] | None = None,
        targets: Mapping[str, list[Array]] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes: list[TracedNode] = []
        self.module_of: Callable[[], str] = str
        self.parameters: dict[int, str] = {}
        self._sink, self._wanted, self._constants = sink, wanted, constants
        self._given, self._targets = given or {}, targets or {}
        self._real = real
        self._num_constants = 0
        self._inputs = {array.__array_interface__["data"][0]: name for name, array in feeds.items()}
        # By TensorImpl: a new tensor at the place of a freed one comes from an operator and so gets a name of its own.
        self._names: dict[int, str] = {}
        self._places: dict[int, str] = {}
        self._widened: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and note what it took and made."""
        kwargs = kwargs or {}
        taken = [self._name(value) for value in _tensors((args, kwargs))]
        given = list(_tensors((args, kwargs)))
        if self._real is not None:
            args, kwargs = self._converted(args), self._converted(kwargs)
        index = len(self.nodes)
        self._replay(func, args, kwargs, taken, index)
        result = func(*args, **kwargs)
        if func._schema.is_mutable:  # what was to be written to may have been converted
            for before, after in zip(given, _tensors((args, kwargs)), strict=True):
                if before is not after:
                    before.copy_(after)
        made = [value for value in _tensors(result) if value.is_floating_point() and value.numel()]
        if not made:
            return result
        names = [str(index) if position == 0 else f"{index}:{position}" for position in range(len(made))]
        operator = func.overloadpacket.__name__.rstrip("_")
        self.nodes.append(TracedNode(
            index=index, name=f"operator {index}", operator=operator, module=self.module_of(),
            inputs=tuple(filter(None, taken)), outputs=tuple(names), attributes=_settings(func, args, kwargs),
        ))  # fmt: skip
        for name, value in zip(names, made, strict=True):
            self._names[value._cdata] = name
            self._places[value.data_ptr()] = name
            if self._sink is not None and (self._wanted is None or name in self._wanted):
                self._sink(name, value.detach().cpu().numpy(), False)
        return result

    def name_of_output(self, array: Array) -> str:
        """The tensor whose memory an output array shares; of a single output, the last one made; else empty."""
        found = self._places.get(array.__array_interface__["data"][0], "")
        return found or (self.nodes[-1].outputs[0] if self.nodes else "")

    def _name(self, value: Tensor) -> str:
        """Empty for what is no floating-point tensor."""
        if not value.is_floating_point():
            return ""
        known = self._names.get(value._cdata)
        if known is not None:
            return known
        name = self._inputs.get(value.data_ptr()) or self.parameters.get(value.data_ptr())
        constant = name is None or name not in self._inputs.values()
        if name is None:
            self._num_constants += 1
            name = f"constant {self._num_constants}"
        self._names[value._cdata] = name
        due = (not constant or self._constants) and (self._wanted is None or name in self._wanted)
        if self._sink is not None and due:
            self._sink(name, value.detach().cpu().numpy(), constant)
        return name

    def _converted(self, value: Any) -> Any:
        """Floating-point tensors and types in the type to compute in."""
        if isinstance(value, Tensor):
            return self._widen(value) if value.is_floating_point() and value.dtype != self._real else value
        if isinstance(value, torch.dtype):
            return self._real if value.is_floating_point else value
        if isinstance(value, list | tuple):
            return type(value)(self._converted(item) for item in value)
        if isinstance(value, dict):
            return {key: self._converted(item) for key, item in value.items()}
        return value

    def _widen(self, value: Tensor) -> Tensor:
        kept = self._widened.get(value._cdata)
        if kept is None or kept[0] is not value:
            kept = value, value.to(self._real)
            self._widened[value._cdata] = kept
        return kept[1]

    def _replay(self, func: Any, args: Any, kwargs: Any, taken: list[str], index: int) -> None:
        """Run the operator on what was given instead, if its result is asked for."""
        if str(index) not in self._targets:
            return
        values = iter(zip(_tensors((args, kwargs)), taken, strict=True))
        replaced = {}
        for tensor, name in values:
            if name in self._given:
                given = torch.from_numpy(np.array(self._given[name])).to(tensor.dtype)
                replaced[id(tensor)] = given.reshape(tensor.shape)
            else:
                replaced[id(tensor)] = tensor.clone()  # the operator may write into it
        found = func(*_replaced(args, replaced), **_replaced(kwargs, replaced))
        first = next(value for value in _tensors(found) if value.is_floating_point() and value.numel())
        self._targets[str(index)].append(first.detach().cpu().numpy().copy())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _replaced(value: Any, by_id: Mapping[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return by_id[id(value)]
    if isinstance(value, list | tuple):
        return type(value)(_replaced(item, by_id) for item in value)
    if isinstance(value, dict):
        return {key: _replaced(item, by_id) for key, item in value.items()}
    return value


def _settings(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The operator's arguments that are no tensors, by the names of its schema."""
    named = {argument.name: argument.default_value for argument in func._schema.arguments}
    named |= {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    plain = (bool, int, float, str)
    return {
        name: value for name, value in {**named, **kwargs}.items()
        if isinstance(value, plain) or (isinstance(value, list | tuple) and all(isinstance(v, plain) for v in value))
    }  # fmt: skip


def _plain_torchscript() -> AbstractContextManager[Any]:
    """Without TorchScript's optimiser, which replaces operators by fused ones after some runs."""
    make: Any = getattr(torch.jit, "optimized_execution", None)
    return make(False) if make is not None else nullcontext()


@contextmanager
def _module_names(mode: _Watch) -> Iterator[None]:
    """Tells `mode` which module is running and what its parameters are called, from the first module that runs."""
    stack: list[str] = []
    names: dict[nn.Module, str] = {}

    def enter(module: nn.Module, _inputs: Any) -> None:
        if not names:
            names.update({child: name for name, child in module.named_modules()})
            parameters = (*module.named_parameters(), *module.named_buffers())
            mode.parameters = {value.data_ptr(): name for name, value in parameters if value.numel()}
        stack.append(names.get(module, ""))

    def leave(_module: nn.Module, _inputs: Any, _outputs: Any) -> None:
        stack.pop()

    mode.module_of = lambda: stack[-1] if stack else ""
    hooks = (
        nn.modules.module.register_module_forward_pre_hook(enter),
        nn.modules.module.register_module_forward_hook(leave),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
