"""Full and cached steps as two static CUDA graphs: one launch each, with the step's scales read from device tables."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
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
    """Captures functions into CUDA graphs that share one memory pool."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, body: Body) -> Replay:
        """Run `body` a few times, capture it, and return what replays it; its results stay at the same addresses."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                body()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
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
        record: makes a replay of a function; `CudaRecorder()` on a GPU.
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
        self._graphs: dict[Any, tuple[Inputs, Replay]] = {}

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
        feature = cached_feature if correction is None else correction.apply(cached_feature)
        arguments = {"x": x, "timestep": timestep, "cond": cond, "cached_feature": feature, **kwargs}
        (output,) = self._step("cached", arguments)
        return output.clone()

    def _step(self, kind: str, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        """Fill the fixed inputs, select the step, replay."""
        device = arguments["x"].device
        prompt = arguments.get("encoder_hidden_states")
        if self.context is not None and isinstance(prompt, Tensor):
            self.context.update(prompt.to(arguments["x"]) if prompt.dtype != arguments["x"].dtype else prompt)
        if not isinstance(arguments["timestep"], Tensor):
            arguments["timestep"] = torch.as_tensor(arguments["timestep"])
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in arguments.items() if name not in tensors}
        key = (kind, tuple((n, tuple(t.shape), t.dtype) for n, t in tensors.items()), repr(sorted(others.items())))
        if key not in self._graphs:
            inputs = Inputs(tensors, device)
            self._load(inputs, tensors)
            self._graphs[key] = (inputs, self.record(lambda: self._body(kind, {**others, **inputs.fixed})))
        inputs, replay = self._graphs[key]
        self._load(inputs, tensors)
        return replay()

    def _load(self, inputs: Inputs, tensors: dict[str, Tensor]) -> None:
        inputs.load(tensors, anew=not self.cache.features)
        if self.tables is not None:
            self.tables.step.fill_(self.cache.step)
            self.tables.loaded = self.cache.step  # the graph loads its rows itself

    def _body(self, kind: str, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        """What is captured: the step's rows, then the network."""
        if self.tables is not None:
            self.tables.load()
        with self.context.reading() if self.context is not None else nullcontext():
            if kind == "full":
                return self.adapter.full(**arguments)
            return (self.adapter.cached(**arguments),)
