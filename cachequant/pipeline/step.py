"""The accelerated step: Algorithm 1 of the paper's inference, the same for every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.errors import UserError
from cachequant.models.adapter import Adapter
from cachequant.pipeline.hook import Call, StepFunction
from cachequant.plan import Plan
from cachequant.types import AffineMap, Correction


def cache_of(plan: Plan, adapter: Adapter) -> FeatureCache:
    """The cache that a plan's run needs: two features where its corrections forecast, else one."""
    keep = 2 if plan.correction.uses_forecast else 1
    return FeatureCache(plan.schedule, keep, adapter.channel_dim, plan.config.cache.feature_bits)


def accelerated_step(adapter: Adapter, cache: FeatureCache, correction: Correction) -> StepFunction:
    """Refresh where the schedule says so, else run the shallow network from the corrected feature.

    h ← a₁[t]·X_c + b₁[t] (+ c[t]·X_c') on cached steps only, always from the raw feature (CacheQuant section 3.3).
    The layers' corrections a₂, b₂ live in the quantised layers themselves; ours of the prediction follows the network.

    Raises:
        UserError: the cached feature has another number of channels than its corrections.
    """
    refuse_other_width(adapter, correction)
    reuses = len(cache.schedule.refresh_steps) < cache.schedule.num_steps
    feature_maps, output_maps = _OnDevice(correction.cache), _OnDevice(correction.output)

    def step(call: Call) -> Tensor:
        """One evaluation of the accelerated model."""
        if cache.must_refresh:
            output, feature = adapter.full(call.x, call.timestep, **call.kwargs)
            if reuses:
                cache.store(feature)
        else:
            reused = cache.reuse(feature_maps.at(cache.step, call.x))
            output = adapter.cached(call.x, call.timestep, None, reused, **call.kwargs)
        return correct_prediction(output, call.x, output_maps.at(cache.step, call.x))

    return step


def refuse_other_width(adapter: Adapter, correction: Correction) -> None:
    """Refuse corrections of a cached feature that is not this model's.

    Raises:
        UserError: it has another number of channels.
    """
    widths = {len(affine.scale) for affine in correction.cache.values()}
    if widths - {adapter.width}:
        raise UserError(
            f"the plan corrects {max(widths)} cached channels, this model has {adapter.width}: calibrate for it"
        )


def correct_prediction(output: Tensor, x: Tensor, affine: AffineMap | None) -> Tensor:
    """ε ← scale·ε + previous·x_t + shift on the channels that the prediction shares with x_t.

    Args:
        output: [B, C, H, W]; a learned variance in further channels stays as it is.
        x: x_t [B, C', H, W]; further channels of an inpainting model are not read.
        affine: maps of min(C, C') channels, or None for no change.

    Raises:
        UserError: it has maps of more channels.
    """
    if affine is None:
        return output
    shared = len(affine.scale)
    refuse_more_channels(shared, output, x)
    head = affine.apply(output[:, :shared], x[:, :shared])  # [B, min(C, C'), H, W]
    return head if shared == output.shape[1] else torch.cat([head, output[:, shared:]], dim=1)


def refuse_more_channels(shared: int, output: Tensor, x: Tensor) -> None:
    """Refuse maps of a prediction [B, C, H, W] that reach beyond it or beyond the sample x [B, C', H, W].

    Raises:
        UserError: they do.
    """
    most = min(output.shape[1], x.shape[1])
    if shared > most:
        raise UserError(f"the plan corrects {shared} predicted channels, this model has {most}: calibrate for it")


class _OnDevice:
    """Maps by step, moved to the device and precision of the sample once."""

    def __init__(self, maps: dict[int, AffineMap]) -> None:
        self._maps = maps
        self._moved: dict[tuple[int, torch.device, torch.dtype], AffineMap] = {}

    def at(self, step: int, like: Tensor) -> AffineMap | None:
        """The map of `step`, or None."""
        affine, key = self._maps.get(step), (step, like.device, like.dtype)
        if affine is None:
            return None
        if key not in self._moved:
            self._moved[key] = affine.to(like.device, like.dtype)
        return self._moved[key]
