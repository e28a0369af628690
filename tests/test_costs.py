"""Every cost by name: its streamed form against a sum over stored features in float64, and its optimum by exhaustion."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cachequant import config_values
from cachequant.costs import COSTS, Cost, band_for, rounding
from cachequant.schedule import best_schedule, group_costs, schedule_cost, uniform_schedule
from cachequant.types import Schedule
from tests.test_residual import left, walk
from tests.test_schedule import feasible

BITS = 3


def test_the_configuration_offers_exactly_these_costs() -> None:
    assert config_values._CHOICES["schedule.cost"] == tuple(COSTS)


def reference(cost: Cost, features: Tensor, weights: Tensor, steps: tuple[int, ...]) -> float:
    """Objective of a schedule as the module defines it, from stored features."""
    held = [rounding(BITS)(x) if cost.rounded else x for x in features]
    total, bounds = 0.0, [*steps, len(features)]
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        before = [held[steps[i - 1]]] if i and cost.error == "forecast" else []
        for t in range(start + 1, end):
            gap = (features[t] - held[start]).double()
            error = {
                "l1": lambda gap=gap: float(gap.abs().sum()),
                "l2": lambda gap=gap: float(gap.square().sum()),
                "residual": lambda t=t, start=start: left(features[t], [held[start]]),
                "forecast": lambda t=t, start=start, before=before: left(features[t], [held[start], *before]),
            }[cost.error]()
            total += float(weights[t]) * error * (end - start - 1 if cost.coherent else 1)
    return total


@settings(deadline=None, max_examples=6)
@given(st.integers(0, 2**31 - 1), st.integers(4, 9), st.integers(2, 3))
@pytest.mark.parametrize("name", COSTS)
def test_a_costs_optimum_is_that_of_exhaustive_search(name: str, seed: int, steps: int, interval: int) -> None:
    cost, features = COSTS[name], walk(seed, steps, (1, 2, 3, 3))
    weights = torch.ones(steps, dtype=torch.float64)
    if cost.weight != "none":
        weights = torch.rand(steps, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    band = band_for(cost, steps, interval, 1, BITS)
    for feature in features:
        band.update(feature)
    costs, groups = group_costs(band.values, weights, cost.coherent), math.ceil(steps / interval)
    candidates = feasible(steps, groups, math.ceil(interval / 2), 2 * interval)
    expected = {steps_: reference(cost, features, weights, steps_) for steps_ in candidates}
    for candidate, value in expected.items():
        assert schedule_cost(costs, Schedule(candidate, steps, interval)) == pytest.approx(value, rel=1e-4)
    found = best_schedule(band.values, interval, weights, coherent=cost.coherent)
    assert found.cost == pytest.approx(min(expected.values()), rel=1e-4)
    assert expected[found.refresh_steps] == pytest.approx(min(expected.values()), rel=1e-4)
    uniform = uniform_schedule(steps, interval, groups).refresh_steps
    assert found.uniform_cost == pytest.approx(reference(cost, features, weights, uniform), rel=1e-4)


def test_rounding_is_the_grid_of_the_features_own_range() -> None:
    x = torch.tensor([-1.0, 0.0, 0.26, 6.0])
    assert torch.allclose(rounding(BITS)(x), torch.tensor([-1.0, 0.0, 0.0, 6.0]))
    features = walk(0, 6)
    fine, coarse = (band_for(COSTS["quantised"], 6, 2, 1, bits) for bits in (8, 2))
    for feature in features:
        fine.update(feature)
        coarse.update(feature)
    assert (coarse.values[1:, 1] > fine.values[1:, 1]).all()


def test_a_correction_never_costs_more_than_none_and_a_forecast_never_more_than_it() -> None:
    features = walk(5, 12)
    found = {}
    for name in ("l2", "residual", "forecast"):
        band = band_for(COSTS[name], 12, 3, 1, 8)
        for feature in features:
            band.update(feature)
        found[name] = best_schedule(band.values, 3).cost
    assert found["forecast"] <= found["residual"] <= found["l2"]
