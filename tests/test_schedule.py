"""DPS against exhaustive search and direct sums; every schedule against the rules it must keep."""

import itertools
import json
import math
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from cachequant.errors import UserError
from cachequant.schedule import (
    DistanceBand,
    dps_schedule,
    group_costs,
    num_groups,
    power_schedule,
    random_schedule,
    schedule_cost,
    schedule_from_features,
    solve_schedule,
    uniform_schedule,
)
from cachequant.types import Schedule

SEEDS = st.integers(0, 2**31 - 1)


def random_features(seed: int, steps: int, shape: tuple[int, ...] = (2, 3, 2, 2)) -> Tensor:
    """A random walk [T, B, C, H, W] whose step lengths vary, so that schedules differ."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.rand(steps, *[1] * len(shape), generator=generator) ** 3
    return (torch.randn(steps, *shape, generator=generator) * lengths).cumsum(0)


def group_distance(features: Tensor, start: int, end: int, cost: str = "l1") -> float:
    """D(start, end) in float64, as the paper writes it."""
    difference = (features[start:end] - features[start]).double()
    return float(difference.abs().sum() if cost == "l1" else difference.square().sum())


def objective(features: Tensor, steps: tuple[int, ...], cost: str = "l1") -> float:
    bounds = [*steps, len(features)]
    return sum(group_distance(features, i, j, cost) for i, j in itertools.pairwise(bounds))


def feasible(num_steps: int, groups: int, shortest: int, longest: int) -> list[tuple[int, ...]]:
    """Every schedule of `groups` groups whose lengths are in bounds."""
    found = []
    for cuts in itertools.combinations(range(1, num_steps), groups - 1):
        bounds = [0, *cuts, num_steps]
        if all(shortest <= j - i <= longest for i, j in itertools.pairwise(bounds)):
            found.append((0, *cuts))
    return found


# The value type


def test_source_is_the_last_refresh_and_previous_source_the_one_before() -> None:
    schedule = Schedule((0, 3, 4, 8), num_steps=10, interval=3)
    for step in range(10):
        before = [s for s in schedule.refresh_steps if s <= step]
        assert schedule.source(step) == before[-1]
        assert schedule.previous_source(step) == (before[-2] if len(before) > 1 else None)
        assert schedule.is_refresh(step) == (step in schedule.refresh_steps)
    assert schedule.full_step_share == 0.4


@pytest.mark.parametrize("steps", [(), (1, 2), (0, 2, 2), (0, 3, 1), (0, 10)])
def test_a_schedule_that_breaks_the_rules_is_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rise strictly"):
        Schedule(steps, num_steps=10, interval=2)


# Distances


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(1, 14), st.integers(1, 8), st.sampled_from(["l1", "l2"]))
def test_streamed_distances_are_the_direct_ones(seed: int, steps: int, interval: int, cost: str) -> None:
    interval = min(interval, steps)
    features = random_features(seed, steps)
    band = DistanceBand(steps, interval, cost)
    for feature in features:
        band.update(feature)
    assert band.values.shape == (steps, min(2 * interval, steps))
    for t, d in itertools.product(range(steps), range(band.values.shape[1])):
        difference = (features[t] - features[t - d]).double() if d <= t else torch.zeros(1)
        direct = float(difference.abs().sum() if cost == "l1" else difference.square().sum())
        assert float(band.values[t, d]) == pytest.approx(direct, rel=1e-4, abs=1e-5)


def test_two_batches_add_up_to_one_batch_of_both() -> None:
    first, second = random_features(1, 9), random_features(2, 9)[:, :1]  # the last batch may be smaller
    streamed, joint = DistanceBand(9, 2), DistanceBand(9, 2)
    for feature in (*first, *second):
        streamed.update(feature)
    for feature in torch.cat([first, second], dim=1):
        joint.update(feature)
    torch.testing.assert_close(streamed.values, joint.values, rtol=1e-5, atol=1e-5)


def test_a_later_change_of_the_feature_does_not_reach_the_ring() -> None:
    features = random_features(3, 6)
    plain, reused = DistanceBand(6, 2), DistanceBand(6, 2)
    buffer = torch.empty_like(features[0])
    for feature in features:
        plain.update(feature)
        reused.update(buffer.copy_(feature))
    assert torch.equal(plain.values, reused.values)


@pytest.mark.parametrize("steps", [40, 400])
def test_feature_memory_depends_on_the_interval_and_not_on_the_steps(steps: int) -> None:
    interval, feature = 5, torch.zeros(1, 4, 3, 3)
    band = DistanceBand(steps, interval)
    for _ in range(2 * steps):
        band.update(feature)
    assert band.peak_bytes == (2 * interval - 1) * feature.numel() * feature.element_size()


def test_unknown_cost_and_impossible_interval_are_refused() -> None:
    with pytest.raises(UserError, match=r"'l3'.*l1, l2"):
        DistanceBand(10, 2, "l3")
    for interval in (0, 11):
        with pytest.raises(UserError, match=f"{interval}, expected 1 to 10"):
            DistanceBand(10, interval)


# Group costs


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(1, 10), st.integers(1, 10), st.booleans())
def test_group_costs_are_the_naive_double_sum(seed: int, steps: int, length: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    length = min(length, steps)
    band = torch.rand(steps, length, dtype=torch.float64, generator=generator)
    weights = torch.rand(steps, dtype=torch.float64, generator=generator) if weighted else None
    costs = group_costs(band, weights)
    assert costs.shape == (steps, length + 1)
    for start, size in itertools.product(range(steps), range(length + 1)):
        if start + size > steps:
            assert math.isinf(costs[start, size])
            continue
        naive = sum(
            float(band[start + d, d]) * (float(weights[start + d]) if weights is not None else 1.0) for d in range(size)
        )
        assert float(costs[start, size]) == pytest.approx(naive, rel=1e-12, abs=1e-12)


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.integers(2, 12), st.integers(1, 6))
def test_schedule_cost_is_the_papers_objective(seed: int, steps: int, interval: int) -> None:
    interval = min(interval, steps)
    features = random_features(seed, steps)
    band = DistanceBand(steps, interval)
    for feature in features:
        band.update(feature)
    schedule = uniform_schedule(steps, interval)
    expected = objective(features, schedule.refresh_steps)
    assert schedule_cost(group_costs(band.values), schedule) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_coherent_errors_are_bounded_by_the_cost_of_their_group() -> None:
    """‖Σδ‖² of any errors of the given sizes is at most the group's cost, and equals it where they are the same."""
    generator = torch.Generator().manual_seed(0)
    for errors in (torch.randn(6, 5, generator=generator), torch.randn(1, 5, generator=generator).expand(6, 5)):
        band = torch.zeros(7, 7)
        band[torch.arange(1, 7), torch.arange(1, 7)] = errors.square().sum(1)  # step t reuses step 0
        cost, together = float(group_costs(band, coherent=True)[0, 7]), float(errors.sum(0).square().sum())
        assert together <= cost * (1 + 1e-6)
    assert together == pytest.approx(cost, rel=1e-5)
    costs = group_costs(band, coherent=True)
    assert (costs[:, :2][costs[:, :2].isfinite()] == 0).all() and math.isinf(costs[6, 2])


def test_a_group_longer_than_the_band_costs_infinitely_much() -> None:
    costs = group_costs(torch.zeros(10, 4))
    assert math.isinf(schedule_cost(costs, Schedule((0, 5), 10, 2)))
    assert schedule_cost(costs, Schedule((0, 4, 8), 10, 2)) == 0.0


# The dynamic programme


@settings(deadline=None, max_examples=60)
@given(SEEDS, st.integers(1, 11), st.integers(1, 6), st.integers(1, 4), st.integers(0, 8), st.booleans())
def test_the_programme_finds_the_optimum_of_exhaustive_search(
    seed: int, steps: int, groups: int, shortest: int, extra: int, ties: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups, longest = min(groups, steps), shortest + extra
    band = torch.rand(steps, min(longest, steps), dtype=torch.float64, generator=generator)
    if ties:
        band = (band * 3).round()
    costs = group_costs(band)
    candidates = feasible(steps, groups, shortest, longest)
    if not candidates:
        with pytest.raises(UserError, match=f"{groups} groups of {shortest} to .* in {steps}"):
            solve_schedule(costs, groups, shortest, longest)
        return
    best = min(schedule_cost(costs, Schedule(c, steps, 1)) for c in candidates)
    found, cost = solve_schedule(costs, groups, shortest, longest)
    assert found in candidates
    assert cost == pytest.approx(best, rel=1e-12)
    assert schedule_cost(costs, Schedule(found, steps, 1)) == pytest.approx(best, rel=1e-12)


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(1, 11), st.integers(1, 11), st.sampled_from(["l1", "l2"]))
def test_dps_on_features_is_the_optimum_also_where_2n_exceeds_t(
    seed: int, steps: int, interval: int, cost: str
) -> None:
    interval = min(interval, steps)
    features = random_features(seed, steps)
    schedule = schedule_from_features(features, interval, cost=cost)
    groups = math.ceil(steps / interval)
    candidates = feasible(steps, groups, math.ceil(interval / 2), 2 * interval)
    best = min(objective(features, c, cost) for c in candidates)
    assert schedule.refresh_steps in candidates
    assert schedule.cost == pytest.approx(best, rel=1e-4, abs=1e-5)
    assert objective(features, schedule.refresh_steps, cost) == pytest.approx(best, rel=1e-4, abs=1e-5)


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(1, 8), st.integers(1, 8))
def test_dps_never_costs_more_than_uniform_where_n_divides_t(seed: int, groups: int, interval: int) -> None:
    schedule = schedule_from_features(random_features(seed, groups * interval), interval)
    assert schedule.cost is not None and schedule.uniform_cost is not None
    assert schedule.cost <= schedule.uniform_cost * (1 + 1e-12)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 300), st.integers(1, 300))
def test_the_default_number_of_groups_is_always_feasible(steps: int, interval: int) -> None:
    interval = min(interval, steps)
    costs = group_costs(torch.zeros(steps, min(2 * interval, steps)))
    starts, _ = solve_schedule(costs, num_groups(steps, interval), math.ceil(interval / 2), 2 * interval)
    lengths = [j - i for i, j in itertools.pairwise([*starts, steps])]
    assert len(starts) == math.ceil(steps / interval)
    assert min(lengths) >= math.ceil(interval / 2) and max(lengths) <= 2 * interval


def test_an_error_that_weighs_nothing_is_free_and_moves_the_refreshes() -> None:
    features = torch.arange(12.0).reshape(12, 1, 1, 1, 1)  # every step moves by the same distance
    band = DistanceBand(12, 3)
    for feature in features:
        band.update(feature)
    weights = torch.cat([torch.zeros(6), torch.ones(6)])
    found = dps_schedule(band, weights).refresh_steps
    best = min(
        feasible(12, 4, 2, 6),
        key=lambda c: sum(float(weights[t]) * (t - max(s for s in c if s <= t)) for t in range(12)),
    )
    assert found == best


@pytest.mark.parametrize(("groups", "longest"), [(1, 6), (5, 6), (9, 6)])
def test_an_infeasible_request_names_its_numbers(groups: int, longest: int) -> None:
    features = random_features(0, 9)
    if groups == 5:
        features = random_features(0, 8)
    with pytest.raises(UserError) as caught:
        schedule_from_features(features, 3, num_groups=groups)
    for number in (groups, 2, longest, len(features)):
        assert str(number) in str(caught.value)


def test_a_thousand_steps_are_solved_within_a_second() -> None:
    band = DistanceBand(1000, 20)
    band.values = torch.rand(1000, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    begin = time.perf_counter()
    schedule = dps_schedule(band)
    assert time.perf_counter() - begin < 1.0
    assert len(schedule.refresh_steps) == 50


# The schedules that DPS competes with


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 300), st.integers(1, 300), st.floats(0, 1), st.floats(0.2, 6))
def test_uniform_and_power_schedules_are_valid(steps: int, interval: int, where: float, power: float) -> None:
    interval = min(interval, steps)
    groups = math.ceil(steps / interval)
    for schedule in (
        uniform_schedule(steps, interval),
        power_schedule(steps, interval, where * steps, power),
    ):
        assert len(schedule.refresh_steps) == groups == num_groups(steps, interval)
        assert schedule.refresh_steps[0] == 0 and schedule.refresh_steps[-1] < steps
        assert all(a < b for a, b in itertools.pairwise(schedule.refresh_steps))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(1, 20), st.floats(0, 1))
def test_power_one_is_uniform(groups: int, interval: int, where: float) -> None:
    steps = groups * interval
    schedule = power_schedule(steps, interval, where * steps, 1.0)
    assert schedule.refresh_steps == uniform_schedule(steps, interval).refresh_steps


@pytest.mark.parametrize("center", [0.0, 50.0, 100.0])
def test_power_above_one_gathers_refreshes_around_the_centre(center: float) -> None:
    near = [
        sum(abs(s - center) <= 15 for s in schedule.refresh_steps)
        for schedule in (power_schedule(100, 10, center, p) for p in (1.0, 2.0))
    ]
    assert near[1] > near[0]


@pytest.mark.parametrize(("center", "power"), [(-1.0, 1.4), (101.0, 1.4), (50.0, 0.0), (50.0, -1.0)])
def test_power_schedule_refuses_what_has_no_meaning(center: float, power: float) -> None:
    with pytest.raises(UserError, match=r"0\.\.100"):
        power_schedule(100, 10, center, power)


def test_schedules_refuse_intervals_beyond_the_run() -> None:
    for interval in (0, -1, 11):
        with pytest.raises(UserError, match=f"{interval}, expected 1 to 10"):
            uniform_schedule(10, interval)
        with pytest.raises(UserError, match=f"{interval}, expected 1 to 10"):
            power_schedule(10, interval, 0.0, 1.4)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 120), st.integers(1, 40), st.floats(0, 1))
def test_more_refreshes_than_the_interval_gives_are_spread_evenly(steps: int, interval: int, where: float) -> None:
    interval = min(interval, steps)
    groups = num_groups(steps, interval) + round(where * (steps - num_groups(steps, interval)))
    schedule = uniform_schedule(steps, interval, groups)
    lengths = [b - a for a, b in itertools.pairwise([*schedule.refresh_steps, steps])]
    assert len(lengths) == groups
    if groups > num_groups(steps, interval):
        assert max(lengths) - min(lengths) <= 1
    assert len(power_schedule(steps, interval, steps / 2, 1.5, groups).refresh_steps) == groups


def test_random_schedules_are_each_feasible_one_equally_often() -> None:
    candidates = feasible(9, 3, 2, 6)  # N = 3: three groups of 2 to 6 steps
    drawn = [random_schedule(9, 3, seed).refresh_steps for seed in range(3000)]
    assert set(drawn) == set(candidates)
    expected = 3000 / len(candidates)
    chi_square = sum((drawn.count(c) - expected) ** 2 / expected for c in candidates)
    assert chi_square < 2.5 * len(candidates)  # mean: one less than the number of candidates
    assert random_schedule(9, 3, 5) == random_schedule(9, 3, 5)


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(1, 200), st.integers(1, 40))
def test_random_schedules_keep_the_bounds_of_dps(seed: int, steps: int, interval: int) -> None:
    interval = min(interval, steps)
    starts = random_schedule(steps, interval, seed).refresh_steps
    lengths = [b - a for a, b in itertools.pairwise([*starts, steps])]
    assert len(starts) == num_groups(steps, interval)
    assert min(lengths) >= math.ceil(interval / 2) and max(lengths) <= 2 * interval


def test_where_there_is_no_schedule_none_is_drawn() -> None:
    with pytest.raises(UserError, match="no schedule has 9 groups of 2 to 6 steps in 9"):
        random_schedule(9, 3, 0, groups=9)


# Against the original


def test_schedules_and_costs_are_the_originals(golden_folder: Path) -> None:
    folder = golden_folder / "method_dps"
    record, tensors = json.loads((folder / "case.json").read_text()), load_file(folder / "case.safetensors")
    for case in record["cases"]:
        schedule = schedule_from_features(tensors[case["features"]], case["N"], num_groups=case["K"])
        assert list(schedule.refresh_steps) == case["exact_schedule"], case["id"]
        if case["schedule"] is not None:  # the original raises where 2N > T
            assert list(schedule.refresh_steps) == case["schedule"], case["id"]
        assert schedule.cost == pytest.approx(case["exact_cost"], rel=1e-5), case["id"]
        if "uniform_cost" in case:
            assert schedule.uniform_cost == pytest.approx(case["uniform_cost"], rel=1e-5), case["id"]
