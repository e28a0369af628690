"""Full and cached steps as two static CUDA graphs: one launch each, with the step's scales read from device tables."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.models.adapter import Adapter
from cachequant.quant.context import ContextOperands
from cachequant.quant.step_tables import StepTables
from cachequant.types import AffineMap

Body = Callable[[], tuple[Tensor, ...]]
Replay = Callable[[], tuple[Tensor, ...]]

WARM_UP = 2
"""Runs before a capture: the first loads, compiles and tunes kernels."""


class CudaRecorder:
    """Captures functions into CUDA graphs that share one memory pool.

    Args:
        device: the card that they run on, default the current one.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._pool: Any = None
        self._stream: Any = None  # torch's own capture stream stays on the card that was captured on first

    def __call__(self, body: Body) -> Replay:
        """Run `body` a few times, capture it, and return what replays it; its results stay at the same addresses."""
        with torch.cuda.device(self._device):
            return self._record(body)

    def _record(self, body: Body) -> Replay:
        self._stream = side = self._stream or torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                body()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=side):
            made = body()
        self._pool = graph.pool()

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return made

        return replay


def capturable(network: object) -> StepTables | None:
    """The tables of a deployment whose layers all read their rows from them; None where some are simulated.

    Args:
        network: what `cachequant.quant.deploy.attach` returned, or None.
    """
    return None if getattr(network, "simulation", None) is not None else getattr(network, "tables", None)


class Inputs:
    """Tensors at fixed addresses that a graph reads.

    Args:
        like: name -> tensor of the shape and type.
        device: where they are.
    """

    def __init__(self, like: dict[str, Tensor], device: torch.device) -> None:
        with torch.inference_mode(False):  # the graph outlives the caller's mode
            self.fixed = {name: torch.empty_like(tensor, device=device) for name, tensor in like.items()}
        self._loaded: dict[str, tuple[Tensor, int]] = {}

    def load(self, tensors: dict[str, Tensor], anew: bool) -> None:
        """Copy what is not there yet: another tensor, one that was written to, or, `anew`, everything."""
        if anew:
            self._loaded.clear()
        for name, tensor in tensors.items():
            version = -1 if tensor.is_inference() else tensor._version  # inference tensors do not count
            known, then = self._loaded.get(name, (None, -1))
            if known is not tensor or version != then or version == -1:
                self.fixed[name].copy_(tensor, non_blocking=True)
                self._loaded[name] = tensor, version


def take_apart(value: Any, name: str, tensors: dict[str, Tensor]) -> Hashable:
    """Put the tensors of an argument, also those in lists, tuples and dictionaries, into `tensors`; the rest as a key."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return tuple((str(key), take_apart(part, f"{name}.{key}", tensors)) for key, part in value.items())
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value).__name__, *(take_apart(part, f"{name}.{i}", tensors) for i, part in enumerate(value))
    return repr(value)


def put_together(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """An argument as it was, with the tensors of `tensors` in place of its own."""
    if isinstance(value, Tensor):
        return tensors[name]
    if isinstance(value, dict):
        return {key: put_together(part, f"{name}.{key}", tensors) for key, part in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)(put_together(part, f"{name}.{i}", tensors) for i, part in enumerate(value))
    return value


@dataclass(frozen=True)
class Captured:
    """A graph and the inputs that it reads."""

    inputs: Inputs
    replay: Replay


class GraphedAdapter:
    """An adapter whose `full` and `cached` replay graphs; everything else is the wrapped adapter's.

    Inputs are copied to fixed addresses, once in a run if they are the same tensor at every step (the conditioning, a cached
    feature), and outputs are copied from them. A new shape, type or non-tensor argument is captured anew. Deployed layers
    find the rows of their step through `tables`; layers that are simulated read Python numbers and
    cannot be captured.

    Args:
        adapter: of the network.
        cache: tells the step.
        tables: of the deployed layers, or None for a network without.
        record: makes a replay of a function; a `CudaRecorder` on a GPU.
        context: keys and values of cross-attention that are computed outside the graphs, once a prompt.
    """

    def __init__(
        self,
        adapter: Adapter,
        cache: FeatureCache,
        tables: StepTables | None,
        record: Callable[[Body], Replay],
        context: ContextOperands | None = None,
    ) -> None:
        self.adapter, self.cache, self.tables, self.record, self.context = adapter, cache, tables, record, context
        self._graphs: dict[Hashable, Captured] = {}
        self._recent: dict[str, tuple[dict[str, Any], Captured]] = {}  # kind -> arguments of the last call, its graph

    def __getattr__(self, name: str) -> Any:
        return getattr(self.adapter, name)

    def full(self, x: Tensor, timestep: Any, cond: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`Adapter.full`, replayed."""
        output, feature = self._step("full", {"x": x, "timestep": timestep, "cond": cond, **kwargs})
        return output.clone(), feature.clone(memory_format=torch.preserve_format)

    def cached(
        self,
        x: Tensor,
        timestep: Any,
        cond: Any,
        cached_feature: Tensor,
        correction: AffineMap | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`Adapter.cached`, replayed; the correction is applied before."""
        if correction is not None:
            cached_feature = correction.apply(cached_feature, channel_dim=self.adapter.channel_dim)
        arguments = {"x": x, "timestep": timestep, "cond": cond, "cached_feature": cached_feature, **kwargs}
        (output,) = self._step("cached", arguments)
        return output.clone()

    def _step(self, kind: str, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        """Fill the fixed inputs, select the step, replay."""
        x = arguments["x"]
        prompt = arguments.get("encoder_hidden_states")
        if self.context is not None and isinstance(prompt, Tensor):
            self.context.update(prompt.to(x) if prompt.dtype != x.dtype else prompt, self.record)
        timestep = torch.as_tensor(arguments["timestep"])
        looked_up = self.tables is not None and self.tables.timestep is not None
        arguments["timestep"] = timestep.shape if looked_up else timestep
        found = self._as_before(kind, arguments)
        if found is None:
            tensors: dict[str, Tensor] = {}
            captured = self._captured(kind, arguments, tensors)
            if all(_is_plain(value) for value in arguments.values()):
                self._recent[kind] = arguments, captured
        else:
            captured, tensors = found
        self._load(captured.inputs, tensors)
        return captured.replay()

    def _as_before(self, kind: str, arguments: dict[str, Any]) -> tuple[Captured, dict[str, Tensor]] | None:
        """The graph of the last call, where only the contents of tensors differ: no key is made of the arguments then."""
        before, captured = self._recent.get(kind, ({}, None))
        if captured is None or before.keys() != arguments.keys():
            return None
        if not all(_is_alike(value, before[name]) for name, value in arguments.items()):
            return None
        return captured, {name: value for name, value in arguments.items() if isinstance(value, Tensor)}

    def _captured(self, kind: str, arguments: dict[str, Any], tensors: dict[str, Tensor]) -> Captured:
        """The graph for arguments of these kinds and shapes, captured at need; their tensors go into `tensors`."""
        key = (kind, tuple((name, take_apart(value, name, tensors)) for name, value in arguments.items()))
        if key not in self._graphs:
            inputs = Inputs(tensors, arguments["x"].device)
            self._load(inputs, tensors)
            fixed = {name: put_together(value, name, inputs.fixed) for name, value in arguments.items()}
            self._graphs[key] = Captured(inputs, self.record(lambda: self._body(kind, fixed)))
        return self._graphs[key]

    def _load(self, inputs: Inputs, tensors: dict[str, Tensor]) -> None:
        inputs.load(tensors, anew=not self.cache.features)
        if self.tables is not None:
            self.tables.step.fill_(self.cache.step)
            self.tables.loaded = self.cache.step  # the graph loads its rows itself

    def _body(self, kind: str, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        """What is captured: the step's rows, then the network."""
        if self.tables is not None:
            self.tables.load()
            if self.tables.timestep is not None:  # of the step: nothing is copied from the host
                shape = arguments["timestep"]
                arguments = {**arguments, "timestep": self.tables.timestep.expand(shape or (1,)).reshape(shape)}
        with self.context.reading() if self.context is not None else nullcontext():
            if kind == "full":
                return self.adapter.full(**arguments)
            return (self.adapter.cached(**arguments),)


def _is_plain(value: Any) -> bool:
    """A tensor, or something that cannot change in place."""
    return value is None or isinstance(value, Tensor | bool | int | float | str | torch.Size)


def _is_alike(value: Any, before: Any) -> bool:
    """A tensor of the same shape and type, or the same plain value."""
    if isinstance(value, Tensor):
        return isinstance(before, Tensor) and value.shape == before.shape and value.dtype == before.dtype
    return _is_plain(value) and type(value) is type(before) and value == before
