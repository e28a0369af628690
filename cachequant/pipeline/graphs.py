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


def with_graphs(adapter: Adapter, cache: FeatureCache, network: object) -> Any:
    """The adapter with captured steps if all of the plan's layers run on a GPU, else the adapter itself.

    Args:
        adapter: of the network.
        cache: tells the step.
        network: what `cachequant.quant.deploy.attach` returned, or None.
    """
    tables = getattr(network, "tables", None)
    if tables is None or tables.device.type != "cuda" or getattr(network, "simulation", None) is not None:
        return adapter
    return GraphedAdapter(adapter, cache, tables, CudaRecorder(), getattr(network, "context", None))


class GraphedAdapter:
    """An adapter whose `full` and `cached` replay graphs; everything else is the wrapped adapter's.

    Inputs are copied to fixed addresses, outputs are copied from them. A new shape, type or non-tensor argument is captured
    anew. Deployed layers find the rows of their step through `tables`; layers that are simulated read Python numbers and
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
        self._graphs: dict[Any, tuple[dict[str, Tensor], Replay]] = {}

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
            fixed = {name: torch.empty_like(t, device=device) for name, t in tensors.items()}
            self._load(fixed, tensors)
            self._graphs[key] = (fixed, self.record(lambda: self._body(kind, {**others, **fixed})))
        fixed, replay = self._graphs[key]
        self._load(fixed, tensors)
        return replay()

    def _load(self, fixed: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            fixed[name].copy_(tensor, non_blocking=True)
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
