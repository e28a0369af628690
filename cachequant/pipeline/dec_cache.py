"""Stage 3: DEC for cache, from the sums of stage 2 alone (CacheQuant equation 10)."""

from __future__ import annotations

from cachequant.correction import Moments
from cachequant.types import AffineMap


def solve_maps(moments: dict[int, Moments], ridge: float, inflation: float = 0.0) -> dict[int, AffineMap]:
    """a₁, b₁ (and the forecast's factor) of every cached step: step -> maps of [C]. Refresh steps have none: (1, 0)."""
    return {step: sums.solve(ridge, inflation).to("cpu") for step, sums in sorted(moments.items())}
