"""A schedule for a time instead of an interval: how many refreshes fit, and where, by Lagrangian dynamic programming.

Ours; the paper fixes the interval. A run takes Σ_t cached_t + Σ_{s in S} (full_s - cached_s). Where every refresh adds the
same, the number of refreshes that a budget allows is a division. Else cost + λ·time is minimised for a price λ of time,
which needs no count of groups: each solution is optimal among the schedules that take no longer than it does (Everett
1963), and λ is moved along the lower hull of (time, cost) until the budget is met.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cachequant.errors import UserError

TOLERANCE = 1e-9
"""Relative rounding of sums of times."""


@dataclass(frozen=True)
class Allowance:
    """A time budget with what steps take, in milliseconds.

    Attributes:
        full, cached: [T] of a full and of a cached evaluation at each step.
        budget: what all evaluations may take.
    """

    full: tuple[float, ...]
    cached: tuple[float, ...]
    budget: float

    @property
    def equal(self) -> bool:
        """Whether every refresh adds the same time, so that their number says everything."""
        added = [full - cached for full, cached in zip(self.full, self.cached, strict=True)]
        return max(added) - min(added) <= TOLERANCE * max(map(abs, added))

    def spent(self, refresh_steps: tuple[int, ...]) -> float:
        """Milliseconds of a run with these full steps."""
        added = sum(self.full[step] - self.cached[step] for step in refresh_steps)
        return sum(self.cached) + added


@dataclass(frozen=True)
class BudgetSolution:
    """A schedule within a budget.

    Attributes:
        refresh_steps: sorted, the first is 0.
        cost: its objective.
        time: what it takes, in the unit of the times.
        bound: no schedule within the budget costs less.
    """

    refresh_steps: tuple[int, ...]
    cost: float
    time: float
    bound: float


def refreshes_within(num_steps: int, full: float, cached: float, budget: float) -> int:
    """The largest K with K·full + (T - K)·cached ≤ budget, at most T.

    Raises:
        UserError: not even one full step fits, with the smallest budget that can be met.
    """
    least = full + (num_steps - 1) * cached
    if budget < least * (1 - TOLERANCE):
        raise UserError(
            f"the time budget is {budget:.4g} ms, expected at least {least:.4g}: one full step of {full:.4g} ms and "
            f"{num_steps - 1} cached ones of {cached:.4g} ms; raise cache.budget_ms or lower cache.speedup"
        )
    if full <= cached:  # caching saves nothing
        return num_steps
    return min(num_steps, 1 + math.floor((budget - least) / (full - cached) + TOLERANCE * num_steps))


def solve_budget(costs: Tensor, full: Tensor, cached: Tensor, budget: float, shortest: int = 1) -> BudgetSolution:
    """The cheapest schedule within `budget` on the lower hull of (time, cost), at most cost - bound above the optimum.

    Where every refresh adds the same time their number says more: `refreshes_within` and `cachequant.schedule` are exact.

    Args:
        costs: [T, L + 1] of `group_costs`.
        full, cached: [T] time of a full and of a cached evaluation at each step.
        budget: in the same unit.
        shortest: least length of a group.

    Raises:
        UserError: no schedule with groups of at most L steps is that fast.
    """
    added, base = (full - cached).double(), float(cached.double().sum())
    slow = _Point.at(costs, added, 0.0, shortest)
    if base + slow.added <= budget * (1 + TOLERANCE):
        return BudgetSolution(slow.steps, slow.cost, base + slow.added, slow.cost)
    fast = _Point.at(torch.where(costs.isfinite(), 0.0, costs), added, 1.0, shortest).priced(costs)
    if base + fast.added > budget * (1 + TOLERANCE):
        raise UserError(
            f"the time budget is {budget:.4g} ms, expected at least {base + fast.added:.4g} with groups of at most "
            f"{costs.shape[1] - 1} steps: raise cache.budget_ms or lower cache.speedup"
        )
    while True:
        price = (fast.cost - slow.cost) / (slow.added - fast.added)  # λ: the slope of the chord
        found = _Point.at(costs, added, price, shortest)
        if found.value(price) >= fast.value(price) * (1 - 1e-12) - 1e-300:
            bound = fast.value(price) - price * (budget - base)
            return BudgetSolution(fast.steps, fast.cost, base + fast.added, min(bound, fast.cost))
        if base + found.added <= budget * (1 + TOLERANCE):
            fast = found
        else:
            slow = found


@dataclass(frozen=True)
class _Point:
    """A schedule with its cost and the time that its refreshes add."""

    steps: tuple[int, ...]
    cost: float
    added: float

    def value(self, price: float) -> float:
        """The Lagrangian."""
        return self.cost + price * self.added

    def priced(self, costs: Tensor) -> _Point:
        """The same schedule under other costs."""
        ends = [*self.steps[1:], len(costs)]
        cost = sum(float(costs[s, e - s]) for s, e in zip(self.steps, ends, strict=True))
        return _Point(self.steps, cost, self.added)

    @staticmethod
    def at(costs: Tensor, added: Tensor, price: float, shortest: int) -> _Point:
        """Minimum of cost + price·time: M[n] = min_l M[n-l] + D[n-l, l] + λ·added[n-l]. O(T·L)."""
        num_steps, longest = len(costs), costs.shape[1] - 1
        priced = costs + price * added[:, None]  # [T, L + 1]
        best, choice = torch.full((num_steps + 1,), torch.inf, dtype=torch.float64), [0] * (num_steps + 1)
        best[0] = 0.0
        for n in range(shortest, num_steps + 1):
            lengths = torch.arange(shortest, min(longest, n) + 1)
            values = best[n - lengths] + priced[n - lengths, lengths]
            place = int(values.argmin())
            best[n], choice[n] = values[place], int(lengths[place])
        if not math.isfinite(float(best[num_steps])):
            raise UserError(
                f"no schedule has groups of {shortest} to {longest} steps in {num_steps}: change cache.interval"
            )
        steps, n = [], num_steps
        while n > 0:
            n -= choice[n]
            steps.append(n)
        steps.reverse()
        time = sum(float(added[step]) for step in steps)
        return _Point(tuple(steps), float(best[num_steps]) - price * time, time)
