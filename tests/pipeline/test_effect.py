"""The measured effect of reuse on the sample, against runs of the pipeline that reuse at one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cachequant.cache.feature_cache import FeatureCache
from cachequant.config import RunConfig
from cachequant.pipeline.context import Context
from cachequant.pipeline.effect import effect_weights, interpolate_log, probe_steps
from cachequant.pipeline.hook import Call
from cachequant.schedule import uniform_schedule

Configure = Callable[..., RunConfig]


@pytest.mark.parametrize("batch", [2, 16])
def test_weights_are_the_changes_of_runs_that_reuse_at_one_step(pipe: Any, configure: Configure, batch: int) -> None:
    context = Context.of(pipe, configure(f"calibration.batch_size={batch}"))
    weights = effect_weights(context, probes=5, seeds=2)
    for at in range(1, 6):
        product = 1.0
        for seed in context.seeds()[:2]:
            exact, _ = reused_at(context, None, seed)
            made, gap = reused_at(context, at, seed)
            product *= float((made - exact).double().square().sum()) / gap
        assert float(weights[at]) == pytest.approx(product**0.5, rel=1e-3)
    assert weights[0] == weights[1]


def reused_at(context: Context, at: int | None, seed: int) -> tuple[torch.Tensor, float]:
    """Images of a run in full but for one step, and the squared change of the feature there."""
    before, gap = [torch.empty(0)], [0.0]
    cache = FeatureCache(uniform_schedule(context.num_steps, 1))

    def step(call: Call) -> torch.Tensor:
        output, feature = context.adapter.full(call.x, call.timestep, **call.kwargs)
        if cache.step == at:
            gap[0] = float((feature - before[0]).double().square().sum())
            output = context.adapter.cached(call.x, call.timestep, None, before[0], **call.kwargs)
        before[0] = feature
        return output

    return torch.cat(list(context.run(step, cache, [seed], "test", 1))), gap[0]


def test_between_probes_the_logarithm_is_straight() -> None:
    values = interpolate_log([1, 5, 9], torch.tensor([1.0, 16.0, 1.0]), 11)
    assert torch.allclose(values, torch.tensor([1.0, 1, 2, 4, 8, 16, 8, 4, 2, 1, 1], dtype=torch.float64))
    assert torch.allclose(interpolate_log([1], torch.tensor([3.0]), 4), torch.full((4,), 3.0).double())


@pytest.mark.parametrize(
    ("steps", "probes", "found"), [(1, 5, []), (2, 5, [1]), (5, 9, [1, 2, 3, 4]), (101, 3, [1, 50, 100])]
)
def test_probes_cover_the_run(steps: int, probes: int, found: list[int]) -> None:
    assert probe_steps(steps, probes) == found


def test_a_single_evaluation_has_nothing_to_measure(pipe: Any, configure: Configure) -> None:
    context = Context.of(pipe, configure("sampler.steps=1", "cache.interval=1"))
    assert effect_weights(context).tolist() == [1.0]
