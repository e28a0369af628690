"""A budget against exhaustive search over all schedules."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachequant.budget import Allowance, refreshes_within, solve_budget
from cachequant.errors import UserError
from cachequant.schedule import group_costs, schedule_cost
from cachequant.types import Schedule

SEEDS = st.integers(0, 2**31 - 1)


def all_schedules(num_steps: int, longest: int, shortest: int = 1) -> list[tuple[int, ...]]:
    found = []
    for count in range(num_steps):
        for cuts in itertools.combinations(range(1, num_steps), count):
            bounds = (0, *cuts, num_steps)
            if all(shortest <= b - a <= longest for a, b in itertools.pairwise(bounds)):
                found.append((0, *cuts))
    return found


def time_of(steps: tuple[int, ...], full: torch.Tensor, cached: torch.Tensor) -> float:
    return float(sum(full[t] if t in steps else cached[t] for t in range(len(full))))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 60), st.floats(0.1, 50), st.floats(0, 1), st.floats(0, 1))
def test_the_number_of_refreshes_is_the_largest_that_fits(steps: int, full: float, share: float, where: float) -> None:
    cached = share * full
    least, most = full + (steps - 1) * cached, steps * full
    budget = least + where * (most - least)
    count = refreshes_within(steps, full, cached, budget)
    assert 1 <= count <= steps
    assert count * full + (steps - count) * cached <= budget * (1 + 1e-7)
    if count < steps:
        assert (count + 1) * full + (steps - count - 1) * cached > budget * (1 - 1e-7)


def test_a_speed_up_that_is_met_exactly_by_k_refreshes_gives_k() -> None:
    for count in range(1, 101):  # 0.1 is no binary fraction: sums of it round
        assert refreshes_within(100, 0.1 + 0.03, 0.03, count * 0.13 + (100 - count) * 0.03) == count


def test_refreshes_are_equal_up_to_the_rounding_of_their_times() -> None:
    cached = (0.1, 1.2, 3.3)
    full = tuple(1.1 + c for c in cached)
    assert len({f - c for f, c in zip(full, cached, strict=True)}) > 1
    assert Allowance(full, cached, 9.0).equal
    assert not Allowance((*full[:2], full[2] + 1e-6), cached, 9.0).equal


@settings(deadline=None, max_examples=80)
@given(SEEDS, st.integers(2, 10), st.integers(2, 6), st.integers(1, 2), st.floats(0, 1))
def test_different_refreshes_give_a_point_of_the_lower_hull(
    seed: int, steps: int, longest: int, shortest: int, where: float
) -> None:
    """Feasible; optimal among all schedules as fast as it (Everett); no schedule within the budget is below the bound."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(min(longest, steps), shortest)
    costs = group_costs(torch.rand(steps, longest, dtype=torch.float64, generator=generator))
    cached = torch.rand(steps, dtype=torch.float64, generator=generator)
    full = cached + 0.5 + 3 * torch.rand(steps, dtype=torch.float64, generator=generator)
    candidates = all_schedules(steps, longest, shortest)
    if not candidates:
        return
    times = {s: time_of(s, full, cached) for s in candidates}
    least, most = min(times.values()), max(times.values())
    budget = least + where * (most - least)
    found = solve_budget(costs, full, cached, budget, shortest)
    objective = {s: schedule_cost(costs, Schedule(s, steps, 1)) for s in candidates}
    assert found.refresh_steps in times
    assert found.time == pytest.approx(times[found.refresh_steps]) and found.time <= budget * (1 + 1e-7)
    assert found.cost == pytest.approx(objective[found.refresh_steps])
    as_fast = min(objective[s] for s in candidates if times[s] <= found.time * (1 + 1e-12))
    assert found.cost == pytest.approx(as_fast)
    best = min(objective[s] for s in candidates if times[s] <= budget * (1 + 1e-9))
    assert found.bound <= best * (1 + 1e-9) + 1e-12 and best <= found.cost * (1 + 1e-9)


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(UserError, match=r"budget is 5 ms, expected at least 19: one full step of 10 ms and 9 cached"):
        refreshes_within(10, 10.0, 1.0, 5.0)
    costs = group_costs(torch.rand(6, 2, dtype=torch.float64))
    full, cached = torch.arange(2.0, 8.0), torch.ones(6)  # groups of two: refreshes at 0, 2, 4 are the fastest
    with pytest.raises(UserError, match=r"budget is 5 ms, expected at least 15 with groups of at most 2"):
        solve_budget(costs, full, cached, 5.0)
    assert solve_budget(costs, full, cached, 15.0).refresh_steps == (0, 2, 4)


def test_more_time_never_costs_more() -> None:
    generator = torch.Generator().manual_seed(0)
    costs = group_costs(torch.rand(200, 20, dtype=torch.float64, generator=generator))
    cached = torch.rand(200, dtype=torch.float64, generator=generator)
    full = cached + 1 + torch.rand(200, dtype=torch.float64, generator=generator)
    found = [solve_budget(costs, full, cached, float(cached.sum()) + extra) for extra in (25.0, 50.0, 100.0, 200.0)]
    assert all(a.cost >= b.cost for a, b in itertools.pairwise(found))
    assert all(each.cost - each.bound <= 0.05 * each.cost + 0.5 for each in found)
