"""What a schedule can minimise, by the name that `schedule.cost` has in the configuration.

The group cost of DPS is a sum over steps, D(i, j) = Σ_t w_t·e(t, i) (CacheQuant equation 8). `Cost.error` says what e is:

* "l1", "l2": distance of the reused feature to the true one, ‖X_t - X_i‖₁ (CacheQuant section 3.2) or its squared norm.
* "residual": what the correction leaves of it, the variance of X_t that per-channel least squares on X_i does not explain
  (the fit is CacheQuant equation 10; that the schedule looks behind it is ours).
* "forecast": the same with the feature refreshed one group earlier as second regressor; the programme then knows the
  length of the group before (ours).

`rounded` reuses X_i rounded to the activation bits, as the quantised layers read it: E_cache and a part of E_quant of
CacheQuant section 3.3 in one cost (ours; the released schedule is the same for every precision). `weight` says what w is:

* "none": 1, the paper.
* "sampler": squared gain of the network times what DDIM does to an error of its prediction
  (`pipeline.calibrate.SamplerGains`).
* "effect": the measured effect of reusing a feature at that step alone on the final sample (`pipeline.effect`).

`coherent` counts that the errors of a group add up instead of averaging out (`schedule.group_costs`; ours).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

from torch import Tensor

from cachequant.quant.affine import fake_quantize, grid_from_range
from cachequant.residual import ResidualBand
from cachequant.schedule import DistanceBand


@dataclass(frozen=True)
class Cost:
    """One cost; the module says what each part means."""

    error: Literal["l1", "l2", "residual", "forecast"]
    weight: Literal["none", "sampler", "effect"] = "none"
    rounded: bool = False
    coherent: bool = False


COSTS: dict[str, Cost] = {
    "l1": Cost("l1"),
    "l2": Cost("l2"),
    "quantised": Cost("l2", rounded=True),
    "residual": Cost("residual"),
    "forecast": Cost("forecast"),
    "sampler": Cost("l2", "sampler"),
    "residual_sampler": Cost("residual", "sampler"),
    "forecast_sampler": Cost("forecast", "sampler"),
    "effect": Cost("l2", "effect"),
    "residual_effect": Cost("residual", "effect"),
    "forecast_effect": Cost("forecast", "effect"),
    "drift": Cost("forecast", "effect", coherent=True),
    "joint": Cost("forecast", "effect", rounded=True, coherent=True),
}
"""Name -> cost; "l1" is the paper's, "joint" knows the correction, the bits, the sample and the drift."""


class Band(Protocol):
    """Streams the features of full-precision trajectories."""

    peak_bytes: int

    @property
    def values(self) -> Tensor:
        """[T, L] error of reusing the feature of d < L steps before, or [T, L, L + 1] by the length of the group before."""
        ...

    def update(self, feature: Tensor) -> None:
        """Take the feature of the next step; after T of them a new pass begins."""
        ...

    def merge(self, other: Any) -> None:
        """Add what another band of the same kind has seen."""
        ...


def band_for(cost: Cost, num_steps: int, interval: int, channel_dim: int, bits: int) -> Band:
    """What streams the features for a cost.

    Args:
        cost: of `COSTS`.
        num_steps, interval: T and N.
        channel_dim: where a feature has its channels.
        bits: of the activations, for a rounded cost.

    Raises:
        UserError: impossible interval.
    """
    hold = rounding(bits) if cost.rounded else None
    if cost.error in ("l1", "l2"):
        return DistanceBand(num_steps, interval, cost.error, hold)
    return ResidualBand(num_steps, interval, channel_dim, 2 if cost.error == "forecast" else 1, hold)


def rounding(bits: int) -> Callable[[Tensor], Tensor]:
    """A feature through the grid of its own range, per tensor and asymmetric (CacheQuant section 3.1)."""
    return partial(_rounded, bits=bits)


def _rounded(feature: Tensor, bits: int) -> Tensor:
    return fake_quantize(feature, *grid_from_range(feature.amin(), feature.amax(), bits), bits)
