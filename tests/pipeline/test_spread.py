"""The spread of denoised predictions, and the map that keeps it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.config import RunConfig
from cachequant.errors import UserError
from cachequant.pipeline.calibrate import gather
from cachequant.pipeline.context import Context
from cachequant.pipeline.hook import Call, DenoiserHook
from cachequant.pipeline.spread import Spread, denoised_factors
from cachequant.pipeline.stages import Stages
from cachequant.pipeline.step import accelerated_step, correct_prediction
from cachequant.types import AffineMap

Configure = Callable[..., RunConfig]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_factors_give_back_the_sample(pipe: Any, configure: Configure, kind: str) -> None:
    """p·x_t + q·prediction ∝ x₀ for every kind of prediction: at x_t = √ᾱ·x₀ + √(1-ᾱ)·ε it holds x₀ alone."""
    pipe.scheduler.register_to_config(prediction_type=kind)
    context = Context.of(pipe, configure())
    alphas = pipe.scheduler.alphas_cumprod.double()[torch.tensor(context.timesteps)]
    x0, noise = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-1.3, dtype=torch.float64)
    for (p, q), alpha in zip(denoised_factors(context), alphas, strict=True):
        x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * x0
        prediction = {"epsilon": noise, "v_prediction": velocity, "sample": x0}[kind]
        scale = {"epsilon": alpha.sqrt(), "v_prediction": 1.0, "sample": 1.0}[kind]
        assert float(p * x + q * prediction) == pytest.approx(float(scale * x0), rel=1e-9)


def test_another_kind_of_prediction_is_refused(pipe: Any, configure: Configure) -> None:
    pipe.scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(UserError, match="prediction_type is 'flow'"):
        denoised_factors(Context.of(pipe, configure()))


def test_the_streamed_spread_is_that_of_all_samples_together() -> None:
    generator = torch.Generator().manual_seed(0)
    x, made = (torch.randn(7, 5, 4, 4, generator=generator) for _ in range(2))
    spread = Spread(torch.tensor([[1.0, -0.5]], dtype=torch.float64))
    for part in (slice(0, 3), slice(3, 7)):
        spread.update(0, x[part, :3], made[part])  # three channels are shared
    expected = (x[:, :3] - 0.5 * made[:, :3]).double().transpose(0, 1).flatten(1).std(1, correction=0)
    torch.testing.assert_close(spread.deviation, expected[None])


def test_cached_steps_keep_the_spread_of_full_precision(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    """On the calibration noise itself the accelerated run's denoised predictions have the full-precision deviation."""
    context = Context.of(pipe, configure("quant.enabled=false", "schedule.kind=uniform", "cache.interval=3"))
    plan, _ = Stages.at(context, tmp_path, quiet=True).plan()
    assert set(plan.correction.output) == {1, 2, 4, 5}
    expected, spread = gather(context).spread, Spread(denoised_factors(context))
    cache = FeatureCache(plan.schedule, keep=2)
    inner = accelerated_step(context.adapter, cache, plan.correction)

    def step(call: Call) -> Tensor:
        output = inner(call)
        spread.update(cache.step, call.x, output)
        return output

    with DenoiserHook(pipe, context.adapter, cache, step, context.timesteps):
        context.generator()(context.seeds())
    found = spread.deviation
    for t in plan.correction.output:
        torch.testing.assert_close(found[t], expected[t], rtol=1e-3, atol=1e-6)


def test_channels_that_the_prediction_does_not_share_stay_as_they_are() -> None:
    """A learned variance behind the prediction, and a mask behind x_t."""
    generator = torch.Generator().manual_seed(1)
    output, x = torch.randn(2, 6, 4, 4, generator=generator), torch.randn(2, 9, 4, 4, generator=generator)
    affine = AffineMap(torch.full((3,), 2.0), torch.ones(3), torch.full((3,), -1.0))
    mapped = correct_prediction(output, x, affine)
    assert torch.equal(mapped[:, 3:], output[:, 3:])
    torch.testing.assert_close(mapped[:, :3], 2 * output[:, :3] + 1 - x[:, :3])
    assert correct_prediction(output, x, None) is output
