"""The accelerated step with its corrections captured too: their rows come from tables on the device, as the layers' do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.kernels.cuda import step_ops
from cachequant.models.adapter import Adapter
from cachequant.pipeline.graphs import Body, CudaRecorder, GraphedAdapter, Replay, capturable
from cachequant.pipeline.hook import Call, StepFunction
from cachequant.pipeline.linear_sampler import LinearSampler
from cachequant.pipeline.step import accelerated_step, refuse_more_channels, refuse_other_width
from cachequant.quant.context import ContextOperands
from cachequant.quant.step_tables import StepTables
from cachequant.types import AffineMap, Correction


def deployed_step(adapter: Adapter, cache: FeatureCache, correction: Correction, network: object) -> StepFunction:
    """The accelerated step of an attached plan: as CUDA graphs where all of its layers run on a GPU.

    Args:
        adapter, cache, correction: of `accelerated_step`.
        network: what `cachequant.quant.deploy.attach` returned, or None.

    Raises:
        UserError: of `refuse_other_width`.
    """
    tables = _on_gpu(network)
    if tables is None:
        return accelerated_step(adapter, cache, correction)
    refuse_other_width(adapter, correction)
    return graphed_step(
        adapter, cache, correction, tables, CudaRecorder(tables.device), getattr(network, "context", None)
    )


def deployed_sampler(scheduler: Any, network: object) -> LinearSampler | None:
    """Scheduler steps for `deployed_step`'s graphs, which would wait for the scheduler's own; None where there are none.

    Args:
        scheduler: of the pipeline.
        network: of `deployed_step`.
    """
    return None if _on_gpu(network) is None else LinearSampler(scheduler)


def _on_gpu(network: object) -> StepTables | None:
    tables = capturable(network)
    return tables if tables is not None and tables.device.type == "cuda" else None


def graphed_step(
    adapter: Adapter,
    cache: FeatureCache,
    correction: Correction,
    tables: StepTables,
    record: Callable[[Body], Replay],
    context: ContextOperands | None = None,
) -> StepFunction:
    """`accelerated_step` as two graphs, with the same numbers.

    Args:
        adapter, cache, correction: of `accelerated_step`.
        tables: of the deployed layers; they hold the step on the device.
        record, context: of `GraphedAdapter`.
    """
    corrected = CorrectedAdapter(adapter, correction, cache, tables.step)
    graphed = GraphedAdapter(corrected, cache, tables, record, context)
    reuses = len(cache.schedule.refresh_steps) < cache.schedule.num_steps

    def step(call: Call) -> Tensor:
        """One evaluation of the accelerated model."""
        if cache.must_refresh:
            output, feature = graphed.full(call.x, call.timestep, **call.kwargs)
            if reuses:
                cache.store(feature)
            return output
        newest, *before = cache.regressors
        earlier = {"before": before[0]} if before else {}
        return graphed.cached(call.x, call.timestep, None, newest, None, **earlier, **call.kwargs)

    return step


class CorrectedAdapter:
    """An adapter whose steps correct the feature and the prediction themselves; a step without a map leaves both alone.

    Args:
        adapter: of the network.
        correction: maps of the feature and of the prediction.
        cache: knows how many steps there are.
        step: [1] int64 on the device, the step that runs.
    """

    def __init__(self, adapter: Adapter, correction: Correction, cache: FeatureCache, step: Tensor) -> None:
        self.adapter, self.step = adapter, step
        steps = cache.schedule.num_steps
        self._features = MapTable.of(correction.cache, steps, step.device)
        self._outputs = MapTable.of(correction.output, steps, step.device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.adapter, name)

    def full(self, x: Tensor, timestep: Any, cond: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(corrected output [B, C, H, W], raw feature)."""
        output, feature = self.adapter.full(x, timestep, cond, **kwargs)
        return self._predicted(output, x), feature

    def cached(
        self,
        x: Tensor,
        timestep: Any,
        cond: Any,
        cached_feature: Tensor,
        correction: AffineMap | None = None,
        before: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Corrected output [B, C, H, W] from the raw feature, and the one of the refresh before where maps read it."""
        if correction is not None:
            cached_feature = correction.apply(cached_feature, before, self.adapter.channel_dim)
        elif self._features is not None:
            cached_feature = self._features.apply(cached_feature, before, self.step, self.adapter.channel_dim)
        return self._predicted(self.adapter.cached(x, timestep, cond, cached_feature, None, **kwargs), x)

    def _predicted(self, output: Tensor, x: Tensor) -> Tensor:
        """`cachequant.pipeline.step.correct_prediction` by the step's map."""
        if self._outputs is None:
            return output
        refuse_more_channels(self._outputs.width, output, x)
        return self._outputs.apply(output, x, self.step, 1)


class MapTable:
    """Maps of the same channels, one row per step, with the map that changes nothing where there is none.

    Args:
        maps: step -> map, at least one.
        num_steps: T.
        device: where the step is known.
    """

    def __init__(self, maps: dict[int, AffineMap], num_steps: int, device: torch.device) -> None:
        self.width = len(next(iter(maps.values())).scale)
        self._reads = any(affine.previous is not None for affine in maps.values())
        rows = torch.zeros(num_steps, 3, self.width)
        rows[:, 0] = 1.0
        for step, affine in maps.items():
            rows[step, 0], rows[step, 1] = affine.scale, affine.shift
            if affine.previous is not None:
                rows[step, 2] = affine.previous
        self._rows = rows.to(device)  # [T, 3, C]

    @staticmethod
    def of(maps: dict[int, AffineMap], num_steps: int, device: torch.device) -> MapTable | None:
        """The table, or None without any map."""
        return MapTable(maps, num_steps, device) if maps else None

    def apply(self, x: Tensor, other: Tensor | None, step: Tensor, channel_dim: int) -> Tensor:
        """`x` mapped at the step [1] that the device knows; channels beyond the maps' stay. `other` is the second regressor.

        Raises:
            ValueError: a map has a second regressor and `other` is missing.
        """
        if self._reads and other is None:
            raise ValueError("these maps read two tensors, but the second is None")
        return step_ops.map_channels(x, other if self._reads else None, self._rows, step, channel_dim)
