"""Products in plain torch, exact and slow, for where every kernel fails; some rows or one image are in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from cachequant.kernels.cuda import reference

ROWS = 1024
"""Rows of a linear layer's input that are in memory as float64 at a time."""


def product(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    scale: Tensor,
    shift: Tensor | None,
    source: Tensor | None,
    beta: float,
    row_sum: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
) -> None:
    """int8 [M, K] × [N, K] into `out` [M, N], or [B, H, W, C] × [N, R, S, C] into [B, P, Q, N]; see `reference.epilogue`."""
    for part in _parts(x):
        if x.dim() == 2:
            total = reference.accumulate_linear(x[part], weight)
        else:
            total = reference.accumulate_conv2d(x[part], weight, stride)
        added, sums = (None if t is None else t[part] for t in (source, row_sum))
        out[part] = reference.epilogue(total, scale, shift, added, beta, sums, offset, out.dtype)


def activated(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    row_sum: Tensor | None,
    offset: Tensor | None,
    grid: Tensor,
    kind: str,
    out: Tensor,
) -> None:
    """`reference.activated` into `out`, int8 [M, N]."""
    for part in _parts(x):
        sums = None if row_sum is None else row_sum[part]
        out[part] = reference.activated(x[part], weight, scale, shift, sums, offset, grid, kind)


def _parts(x: Tensor) -> Iterator[slice]:
    """Rows of a matrix, or single images."""
    step = ROWS if x.dim() == 2 else 1
    return (slice(start, start + step) for start in range(0, len(x), step))
