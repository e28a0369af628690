"""Errors that caching and quantisation add at each step, from the sums that the stages gather."""

from __future__ import annotations

import math

from torch import Tensor

from cachequant.correction import Moments


def relative_errors(moments: dict[int, Moments], ridge: float) -> tuple[dict[int, float], dict[int, float]]:
    """√(mean squared error / mean square of the target) over all channels, without and with the fit, by step."""
    before, after = {}, {}
    for step, sums in moments.items():
        power = float(sums.target_power.sum())
        before[step] = math.sqrt(float(sums.error().sum()) / power)
        after[step] = math.sqrt(float(sums.error(sums.solve(ridge)).sum()) / power)
    return before, after


def path_error(path: Tensor, exact: Tensor) -> Tensor:
    """‖x_t - x_t of full‖ / ‖x_t of full‖ at every evaluation: [T] of two trajectories [T, n, C, H, W]."""
    return (path - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
