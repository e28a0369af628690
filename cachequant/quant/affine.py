"""The uniform affine grid q = clip(round(x / s) + z, 0, 2^bits - 1) (CacheQuant section 3.1) and its range search.

Where the released code scores a range that is forced to contain zero but stores another one, the parameters that are
scored here are the ones that are used; zero is always on the grid, so padding is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cachequant.errors import UserError

SHRINK_RATIOS = tuple(1.0 - 0.02 * i for i in range(40))
"""Candidates r = 1.00, 0.98, …, 0.22 of the released scripts, applied to both ends of the range."""

CHUNK = 1 << 22
"""Values that the search scores at once."""

SEARCHES = ("minmax", "mse", "percentile")


def grid_from_range(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid over [min(low, 0), max(high, 0)].

    Args:
        low, high: ends of the range, any shape.
        bits: grid of 2^bits levels.

    Returns:
        (scale > 0, zero_point in [0, 2^bits - 1]), both float of the shape of `low`. A range that holds only 0 gets scale 1.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    levels = 2**bits - 1
    scale = (high - low) / levels
    scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))
    return scale, (-low / scale).round().clamp(0, levels)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """x -> integers on the grid, kept in x's floating dtype; scale and zero_point broadcast against x."""
    return (x / scale).round_().add_(zero_point).clamp_(0, 2**bits - 1)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Integers on the grid -> real numbers (q - z)·s."""
    return (q - zero_point) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Round trip of x through the grid."""
    return dequantize(quantize(x, scale, zero_point, bits), scale, zero_point)


def search_grid(x: Tensor, bits: int, method: str = "mse", power: float = 2.4) -> tuple[Tensor, Tensor]:
    """Scale and zero point for each row of values.

    Methods: "minmax" takes the whole range; "percentile" cuts 0.01 % at each end; "mse" is the released scripts'
    search: of 40 shrunken ranges r·[min, max] the one with the smallest mean |x - x_q|^power, the first of equals.

    Args:
        x: [R, n] values, one grid per row.
        bits: grid size.

    Returns:
        (scale [R], zero_point [R]).

    Raises:
        UserError: unknown method.
    """
    if method not in SEARCHES:
        raise UserError(f"range search is {method!r}, expected one of {', '.join(SEARCHES)}")
    low, high = x.amin(1), x.amax(1)  # [R]
    if method == "percentile":
        low, high = _quantiles(x, 1e-4)
    if method != "mse":
        return grid_from_range(low, high, bits)
    ratios = torch.tensor(SHRINK_RATIOS, dtype=x.dtype, device=x.device)
    scales, zeros = grid_from_range(low[:, None] * ratios, high[:, None] * ratios, bits)  # [R, 40]
    rows = max(1, CHUNK // (len(SHRINK_RATIOS) * x.shape[1]))
    best = torch.cat(
        [
            _first_best(_scores(x[i : i + rows], scales[i : i + rows], zeros[i : i + rows], bits, power))
            for i in range(0, len(x), rows)
        ]
    )  # [R]
    return scales.gather(1, best[:, None])[:, 0], zeros.gather(1, best[:, None])[:, 0]


def _scores(x: Tensor, scales: Tensor, zeros: Tensor, bits: int, power: float) -> Tensor:
    """Mean |x - x_q|^power of rows [R, n] under each of their candidate grids [R, K]: [R, K]."""
    rounded = fake_quantize(x[:, None, :], scales[:, :, None], zeros[:, :, None], bits)  # [R, K, n]
    return rounded.sub_(x[:, None, :]).abs_().pow_(power).mean(2)


def _first_best(scores: Tensor) -> Tensor:
    """Index of the first smallest score of each row [R, K]: [R]."""
    candidates = torch.arange(scores.shape[1], device=scores.device)
    smallest = scores.amin(1, keepdim=True)
    return torch.where(scores <= smallest, candidates, scores.shape[1] - 1).amin(1)


def _quantiles(x: Tensor, tail: float) -> tuple[Tensor, Tensor]:
    """Values with `tail` of each row [R, n] below and above."""
    ordered = x.sort(dim=1).values
    cut = int(tail * (x.shape[1] - 1))
    return ordered[:, cut], ordered[:, x.shape[1] - 1 - cut]
