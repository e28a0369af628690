"""Triton operators that read the current step's row of tables: epilogues of all layers, maps of features and predictions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cachequant.kernels.cuda.reference import dense

BLOCK, MAP_BLOCK = 1024, 4096
"""Values of one program of the rows and of a map."""


@triton.jit(do_not_specialize=["width", "layers"])
def _load_kernel(
    step, grids, inputs, owner, factor, base, sums, fixed, layer, channel, first, gain, lift, rows, scale, shift, offset,
    width, grid_count, layers, block: tl.constexpr, has_maps: tl.constexpr,
):  # fmt: skip
    """The step's grids, and scale, shift and offset of some columns."""
    now = tl.load(step)
    at = tl.program_id(0) * block + tl.arange(0, block)
    grid = at < grid_count * 4
    tl.store(rows + at, tl.load(grids + now * grid_count * 4 + at, grid), grid)
    real = at < width
    source = inputs + (now * grid_count + tl.load(owner + at, real, other=0)) * 2
    made = tl.load(factor + at, real) * tl.load(source, real)
    rest = tl.load(base + at, real)
    if has_maps:
        corrected = tl.load(layer + at, real, other=-1)
        begin = tl.load(first + now * layers + corrected, real & (corrected >= 0), other=-1)
        mapped = begin >= 0
        place = begin + tl.load(channel + at, mapped, other=0)
        made *= tl.load(gain + place, mapped, other=1.0)
        rest += tl.load(lift + place, mapped, other=0.0)
    tl.store(scale + at, made, real)
    tl.store(shift + at, rest - made * tl.load(source + 1, real) * tl.load(sums + at, real), real)
    tl.store(offset + at, made * tl.load(fixed + at, real), real)


def load_step(
    step: Tensor,
    grids: Tensor,
    inputs: Tensor,
    columns: list[Tensor],
    maps: list[Tensor],
    rows: Tensor,
    scale: Tensor,
    shift: Tensor,
    offset: Tensor,
) -> None:
    """See `cachequant.kernels.cuda.reference.load_step`; everything is contiguous."""
    owner, factor, base, sums, fixed = columns
    layer, channel, first, gain, lift = maps or (owner, owner, step, factor, base)
    width, count = len(scale), grids.shape[1]
    _load_kernel[(triton.cdiv(max(width, 4 * count), BLOCK),)](
        step, grids, inputs, owner, factor, base, sums, fixed, layer, channel, first, gain, lift, rows, scale, shift, offset,
        width, count, first.shape[-1], block=BLOCK, has_maps=bool(maps),
    )  # fmt: skip


@triton.jit(do_not_specialize=["batches", "batch_stride", "channel_stride", "pixel_stride"])
def _map_kernel(
    x, other, maps, step, out, batches, channels, pixels, mapped, batch_stride, channel_stride, pixel_stride,
    last: tl.constexpr, has_other: tl.constexpr, outer: tl.constexpr, inner: tl.constexpr,
):  # fmt: skip
    """y = scale·x + shift (+ previous·other) of a dense x whose channels lie last or before all pixels."""
    now = tl.load(step)
    line = tl.program_id(0).to(tl.int64) * outer + tl.arange(0, outer)
    place = tl.program_id(1) * inner + tl.arange(0, inner)
    if last:  # a line is a pixel
        batch, channel, pixel, width, lines = (
            line[:, None] // pixels,
            place[None, :],
            line[:, None] % pixels,
            channels,
            pixels,
        )
    else:  # a line is a channel
        batch, channel, pixel, width, lines = (
            line[:, None] // channels,
            line[:, None] % channels,
            place[None, :],
            pixels,
            channels,
        )
    real = (line < batches * lines)[:, None] & (place < width)[None, :]
    has_map = channel < mapped
    row = maps + now * 3 * mapped + channel
    at = line[:, None] * width + place[None, :]
    y = tl.load(x + at, real, other=0.0).to(tl.float32)
    y = y * tl.load(row, has_map, other=1.0) + tl.load(row + mapped, has_map, other=0.0)
    if has_other:
        source = batch * batch_stride + channel * channel_stride + pixel * pixel_stride
        known = tl.load(other + source, real & has_map, other=0.0).to(tl.float32)
        y += known * tl.load(row + 2 * mapped, has_map, other=0.0)
    tl.store(out + at, y.to(out.dtype.element_ty), real)


def map_channels(x: Tensor, other: Tensor | None, maps: Tensor, step: Tensor, channel_dim: int) -> Tensor:
    """See `cachequant.kernels.cuda.reference.map_channels`; any strides, and the result lies in memory as a dense x does."""
    x = dense(x)
    out = torch.empty_like(x)
    channels, pixels = x.shape[channel_dim], x[0].numel() // x.shape[channel_dim]
    strides = (0, 0, 0)
    if other is not None:
        other = other if _has_even_rows(other) else other.contiguous()
        pixel = 3 - channel_dim if other.dim() == 3 else 3
        strides = other.stride(0), other.stride(channel_dim), other.stride(pixel)
    last = x.stride(channel_dim) == 1
    lines, width = (pixels, channels) if last else (channels, pixels)
    inner = min(256, triton.next_power_of_2(width))
    outer = MAP_BLOCK // inner
    _map_kernel[(triton.cdiv(x.shape[0] * lines, outer), triton.cdiv(width, inner))](
        x, x if other is None else other, maps, step, out, x.shape[0], channels, pixels, maps.shape[2], *strides,
        last=last, has_other=other is not None, outer=outer, inner=inner,
    )  # fmt: skip
    return out


def _has_even_rows(x: Tensor) -> bool:
    """Whether all pixels of [B, C, H, W] lie at one distance from each other; tokens [B, N, C] always do."""
    return x.dim() == 3 or x.stride(2) == x.shape[3] * x.stride(3)
