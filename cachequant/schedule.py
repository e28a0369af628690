"""DPS: the cache schedule by dynamic programming (CacheQuant section 3.2), and the schedules it competes with.

Where the released code evaluates tensor reductions inside the dynamic programme and holds all T features at once,
the distances are streamed here: a ring of 2N features, a band of T × 2N numbers, prefix sums, a vectorised programme.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from cachequant.errors import UserError
from cachequant.second_order import solve_pairs
from cachequant.types import Schedule

COSTS = ("l1", "l2")


def num_groups(num_steps: int, interval: int) -> int:
    """K = ceil(steps / N), the number of refreshes that the interval buys.

    Raises:
        UserError: the interval is not in [1, num_steps].
    """
    if not 1 <= interval <= num_steps:
        raise UserError(
            f"cache.interval is {interval}, expected 1 to {num_steps} (the sampler's steps): choose one of them"
        )
    return math.ceil(num_steps / interval)


def uniform_schedule(num_steps: int, interval: int, groups: int | None = None) -> Schedule:
    """Every N-th step is a refresh: DeepCache's uniform schedule.

    `groups` keeps that many; the last one then takes what is left (50 PLMS steps are 51 evaluations in 50 / N groups). Where
    the interval gives fewer, that many are spread evenly.
    """
    natural = num_groups(num_steps, interval)
    if groups is not None and groups > natural:
        return Schedule(tuple(i * num_steps // groups for i in range(groups)), num_steps, interval)
    return Schedule(tuple(range(0, num_steps, interval))[:groups], num_steps, interval)


def power_schedule(num_steps: int, interval: int, center: float, power: float, groups: int | None = None) -> Schedule:
    """DeepCache's non-uniform schedule: refreshes are dense around `center`.

    K points are spaced evenly in sign(u)·|u|^(1/power), u running over [-center, num_steps - center], so their density
    falls with the distance from `center` (DeepCache section 3.4; that paper writes the centre as c and the power as p).
    `center` is in steps, `power` > 1 concentrates, 1 is uniform. `groups` overrides K = ceil(T / N).

    Raises:
        UserError: impossible interval, centre outside the run, or a power that is not positive.
    """
    groups = groups or num_groups(num_steps, interval)
    if not (0 <= center <= num_steps and 0 < power < math.inf):
        raise UserError(
            f"schedule.center {center} and schedule.power {power}: expected a centre in 0..{num_steps} and a power above 0"
        )
    ends = torch.tensor([-center, num_steps - center], dtype=torch.float64)
    low, high = (ends.sign() * ends.abs() ** (1 / power)).tolist()
    points = torch.linspace(low, high, groups + 1, dtype=torch.float64)[:-1]  # [K]
    steps = (points.sign() * points.abs() ** power + center).round().long().tolist()
    return Schedule(_strictly_rising(steps, num_steps), num_steps, interval)


def random_schedule(num_steps: int, interval: int, seed: int, groups: int | None = None) -> Schedule:
    """One of all schedules that DPS may choose from, each equally likely: K groups of ceil(N/2) to 2N steps.

    Lengths are drawn one after the other, each weighted by the number of ways to fill the rest, in exact integers.

    Raises:
        UserError: there is none.
    """
    k, shortest = groups or num_groups(num_steps, interval), math.ceil(interval / 2)
    lengths = range(shortest, min(2 * interval, num_steps) + 1)
    ways = [[1] + [0] * num_steps]  # [groups][steps]
    for _ in range(k):
        ways.append([sum(ways[-1][n - size] for size in lengths if size <= n) for n in range(num_steps + 1)])
    if not ways[k][num_steps]:
        raise UserError(
            f"no schedule has {k} groups of {shortest} to {lengths[-1]} steps in {num_steps}: change cache.interval"
        )
    draw, steps, n = random.Random(seed), [], num_steps
    for rest in reversed(range(k)):
        place = draw.randrange(ways[rest + 1][n])
        for size in lengths:
            place -= ways[rest][n - size] if size <= n else 0
            if place < 0:
                break
        n -= size
        steps.append(n)
    return Schedule(tuple(reversed(steps)), num_steps, interval)


def _strictly_rising(steps: list[int], num_steps: int) -> tuple[int, ...]:
    """Move collided steps apart: first upward from 0, then downward from the end."""
    steps = [0, *steps[1:]]
    for i in range(1, len(steps)):
        steps[i] = max(steps[i], steps[i - 1] + 1)
    for i in range(len(steps) - 1, 0, -1):
        steps[i] = min(steps[i], num_steps - len(steps) + i)
    return tuple(steps)


class DistanceBand:
    """Streams features in sampling order and keeps the distances that the dynamic programme can ask for.

    band[t, d] = ‖X_t - X_{t-d}‖ for d < max_length, summed over batch, channels and pixels (plain L1 in the paper).
    Memory: max_length - 1 features and T × max_length float64 numbers, whatever T is.

    Args:
        num_steps: evaluations of the sampler (T).
        interval: N; groups are at most 2N long, so distances d < min(2N, T) are kept.
        cost: "l1" (the paper) or "l2" (squared).
        hold: what is reused of a feature (rounding, say); None is the feature as it is.

    Raises:
        UserError: unknown cost or impossible interval.
    """

    def __init__(
        self, num_steps: int, interval: int, cost: str = "l1", hold: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        num_groups(num_steps, interval)
        if cost not in COSTS:
            raise UserError(f"schedule cost is {cost!r}, expected one of {', '.join(COSTS)}")
        self.num_steps, self.interval, self.cost, self.hold = num_steps, interval, cost, hold
        self.max_length = min(2 * interval, num_steps)
        self.values = torch.zeros(num_steps, self.max_length, dtype=torch.float64)
        self.peak_bytes = 0
        self._ring: Tensor | None = None
        self._pending: list[Tensor] = []

    def update(self, feature: Tensor) -> None:
        """Take the feature of the next step [B, C, ...]; after T of them a new pass (batch) begins.

        Raises:
            ValueError: the shape changed within a pass.
        """
        rows = _as_rows(feature.detach().float())  # [B·C, m]
        slots = self.max_length - 1
        if self._pending and self._ring is not None and self._ring.shape[::2] != rows.shape:
            raise ValueError(f"features changed from {list(self._ring.shape[::2])} to {list(rows.shape)} within a pass")
        if self._ring is None:
            self._ring = rows.new_zeros(rows.shape[0], max(slots, 1), rows.shape[1])  # [B·C, 2N-1, m]
            self.peak_bytes = max(self.peak_bytes, self._ring.numel() * self._ring.element_size())
        step = len(self._pending)
        known = min(step, slots)
        self._pending.append(self._distances(rows, self._ring[:, :known]) if known else rows.new_zeros(0).double())
        if slots:
            self._ring[:, step % slots] = rows if self.hold is None else _as_rows(self.hold(feature.detach().float()))
        if step + 1 == self.num_steps:
            self._finish_pass(slots)

    def merge(self, other: DistanceBand) -> None:
        """Add the distances of another band of the same run: those of all guidance contexts together."""
        self.values = self.values + other.values
        self.peak_bytes += other.peak_bytes

    def _distances(self, rows: Tensor, past: Tensor) -> Tensor:
        """Distance of one feature [R, m] to the stored ones [R, L, m]: [L] float64, in ring order."""
        power = 1.0 if self.cost == "l1" else 2.0
        exact = "donot_use_mm_for_euclid_dist"
        distance = torch.cdist(rows[:, None], past, p=power, compute_mode=exact)[:, 0].double()  # [R, L]
        return (distance if self.cost == "l1" else distance.square()).sum(0)

    def _finish_pass(self, slots: int) -> None:
        """Add one pass to the band (the only copies from the device) and forget its features."""
        for step, distances in enumerate(self._pending):
            known = len(distances)
            slot = torch.arange(step - known, step) % max(slots, 1)  # ring slot of steps t-known … t-1
            self.values[step, 1 : known + 1] += distances.cpu()[slot].flip(0)
        self._ring = None
        self._pending.clear()


def _as_rows(feature: Tensor) -> Tensor:
    """[B, C, ...] -> [B·C, m]; what has fewer dimensions is one row each, or one row."""
    return (
        feature.flatten(0, 1).flatten(1)
        if feature.dim() > 2
        else feature.reshape(-1, feature.shape[-1] if feature.dim() else 1)
    )


def group_costs(band: Tensor, weights: Tensor | None = None, coherent: bool = False) -> Tensor:
    """D[i, l] = Σ_{d<l} w[i+d]·band[i+d, d]: cost of the group [i, i+l), by prefix sums.

    Args:
        band: [T, L, …] of `DistanceBand.values`; further dimensions (the length of the group before) stay as they are.
        weights: [T] importance of an error at each step; None is 1 everywhere (the paper).
        coherent: errors of one group push the sample the same way. Their sum is bounded by ‖Σδ‖² ≤ (l - 1)·Σ‖δ‖² (Cauchy and
            Schwarz; the refresh has none), so the group costs that factor more. Ours.

    Returns:
        [T, L + 1, …] float64; groups that would end after T are inf.
    """
    num_steps, length, *rest = band.shape
    per_step = [num_steps, *[1] * (band.dim() - 1)]
    weighted = band.double() if weights is None else band.double() * weights.double().view(per_step)
    start = torch.arange(num_steps)[:, None]  # [T, 1]
    offset = torch.arange(length)[None, :]  # [1, L]
    step = start + offset  # [T, L]
    shifted = weighted[step.clamp(max=num_steps - 1), offset]  # [T, L, …] band[i+d, d]
    inside = (step < num_steps).view(num_steps, length, *[1] * len(rest))
    shifted = torch.where(inside, shifted, torch.inf)
    costs = torch.cat([torch.zeros(num_steps, 1, *rest, dtype=torch.float64), shifted.cumsum(1)], dim=1)
    if not coherent:
        return costs
    cached = torch.arange(-1, length).clamp(min=0).view(1, -1, *[1] * len(rest))  # cached steps of each length
    return torch.where(costs.isfinite(), costs * cached, costs)


def solve_schedule(costs: Tensor, groups: int, min_length: int, max_length: int) -> tuple[tuple[int, ...], float]:
    """M[k, n] = min_l M[k-1, n-l] + D[n-l, l], answer M[K, T], backtracked (CacheQuant equation 8).

    Differs from the released code, which raises IndexError when 2N > T: lengths are clipped to what exists.

    Args:
        costs: [T, L + 1] of `group_costs`, or [T, L + 1, L + 1] where it depends on the length of the group before.
        groups: K; each group has min_length to max_length steps.

    Returns:
        The K group starts and the objective.

    Raises:
        UserError: no choice of lengths reaches T.
    """
    num_steps = costs.shape[0]
    longest = min(max_length, costs.shape[1] - 1, num_steps)
    if not groups * min_length <= num_steps <= groups * longest:
        raise UserError(
            f"no schedule has {groups} groups of {min_length} to {longest} steps in {num_steps}: "
            f"change cache.interval or the number of groups"
        )
    lengths = torch.arange(min_length, longest + 1)  # [L']
    if costs.dim() == 3:
        return solve_pairs(costs, groups, lengths)
    end = torch.arange(num_steps + 1)[:, None]  # [T+1, 1]
    start = end - lengths  # [T+1, L']
    last = torch.where(start >= 0, costs[start.clamp(min=0), lengths], torch.inf)  # [T+1, L'] D[n-l, l]
    best = torch.full((num_steps + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0.0
    choices = []
    for _ in range(groups):
        best, choice = (best[start.clamp(min=0)] + last).min(dim=1)  # [T+1]
        choices.append(lengths[choice])
    steps, n = [], num_steps
    for choice in reversed(choices):
        n -= int(choice[n])
        steps.append(n)
    return tuple(reversed(steps)), float(best[num_steps])


def schedule_cost(costs: Tensor, schedule: Schedule) -> float:
    """Objective of any schedule under `group_costs`; inf where a group is longer than the band."""
    total, before = 0.0, 0
    for start, end in itertools.pairwise([*schedule.refresh_steps, schedule.num_steps]):
        length = end - start
        if length >= costs.shape[1]:
            return math.inf
        total += float(costs[start, length] if costs.dim() == 2 else costs[start, length, before])
        before = length
    return total


def best_schedule(
    values: Tensor,
    interval: int,
    weights: Tensor | None = None,
    groups: int | None = None,
    coherent: bool = False,
) -> Schedule:
    """The schedule that minimises the summed error of reused features.

    Group lengths lie in [ceil(N/2), 2N] (CacheQuant section 3.2). `groups` overrides K = ceil(T / N): the released code
    counts the sampler's steps, which for PLMS are one fewer than its evaluations.

    Args:
        values: [T, L] or [T, L, L + 1] of a band.
        interval: N.
        weights, coherent: of `group_costs`.
        groups: K.

    Raises:
        UserError: infeasible combination of T, K and the bounds.
    """
    num_steps, costs = len(values), group_costs(values, weights, coherent)
    k = groups or num_groups(num_steps, interval)
    steps, cost = solve_schedule(costs, k, math.ceil(interval / 2), 2 * interval)
    uniform = schedule_cost(costs, uniform_schedule(num_steps, interval, k))
    return Schedule(steps, num_steps, interval, cost, uniform if math.isfinite(uniform) else None)


def dps_schedule(band: DistanceBand, weights: Tensor | None = None, groups: int | None = None) -> Schedule:
    """`best_schedule` of a band's distances: DPS as the paper has it, where there are no weights."""
    return best_schedule(band.values, band.interval, weights, groups)


def schedule_from_features(
    features: Tensor, interval: int, num_groups: int | None = None, cost: str = "l1"
) -> Schedule:
    """DPS on features that are already in memory.

    Args:
        features: [T, ...] the feature at the cache site of each step.
        interval: N.
        num_groups: K, default ceil(T / N).
        cost: "l1" (the paper) or "l2".

    Raises:
        UserError: infeasible request or unknown cost.
    """
    band = DistanceBand(features.shape[0], interval, cost)
    for feature in features:
        band.update(feature)
    return dps_schedule(band, groups=num_groups)
