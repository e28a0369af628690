"""Triton operators that read every value once: quantisation into padded images, sums of integers; and what others share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cachequant.kernels.reference import Pad


@triton.jit
def round_to_grid(x: tl.tensor, grid: tl.tensor) -> tl.tensor:
    """float32 -> the integer u of `grid` = (inverse scale, zero, low, high), in int8.

    Clipped first, then rounded to nearest even by adding and taking away 1.5·2²³: the same integers as rounding first.
    """
    zero = tl.load(grid + 1)
    low = tl.load(grid + 2) - zero
    high = tl.load(grid + 3) - zero
    scaled = tl.minimum(tl.maximum(x * tl.load(grid), low), high)
    return ((scaled + 12582912.0) - 12582912.0 + zero).to(tl.int8)


@triton.jit
def normal_cdf(x: tl.tensor) -> tl.tensor:
    """Φ(x) = ½(1 + erf(x/√2)), within 2e-7 (Abramowitz & Stegun 7.1.28): half the instructions of the library's erf.

    The power overflows to infinity for |x| > 18, where 1 - 0 is the answer.
    """
    z = tl.abs(x) * 0.7071067811865476
    y = 2.765672e-4 + z * 4.30638e-5
    y = 9.2705272e-3 + z * (1.520143e-4 + z * y)
    y = 1.0 + z * (0.0705230784 + z * (0.0422820123 + z * y))
    y = y * y
    y = y * y
    y = y * y
    tail = 0.5 / (y * y)
    return tl.where(x < 0, tail, 1.0 - tail)


@triton.jit
def padded_pixel(
    pixel: tl.tensor,
    out_h: tl.tensor,
    out_w: tl.tensor,
    left: tl.tensor,
    top: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
) -> tl.tensor:
    """Position in an image [B, height, width] of a position in its padded copy, and whether it is inside."""
    column = pixel % out_w - left
    row = (pixel // out_w) % out_h - top
    batch = pixel // (out_w * out_h)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return batch, row, column, inside


@triton.jit(do_not_specialize=["pixels", "out_h", "out_w", "height", "width", "left", "top"])
def _quantize_kernel(
    x, grid, out, pixels, channels, out_h, out_w, height, width, left, top, upsample: tl.constexpr,
    rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * rows + tl.arange(0, rows)
    channel = tl.program_id(1) * columns + tl.arange(0, columns)
    batch, row, column, inside = padded_pixel(pixel, out_h, out_w, left, top, height * upsample, width * upsample)
    source = (batch * height + row // upsample) * width + column // upsample
    valid = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    value = tl.load(x + source.to(tl.int64)[:, None] * channels + channel[None, :], valid & inside[:, None], other=0.0)
    q = round_to_grid(value.to(tl.float32), grid)
    q = tl.where(inside[:, None], q, tl.load(grid + 1).to(tl.int8))
    tl.store(out + pixel.to(tl.int64)[:, None] * channels + channel[None, :], q, valid)


def quantize_image(x: Tensor, grid: Tensor, pad: Pad, upsample: int) -> Tensor:
    """See `cachequant.kernels.cuda.reference.quantize_image`; x is contiguous [B, H, W, C]."""
    b, h, w, c = x.shape
    left, right, top, bottom = pad
    out_h, out_w = h * upsample + top + bottom, w * upsample + left + right
    out = torch.empty(b, out_h, out_w, c, dtype=torch.int8, device=x.device)
    columns = min(128, triton.next_power_of_2(c))
    rows = 4096 // columns
    blocks = (triton.cdiv(b * out_h * out_w, rows), triton.cdiv(c, columns))
    _quantize_kernel[blocks](
        x, grid, out, b * out_h * out_w, c, out_h, out_w, h, w, left, top, upsample, rows=rows, columns=columns
    )
    return out


@triton.jit(do_not_specialize=["count", "per_batch"])
def _gated_sum_kernel(
    x, more, gate, out, count, channels, per_batch, rows: tl.constexpr, columns: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    channel = tl.program_id(1) * columns + tl.arange(0, columns)
    valid = (row < count)[:, None] & (channel < channels)[None, :]
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    where = (row // per_batch).to(tl.int64)[:, None] * channels + channel[None, :]
    y = tl.load(gate + where, valid, other=0.0).to(tl.float32) * tl.load(more + at, valid, other=0.0).to(tl.float32)
    y += tl.load(x + at, valid, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), valid)


def gated_sum(x: Tensor, more: Tensor, gate: Tensor) -> Tensor:
    """See `cachequant.kernels.cuda.reference.gated_sum`; everything contiguous."""
    b, length, channels = x.shape
    out = torch.empty_like(x)
    columns = min(128, triton.next_power_of_2(channels))
    rows = 4096 // columns
    blocks = (triton.cdiv(b * length, rows), triton.cdiv(channels, columns))
    _gated_sum_kernel[blocks](x, more, gate, out, b * length, channels, length, rows=rows, columns=columns)
    return out


@triton.jit(do_not_specialize=["count", "height", "width", "out_h", "out_w", "stride_h", "stride_w"])
def _window_sum_kernel(
    x, out, count, channels, height, width, out_h, out_w, stride_h, stride_w,
    window_h: tl.constexpr, window_w: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * rows + tl.arange(0, rows)
    column = (pixel % out_w) * stride_w
    row = ((pixel // out_w) % out_h) * stride_h
    first = ((pixel // (out_w * out_h)) * height + row) * width + column
    total = tl.zeros([rows], dtype=tl.int32)
    for tap in range(window_h * window_w):
        at = (first + (tap // window_w) * width + tap % window_w).to(tl.int64) * channels
        for start in range(0, channels, columns):
            channel = start + tl.arange(0, columns)
            valid = (pixel < count)[:, None] & (channel < channels)[None, :]
            total += tl.sum(tl.load(x + at[:, None] + channel[None, :], valid, other=0).to(tl.int32), axis=1)
    tl.store(out + pixel, total.to(tl.float32), pixel < count)


def window_sum(x: Tensor, window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """See `cachequant.kernels.cuda.reference.window_sum`; x is contiguous int8 [B, H, W, C]."""
    b, h, w, c = x.shape
    out_h, out_w = (h - window[0]) // stride[0] + 1, (w - window[1]) // stride[1] + 1
    out = torch.empty(b, out_h, out_w, dtype=torch.float32, device=x.device)
    columns = min(256, triton.next_power_of_2(c))
    rows = 16
    _window_sum_kernel[(triton.cdiv(out.numel(), rows),)](
        x,
        out,
        out.numel(),
        c,
        h,
        w,
        out_h,
        out_w,
        *stride,
        window_h=window[0],
        window_w=window[1],
        rows=rows,
        columns=columns,
    )
    return out
