"""Triton normalisations: GroupNorm + SiLU of one image or of two halves, LayerNorm with modulation, both ending in integers.

A group norm is two launches: moments of every group over chunks of pixels, then the output, whose programs merge these
moments for their channels themselves. Both fill the card at every size, and two halves of a concatenation share them; one
program a group, which needs one launch, took two to four times as long on an H100.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cachequant.kernels.cuda.triton_pointwise import padded_pixel, round_to_grid
from cachequant.kernels.reference import Pad

APPLY_BLOCK = 2048
"""Values of one program of the output."""
PROGRAMS, MOST_PIECES, ROWS = 256, 32, 32
"""Programs of the moments that are worth having, chunks that the output's programs can merge, pixels at a time."""


@triton.jit(do_not_specialize=["pixels"])
def _moments_kernel(
    first, second, shift, shift_stride, moments, pixels, width_first, width_second, groups, per_group,
    chunk: tl.constexpr, rows: tl.constexpr, block_g: tl.constexpr, block_c: tl.constexpr, halves: tl.constexpr,
    has_shift: tl.constexpr,
):  # fmt: skip
    """Mean and summed squared deviation of some groups of concat(first, second) + shift over one chunk of pixels.

    Pixels are taken a few at a time, and their moments merged into those before (Chan et al.): every value is read once.
    """
    batch = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    place = tl.arange(0, block_g * block_c)
    inner = place % block_c
    channel = (tl.program_id(2) * block_g + place // block_c) * per_group + inner
    real = (inner < per_group) & (channel < groups * per_group)
    add = tl.zeros([block_g * block_c], dtype=tl.float32)
    if has_shift:
        add = tl.load(shift + batch * shift_stride + channel, real, other=0.0).to(tl.float32)
    end = tl.minimum(pixels, (piece + 1) * chunk)
    seen = 0.0
    mean = tl.zeros([block_g, 1], dtype=tl.float32)
    spread = tl.zeros([block_g, 1], dtype=tl.float32)
    for start in range(0, chunk, rows):
        pixel = piece * chunk + start + tl.arange(0, rows)
        valid = (pixel < end)[:, None] & real[None, :]
        row = (batch * pixels + pixel)[:, None]
        value = tl.load(
            first + row * width_first + channel[None, :], valid & (channel < width_first)[None, :], other=0.0
        ).to(tl.float32)
        if halves:
            beyond = channel - width_first
            value += tl.load(
                second + row * width_second + beyond[None, :], valid & (beyond >= 0)[None, :], other=0.0
            ).to(tl.float32)
        value += add[None, :]
        here = tl.maximum(tl.minimum(end - piece * chunk - start, rows), 0).to(tl.float32) * per_group
        total = tl.sum(tl.where(valid, value, 0.0), axis=0).reshape(block_g, block_c)
        average = tl.sum(total, axis=1, keep_dims=True) / tl.maximum(here, 1.0)
        away = value - average.broadcast_to(block_g, block_c).reshape(block_g * block_c)[None, :]
        squares = tl.sum(tl.where(valid, away * away, 0.0), axis=0).reshape(block_g, block_c)
        step = average - mean
        share = here / tl.maximum(seen + here, 1.0)
        spread += tl.sum(squares, axis=1, keep_dims=True) + step * step * seen * share
        mean += step * share
        seen += here
    group = tl.program_id(2) * block_g + tl.arange(0, block_g)[:, None]
    at = moments + 2 * ((batch * tl.num_programs(1) + piece) * groups + group)
    tl.store(at, mean, group < groups)
    tl.store(at + 1, spread, group < groups)


@triton.jit
def _normalised(
    x, moments, shift, weight, bias, grid, out, batch, block, pixels, pieces, width, begin, groups, per_group, eps,
    height, columns, out_h, out_w, left, top, chunk: tl.constexpr, rows: tl.constexpr, block_c: tl.constexpr,
    block_p: tl.constexpr, has_shift: tl.constexpr, activate: tl.constexpr, integer: tl.constexpr,
):  # fmt: skip
    """Some pixels and channels of one part: y = x·gain + base, SiLU, integers if wanted, into its padded copy."""
    channel = block * block_c + tl.arange(0, block_c)
    real = channel < width
    place = begin + channel
    piece = tl.arange(0, block_p)
    known = (piece < pieces)[:, None] & real[None, :]
    at = moments + 2 * ((batch * pieces + piece)[:, None] * groups + (place // per_group)[None, :])
    count = tl.where(known, tl.minimum(chunk, pixels - piece * chunk)[:, None].to(tl.float32), 0.0)
    centre = tl.load(at, known, other=0.0)
    mean = tl.sum(count * centre, axis=0) / pixels
    away = centre - mean[None, :]
    spread = tl.sum(tl.load(at + 1, known, other=0.0) + count * per_group * away * away, axis=0)
    gain = tl.load(weight + place, real, other=0.0).to(tl.float32) * tl.rsqrt(spread / (pixels * per_group) + eps)
    base = tl.load(bias + place, real, other=0.0).to(tl.float32) - mean * gain
    if has_shift:
        base += tl.load(shift + place, real, other=0.0).to(tl.float32) * gain
    pixel = tl.program_id(1) * rows + tl.arange(0, rows)
    _, row, column, inside = padded_pixel(pixel, out_h, out_w, left, top, height, columns)
    valid = (pixel < out_h * out_w)[:, None] & real[None, :]
    source = batch * pixels + row * columns + column
    value = tl.load(x + source[:, None] * width + channel[None, :], valid & inside[:, None], other=0.0).to(tl.float32)
    y = value * gain[None, :] + base[None, :]
    y = y * tl.sigmoid(y) if activate else y
    target = (batch * out_h * out_w + pixel)[:, None] * width + channel[None, :]
    if integer:
        q = tl.where(inside[:, None], round_to_grid(y, grid), tl.load(grid + 1).to(tl.int8))
        tl.store(out + target, q, valid)
    else:
        tl.store(out + target, y.to(out.dtype.element_ty), valid)


@triton.jit(
    do_not_specialize=["pixels", "pieces", "blocks_first", "height", "columns", "out_h", "out_w", "left", "top"]
)
def _apply_kernel(
    first, second, moments, shift, shift_stride, weight, bias, grids, out_first, out_second, pixels, pieces,
    blocks_first, width_first, width_second, groups, per_group, eps, height, columns, out_h, out_w, left, top,
    chunk: tl.constexpr, rows: tl.constexpr, block_c: tl.constexpr, block_p: tl.constexpr, halves: tl.constexpr,
    has_shift: tl.constexpr, activate: tl.constexpr, integer: tl.constexpr,
):  # fmt: skip
    """The output of one part or of both."""
    batch = tl.program_id(0).to(tl.int64)
    block = tl.program_id(2)
    shift += batch * shift_stride
    if block < blocks_first:
        _normalised(
            first, moments, shift, weight, bias, grids, out_first, batch, block, pixels, pieces, width_first, 0, groups,
            per_group, eps, height, columns, out_h, out_w, left, top, chunk, rows, block_c, block_p, has_shift, activate,
            integer,
        )  # fmt: skip
    elif halves:
        _normalised(
            second, moments, shift, weight, bias, grids + 4, out_second, batch, block - blocks_first, pixels, pieces,
            width_second, width_first, groups, per_group, eps, height, columns, out_h, out_w, left, top, chunk, rows,
            block_c, block_p, has_shift, activate, integer,
        )  # fmt: skip


def group_norm(
    parts: list[Tensor],
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    activate: bool,
    grids: Tensor,
    pad: Pad,
) -> list[Tensor]:
    """See `cachequant.kernels.cuda.reference.group_norm`; one or two contiguous parts, shift with rows of any stride."""
    b, h, w, _ = parts[0].shape
    left, right, top, bottom = pad
    size = (h + top + bottom, w + left + right)
    outs = [torch.empty(b, *size, part.shape[3], dtype=torch.int8, device=part.device) for part in parts]
    _group_norm(parts, shift, weight, bias, groups, eps, activate, grids, outs, (left, top))
    return outs


def group_norm_float(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """GroupNorm of a contiguous [B, H, W, C] in its own type."""
    out = torch.empty_like(x)
    _group_norm([x], None, weight, bias, groups, eps, False, None, [out], (0, 0))
    return out


def _group_norm(
    parts: list[Tensor],
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    activate: bool,
    grids: Tensor | None,
    outs: list[Tensor],
    corner: tuple[int, int],
) -> None:
    """One or two parts into `outs`, where their first pixel is at `corner` (left, top); integers if there are `grids`."""
    b, h, w, _ = parts[0].shape
    _, out_h, out_w, _ = outs[0].shape
    first, second = parts[0], parts[-1]
    widths = [part.shape[3] for part in parts]
    per_group = sum(widths) // groups
    block_c = triton.next_power_of_2(per_group)
    block_g = max(1, 64 // block_c)
    blocks = triton.cdiv(groups, block_g)
    wanted = min(MOST_PIECES, triton.next_power_of_2(triton.cdiv(PROGRAMS, b * blocks)))
    chunk = max(ROWS, triton.next_power_of_2(triton.cdiv(h * w, wanted)))
    pieces = triton.cdiv(h * w, chunk)
    moments = torch.empty(b, pieces, groups, 2, dtype=torch.float32, device=first.device)
    added, stride = (weight, 0) if shift is None else (shift, shift.stride(0))
    flags = {"halves": len(parts) > 1, "has_shift": shift is not None}
    _moments_kernel[(b, pieces, blocks)](
        first, second, added, stride, moments, h * w, widths[0], widths[-1], groups, per_group, chunk=chunk, rows=ROWS,
        block_g=block_g, block_c=block_c, **flags,
    )  # fmt: skip
    block = min(128, triton.next_power_of_2(max(widths)))
    rows = APPLY_BLOCK // block
    counts = [triton.cdiv(width, block) for width in widths]
    _apply_kernel[(b, triton.cdiv(out_h * out_w, rows), sum(counts))](
        first, second, moments, added, stride, weight, bias, moments if grids is None else grids, outs[0], outs[-1], h * w,
        pieces, counts[0], widths[0], widths[-1], groups, per_group, eps, h, w, out_h, out_w, *corner, chunk=chunk,
        rows=rows, block_c=block, block_p=triton.next_power_of_2(pieces), activate=activate, integer=grids is not None,
        **flags,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "per_batch", "plane"])
def _layer_norm_kernel(
    x, weight, bias, scale, shift, grids, out, count, channels, per_batch, plane, eps, grid_count: tl.constexpr,
    rows: tl.constexpr, block_c: tl.constexpr, affine: tl.constexpr, modulate: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    channel = tl.arange(0, block_c)
    real = channel < channels
    valid = (row < count)[:, None] & real[None, :]
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    value = tl.load(x + at, valid, other=0.0).to(tl.float32)
    value = tl.where(valid, value - (tl.sum(value, axis=1) / channels)[:, None], 0.0)
    y = value * tl.rsqrt(tl.sum(value * value, axis=1) / channels + eps)[:, None]
    if affine:
        y = y * tl.load(weight + channel, real, other=0.0).to(tl.float32)[None, :]
        y += tl.load(bias + channel, real, other=0.0).to(tl.float32)[None, :]
    if modulate:
        where = (row // per_batch).to(tl.int64)[:, None] * channels + channel[None, :]
        y = y * (1.0 + tl.load(scale + where, valid, other=0.0).to(tl.float32))
        y += tl.load(shift + where, valid, other=0.0).to(tl.float32)
    for i in tl.static_range(grid_count):
        tl.store(out + i * plane + at, round_to_grid(y, grids + 4 * i), valid)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    grids: Tensor,
) -> Tensor:
    """See `cachequant.kernels.cuda.reference.layer_norm`; x is contiguous [B, L, C]; scale and shift are [B, C]."""
    b, length, channels = x.shape
    out = torch.empty(len(grids), b, length, channels, dtype=torch.int8, device=x.device)
    block = triton.next_power_of_2(channels)
    rows = max(1, 2048 // block)
    _layer_norm_kernel[(triton.cdiv(b * length, rows),)](
        x, x if weight is None else weight, x if bias is None else bias, x if scale is None else scale,
        x if shift is None else shift, grids, out, b * length, channels, length, b * length * channels, eps,
        grid_count=len(grids), rows=rows, block_c=block, affine=weight is not None, modulate=scale is not None,
    )  # fmt: skip
    return out
