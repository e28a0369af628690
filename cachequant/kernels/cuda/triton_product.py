"""Triton int8 product and convolution with the epilogue of `cachequant.kernels.cuda`, for any number of channels.

They serve where no compiled kernel does: no CUDA compiler, channels that are no multiple of 16, an architecture without one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Blocks(NamedTuple):
    """Tile of one program: rows, output channels, input channels of one step, warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


BLOCKS = (
    Blocks(128, 128, 64, 8, 4),
    Blocks(128, 64, 128, 4, 4),
    Blocks(64, 128, 128, 4, 4),
    Blocks(64, 64, 128, 4, 4),
    Blocks(64, 64, 64, 4, 5),
    Blocks(32, 64, 128, 4, 4),
    Blocks(128, 64, 64, 4, 4),
    Blocks(128, 128, 128, 8, 3),
)
"""What the autotune chooses from."""


@triton.jit
def rescaled(
    total: tl.tensor, scale: tl.tensor, shift: tl.tensor, row_sum: tl.tensor, offset: tl.tensor,
    row: tl.tensor, column: tl.tensor, valid: tl.tensor, wide: tl.tensor,
    has_shift: tl.constexpr, has_offset: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """scale·total + shift + row_sum·offset in float32, of the rows that are `valid` and the columns that are `wide`."""
    y = tl.load(scale + column, wide, other=0.0)[None, :] * total.to(tl.float32)
    if has_shift:
        y += tl.load(shift + column, wide, other=0.0)[None, :]
    if has_offset:
        sums = tl.load(row_sum + row, valid, other=0.0)
        y += sums[:, None] * tl.load(offset + column, wide, other=0.0)[None, :]
    return y


@triton.jit
def _finish(
    total, scale, shift, source, beta, row_sum, offset, out, row, column, valid, n,
    has_shift: tl.constexpr, has_source: tl.constexpr, has_offset: tl.constexpr, integer: tl.constexpr,
):  # fmt: skip
    """scale·total + shift + beta·source + row_sum·offset, cast and stored."""
    wide = column < n
    at = row.to(tl.int64)[:, None] * n + column[None, :]
    y = rescaled(total, scale, shift, row_sum, offset, row, column, valid, wide, has_shift, has_offset)
    keep = valid[:, None] & wide[None, :]
    if has_source:
        y += beta * tl.load(source + at, keep, other=0.0).to(tl.float32)
    if integer:
        y = tl.minimum(tl.maximum(y, -128.0), 127.0)
        y = (y + 12582912.0) - 12582912.0
    tl.store(out + at, y.to(out.dtype.element_ty), keep)


@triton.jit
def tile_of(m: tl.tensor, n: tl.tensor, block_m: tl.constexpr, block_n: tl.constexpr) -> tl.tensor:
    """The tile of this program: eight rows of tiles at a time, so that neighbours share what they read."""
    tiles_m = tl.cdiv(m, block_m)
    tiles_n = tl.cdiv(n, block_n)
    band = 8 * tiles_n
    first = tl.program_id(0) // band * 8
    height = tl.minimum(tiles_m - first, 8)
    inner = tl.program_id(0) % band
    return first + inner % height, inner // height


@triton.jit(do_not_specialize=["m"])
def _linear_kernel(
    x, weight, scale, shift, source, beta, row_sum, offset, out, m, n, k,
    has_shift: tl.constexpr, has_source: tl.constexpr, has_offset: tl.constexpr, integer: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of(m, n, block_m, block_n)
    row = tile_m * block_m + tl.arange(0, block_m)
    column = tile_n * block_n + tl.arange(0, block_n)
    total = tl.zeros([block_m, block_n], dtype=tl.int32)
    for start in range(0, k, block_k):
        inner = start + tl.arange(0, block_k)
        a = tl.load(
            x + row.to(tl.int64)[:, None] * k + inner[None, :], (row < m)[:, None] & (inner < k)[None, :], other=0
        )
        b = tl.load(
            weight + column.to(tl.int64)[None, :] * k + inner[:, None],
            (column < n)[None, :] & (inner < k)[:, None],
            other=0,
        )
        total = tl.dot(a, b, total, out_dtype=tl.int32)
    _finish(
        total, scale, shift, source, beta, row_sum, offset, out, row, column, row < m, n,
        has_shift, has_source, has_offset, integer,
    )  # fmt: skip


@triton.jit(do_not_specialize=["m", "height", "width", "out_h", "out_w", "stride_h", "stride_w"])
def _conv_kernel(
    x, weight, scale, shift, source, beta, row_sum, offset, out, m, n, channels, height, width, out_h, out_w,
    stride_h, stride_w, taps_h: tl.constexpr, taps_w: tl.constexpr,
    has_shift: tl.constexpr, has_source: tl.constexpr, has_offset: tl.constexpr, integer: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """A product whose k runs over the taps of the window and, within each, over the channels."""
    tile_m, tile_n = tile_of(m, n, block_m, block_n)
    row = tile_m * block_m + tl.arange(0, block_m)
    column = tile_n * block_n + tl.arange(0, block_n)
    image_row = ((row // out_w) % out_h) * stride_h
    corner = ((row // (out_w * out_h)) * height + image_row) * width + (row % out_w) * stride_w
    steps = tl.cdiv(channels, block_k)
    total = tl.zeros([block_m, block_n], dtype=tl.int32)
    for step in range(0, taps_h * taps_w * steps):
        tap = step // steps
        inner = (step % steps) * block_k + tl.arange(0, block_k)
        pixel = (corner + (tap // taps_w) * width + tap % taps_w).to(tl.int64)
        a = tl.load(
            x + pixel[:, None] * channels + inner[None, :], (row < m)[:, None] & (inner < channels)[None, :], other=0
        )
        b = tl.load(
            weight + (column.to(tl.int64)[None, :] * (taps_h * taps_w) + tap) * channels + inner[:, None],
            (column < n)[None, :] & (inner < channels)[:, None],
            other=0,
        )
        total = tl.dot(a, b, total, out_dtype=tl.int32)
    _finish(
        total, scale, shift, source, beta, row_sum, offset, out, row, column, row < m, n,
        has_shift, has_source, has_offset, integer,
    )  # fmt: skip


class Operands(NamedTuple):
    """The operands of the epilogue; None is left out."""

    scale: Tensor
    shift: Tensor | None
    source: Tensor | None
    beta: float
    row_sum: Tensor | None
    offset: Tensor | None

    def arguments(self) -> tuple[Any, ...]:
        """As the kernels take them: `scale` stands in for what is not read."""
        optional = (self.shift, self.source, self.row_sum, self.offset)
        shift, source, row_sum, offset = (self.scale if t is None else t for t in optional)
        return self.scale, shift, source, self.beta, row_sum, offset

    def flags(self, dtype: torch.dtype) -> dict[str, bool]:
        """Which parts are compiled in."""
        return {
            "has_shift": self.shift is not None,
            "has_source": self.source is not None,
            "has_offset": self.offset is not None,
            "integer": dtype is torch.int8,
        }


def linear(x: Tensor, weight: Tensor, operands: Operands, out: Tensor, blocks: Blocks) -> None:
    """int8 [M, K] × int8 [N, K] into `out` [M, N]; everything contiguous."""
    (m, k), n = x.shape, weight.shape[0]
    _linear_kernel[(triton.cdiv(m, blocks.m) * triton.cdiv(n, blocks.n),)](
        x, weight, *operands.arguments(), out, m, n, k, **operands.flags(out.dtype),
        block_m=blocks.m, block_n=blocks.n, block_k=blocks.k, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip


def conv2d(x: Tensor, weight: Tensor, stride: tuple[int, int], operands: Operands, out: Tensor, blocks: Blocks) -> None:
    """int8 [B, H, W, C] × int8 [N, R, S, C] into `out` [B, P, Q, N], without padding; everything contiguous."""
    _, h, w, channels = x.shape
    n, rows, columns, _ = weight.shape
    b, out_h, out_w, _ = out.shape
    m = b * out_h * out_w
    _conv_kernel[(triton.cdiv(m, blocks.m) * triton.cdiv(n, blocks.n),)](
        x, weight, *operands.arguments(), out, m, n, channels, h, w, out_h, out_w, *stride, taps_h=rows, taps_w=columns,
        **operands.flags(out.dtype),
        block_m=blocks.m, block_n=blocks.n, block_k=blocks.k, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
