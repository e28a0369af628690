"""The accelerated step with its corrections captured too: their rows come from tables on the device, as the layers' do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.models.adapter import Adapter
from cachequant.pipeline.graphs import Body, CudaRecorder, GraphedAdapter, Replay, capturable
from cachequant.pipeline.hook import Call, StepFunction
from cachequant.pipeline.step import accelerated_step, correct_prediction, refuse_other_width
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
    tables = capturable(network)
    if tables is None or tables.device.type != "cuda":
        return accelerated_step(adapter, cache, correction)
    refuse_other_width(adapter, correction)
    return graphed_step(adapter, cache, correction, tables, CudaRecorder(), getattr(network, "context", None))


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
        self._features = MapTable(correction.cache, cache.schedule.num_steps)
        self._outputs = MapTable(correction.output, cache.schedule.num_steps)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.adapter, name)

    def full(self, x: Tensor, timestep: Any, cond: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(corrected output [B, C, H, W], raw feature)."""
        output, feature = self.adapter.full(x, timestep, cond, **kwargs)
        return correct_prediction(output, x, self._outputs.at(self.step, x)), feature

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
        affine = self._features.at(self.step, cached_feature) if correction is None else correction
        if affine is not None:
            cached_feature = affine.apply(cached_feature, before, self.adapter.channel_dim)
        output = self.adapter.cached(x, timestep, cond, cached_feature, None, **kwargs)
        return correct_prediction(output, x, self._outputs.at(self.step, x))


class MapTable:
    """Maps of the same channels, one row per step, with the map that changes nothing where there is none."""

    def __init__(self, maps: dict[int, AffineMap], num_steps: int) -> None:
        self._moved: dict[tuple[torch.device, torch.dtype], AffineMap] = {}
        if not maps:
            self._rows: AffineMap | None = None
            return
        channels = len(next(iter(maps.values())).scale)
        scale, shift, previous = torch.ones(num_steps, channels), *torch.zeros(2, num_steps, channels)
        for step, affine in maps.items():
            scale[step], shift[step] = affine.scale, affine.shift
            if affine.previous is not None:
                previous[step] = affine.previous
        reads = any(affine.previous is not None for affine in maps.values())
        self._rows = AffineMap(scale, shift, previous if reads else None)  # [T, C] each

    def at(self, step: Tensor, like: Tensor) -> AffineMap | None:
        """The map of the step [1] that the device knows, in the precision of `like`; None if there are no maps at all."""
        if self._rows is None:
            return None
        key = like.device, like.dtype
        if key not in self._moved:
            self._moved[key] = self._rows.to(*key)
        rows = self._moved[key]
        previous = None if rows.previous is None else rows.previous.index_select(0, step)[0]
        return AffineMap(rows.scale.index_select(0, step)[0], rows.shift.index_select(0, step)[0], previous)
