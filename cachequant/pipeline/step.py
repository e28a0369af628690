"""The accelerated step: Algorithm 1 of the paper's inference, the same for every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.models.adapter import Adapter
from cachequant.pipeline.hook import Call, StepFunction
from cachequant.types import AffineMap, Correction


def accelerated_step(adapter: Adapter, cache: FeatureCache, correction: Correction) -> StepFunction:
    """Refresh where the schedule says so, else run the shallow network from the corrected feature.

    h ← a₁[t]·X_c + b₁[t] (+ c[t]·X_c') on cached steps only, always from the raw feature (CacheQuant section 3.3).
    The layers' corrections a₂, b₂ live in the quantised layers themselves.
    """
    reuses = len(cache.schedule.refresh_steps) < cache.schedule.num_steps
    on_device: dict[tuple[int, torch.device], AffineMap] = {}

    def step(call: Call) -> Tensor:
        """One evaluation of the accelerated model."""
        if cache.must_refresh:
            output, feature = adapter.full(call.x, call.timestep, **call.kwargs)
            if reuses:
                cache.store(feature)
            return output
        affine, place = correction.cache.get(cache.step), (cache.step, call.x.device)
        if affine is not None:
            if place not in on_device:
                on_device[place] = affine.to(call.x.device, call.x.dtype)
            affine = on_device[place]
        return adapter.cached(call.x, call.timestep, None, cache.reuse(affine), **call.kwargs)

    return step
