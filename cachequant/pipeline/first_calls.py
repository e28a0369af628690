"""The first evaluation of a run: what the pipeline asks its denoiser for, and what an answer costs."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.models.cost import step_macs
from cachequant.pipeline.context import Context
from cachequant.pipeline.hook import Call
from cachequant.schedule import uniform_schedule


class _Enough(Exception):
    """Leaves a run of which enough has been seen."""


def first_call(context: Context) -> Call:
    """The first call of a run of `sample.batch_size` images; nothing is evaluated."""
    return _calls(context, context.config.sample.batch_size, most=1)[0]


def first_calls(context: Context) -> list[Call]:
    """The calls of one image's first evaluation (two where a pipeline does not batch its guidance)."""
    return _calls(context, 1)


def evaluation_macs(context: Context) -> tuple[float, float]:
    """Multiply-accumulates of a full and of a cached evaluation of one image, whatever the number of its calls."""
    calls = first_calls(context)
    macs = [step_macs(context.adapter, call.x, torch.as_tensor(call.timestep), call.kwargs) for call in calls]
    full, cached = (sum(each) for each in zip(*macs, strict=True))
    return full, cached


def _calls(context: Context, images: int, most: int | None = None) -> list[Call]:
    """The calls of the first evaluation, at most so many, of the sampler's first seeds."""
    calls: list[Call] = []

    def step(call: Call) -> Tensor:
        """Keep the call; the second evaluation's first one ends it."""
        if calls and call.opens:
            raise _Enough
        calls.append(call)
        if len(calls) == most:
            raise _Enough
        output, _ = context.adapter.full(call.x, call.timestep, **call.kwargs)
        return output

    cache = FeatureCache(uniform_schedule(context.num_steps, 1))
    first = context.config.sample.seed
    with suppress(_Enough):
        context.trajectories(step, cache, list(range(first, first + images)), "first call", images)
    return calls
