"""The dynamic programme for costs that know the group before, as a forecast from two refreshed features does. Ours."""

from __future__ import annotations

import torch
from torch import Tensor


def solve_pairs(costs: Tensor, groups: int, lengths: Tensor) -> tuple[tuple[int, ...], float]:
    """M[k, n, l] = min_p M[k-1, n-l, p] + D[n-l, l, p], answer min_l M[K, T, l], backtracked.

    The state is where a group ends and how long it is; CacheQuant equation 8 needs only where. O(K·T·L²).

    Args:
        costs: [T, L + 1, L + 1] of `group_costs`: start, length, length of the group before (0: the first group).
        groups: K; feasible with these lengths.
        lengths: [L'] allowed, rising.

    Returns:
        The K group starts and the objective.
    """
    num_steps = costs.shape[0]
    end = torch.arange(num_steps + 1)[:, None]  # [T+1, 1]
    start = end - lengths  # [T+1, L']
    inside = start >= 0
    origin = start.clamp(min=0, max=num_steps - 1)
    best = torch.where(start == 0, costs[origin, lengths, 0], torch.inf)  # [T+1, L'] one group, from 0
    follow = costs[origin[:, :, None], lengths[:, None], lengths]  # [T+1, L', L''] after a group of the third index
    follow = torch.where(inside[:, :, None], follow, torch.inf)
    choices = []
    for _ in range(groups - 1):
        best, choice = (best[start.clamp(min=0)] + follow).min(dim=2)  # [T+1, L'] and which length was before
        choices.append(choice)
    cost, place = best[num_steps].min(dim=0)
    steps, n, length = [], num_steps, int(place)
    for choice in reversed(choices):
        before = int(choice[n, length])
        n -= int(lengths[length])
        steps.append(n)
        length = before
    return (0, *reversed(steps)), float(cost)
