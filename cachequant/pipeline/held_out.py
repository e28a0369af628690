"""What a calibration is worth on noise that none of its fits has seen."""

from __future__ import annotations

import torch
from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.evaluation.paired import psnr
from cachequant.pipeline.context import HELD_OUT, Context
from cachequant.pipeline.features import calibration_cache
from cachequant.pipeline.hook import StepFunction
from cachequant.pipeline.step import accelerated_step
from cachequant.quant.convert import install
from cachequant.schedule import uniform_schedule
from cachequant.types import Correction, QuantState, Schedule


class HeldOut:
    """Errors of final images against full precision, from `count` samples of held-out noise.

    Noise and prompts are the calibration's own kind; the full-precision images are drawn once. An error is the geometric
    mean over the images of each one's mean squared error, what the mean PSNR is made of: the few images that tip over into
    another one do not decide.
    """

    def __init__(self, context: Context, count: int) -> None:
        self.context, self.seeds = context, context.seeds(HELD_OUT, count)
        self.exact = self._images(_full_step(context), FeatureCache(uniform_schedule(context.num_steps, 1)))

    def error(self, schedule: Schedule, correction: Correction, state: QuantState | None = None) -> float:
        """Of the accelerated model; `state` None leaves it in full precision."""
        adapter, cache = self.context.adapter, calibration_cache(self.context, schedule)
        handle = install(adapter.denoiser, state or QuantState(), cache, correction=correction)
        adapter.rebuild()
        try:
            made = self._images(accelerated_step(adapter, cache, correction), cache)
        finally:
            handle.remove()
            adapter.rebuild()
        return typical_error(made, self.exact)

    def _images(self, step: StepFunction, cache: FeatureCache) -> Tensor:
        return torch.cat(list(self.context.run(step, cache, self.seeds, "held out")))


def typical_error(images: Tensor, exact: Tensor) -> float:
    """Geometric mean over the images [B, C, H, W] of the mean squared error of each: that of the mean PSNR."""
    return float(10 ** (-psnr(images, exact, 1.0).mean() / 10))


def _full_step(context: Context) -> StepFunction:
    """Every evaluation in full."""
    return lambda call: context.adapter.full(call.x, call.timestep, **call.kwargs)[0]
