"""Triton normalisations: GroupNorm + SiLU of one image or of two halves, LayerNorm with modulation, both ending in integers.

A group norm is three launches (moments of chunks, their merge, the output), each of which reads whole rows of pixels and
fills the card at every size; one program a group, which needs one launch, took two to four times as long on an H100.
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


@triton.jit(do_not_specialize=["pixels", "begin"])
def _moments_kernel(
    x, means, squares, pixels, width_x, channels, begin, chunk: tl.constexpr, rows: tl.constexpr, block_c: tl.constexpr
):
    """Mean and summed squared deviation of every channel over one chunk of pixels of one part."""
    batch = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    channel = tl.program_id(2) * block_c + tl.arange(0, block_c)
    real = channel < width_x
    last = tl.minimum(pixels, (piece + 1) * chunk)
    total = tl.zeros([block_c], dtype=tl.float32)
    for start in range(0, chunk, rows):
        pixel = piece * chunk + start + tl.arange(0, rows)
        valid = (pixel < last)[:, None] & real[None, :]
        at = (batch * pixels + pixel)[:, None] * width_x + channel[None, :]
        total += tl.sum(tl.load(x + at, valid, other=0.0).to(tl.float32), axis=0)
    mean = total / (last - piece * chunk)
    total = tl.zeros([block_c], dtype=tl.float32)
    for start in range(0, chunk, rows):
        pixel = piece * chunk + start + tl.arange(0, rows)
        valid = (pixel < last)[:, None] & real[None, :]
        at = (batch * pixels + pixel)[:, None] * width_x + channel[None, :]
        value = tl.load(x + at, valid, other=0.0).to(tl.float32) - mean[None, :]
        total += tl.sum(tl.where(valid, value * value, 0.0), axis=0)
    place = (batch * tl.num_programs(1) + piece) * channels + begin + channel
    tl.store(means + place, mean, real)
    tl.store(squares + place, total, real)


@triton.jit(do_not_specialize=["pixels", "pieces"])
def _merge_kernel(
    means, squares, shift, shift_stride, weight, bias, affine, pixels, pieces, channels, eps, chunk: tl.constexpr,
    per_group: tl.constexpr, block_c: tl.constexpr, block_p: tl.constexpr, has_shift: tl.constexpr,
):  # fmt: skip
    """Merge the chunks' moments (Chan et al.) into y = x·affine[0] + affine[1] of every channel of one group."""
    batch = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, block_c)
    channel = tl.program_id(1) * per_group + inner
    real = inner < per_group
    add = tl.zeros([block_c], dtype=tl.float32)
    if has_shift:
        add = tl.load(shift + batch * shift_stride + channel, real, other=0.0).to(tl.float32)
    piece = tl.arange(0, block_p)
    valid = (piece < pieces)[:, None] & real[None, :]
    at = (batch * pieces + piece)[:, None] * channels + channel[None, :]
    count = tl.where(valid, tl.minimum(chunk, pixels - piece * chunk)[:, None].to(tl.float32), 0.0)
    centre = tl.load(means + at, valid, other=0.0) + add[None, :]
    mean = tl.sum(count * centre) / (pixels * per_group)
    away = centre - mean
    spread = tl.sum(tl.load(squares + at, valid, other=0.0) + count * away * away)
    scale = tl.rsqrt(spread / (pixels * per_group) + eps)
    gain = tl.load(weight + channel, real, other=0.0).to(tl.float32) * scale
    base = tl.load(bias + channel, real, other=0.0).to(tl.float32)
    tl.store(affine + batch * 2 * channels + channel, gain, real)
    tl.store(affine + (batch * 2 + 1) * channels + channel, (add - mean) * gain + base, real)


@triton.jit(do_not_specialize=["begin", "height", "width", "out_h", "out_w", "left", "top"])
def _apply_kernel(
    x, affine, grid, out, width_x, channels, begin, height, width, out_h, out_w, left, top,
    rows: tl.constexpr, block_c: tl.constexpr, activate: tl.constexpr, integer: tl.constexpr,
):  # fmt: skip
    """y = x·a + b, SiLU, integers if wanted, of one part into its padded copy."""
    batch = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * rows + tl.arange(0, rows)
    channel = tl.program_id(2) * block_c + tl.arange(0, block_c)
    real = channel < width_x
    _, row, column, inside = padded_pixel(pixel, out_h, out_w, left, top, height, width)
    valid = (pixel < out_h * out_w)[:, None] & real[None, :]
    at = batch * height * width + row * width + column
    value = tl.load(x + at[:, None] * width_x + channel[None, :], valid & inside[:, None], other=0.0).to(tl.float32)
    gain = tl.load(affine + batch * 2 * channels + begin + channel, real, other=0.0)
    base = tl.load(affine + (batch * 2 + 1) * channels + begin + channel, real, other=0.0)
    y = value * gain[None, :] + base[None, :]
    y = y * tl.sigmoid(y) if activate else y
    place = (batch * out_h * out_w + pixel)[:, None] * width_x + channel[None, :]
    if integer:
        q = tl.where(inside[:, None], round_to_grid(y, grid), tl.load(grid + 1).to(tl.int8))
        tl.store(out + place, q, valid)
    else:
        tl.store(out + place, y.to(out.dtype.element_ty), valid)


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
    affine = _affine(parts, shift, weight, bias, groups, eps)
    outs = [torch.empty(b, *size, part.shape[3], dtype=torch.int8, device=part.device) for part in parts]
    begin = 0
    for part, out, grid in zip(parts, outs, grids, strict=True):
        _apply(part, affine, begin, grid, out, (left, top), activate)
        begin += part.shape[3]
    return outs


def group_norm_float(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """GroupNorm of a contiguous [B, H, W, C] in its own type."""
    out = torch.empty_like(x)
    _apply(x, _affine([x], None, weight, bias, groups, eps), 0, None, out, (0, 0), activate=False)
    return out


def _affine(parts: list[Tensor], shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """The norm of concat(parts) + shift as y = x·a + b of every channel: [B, 2, C] in float32."""
    b, h, w, _ = parts[0].shape
    channels, device = sum(part.shape[3] for part in parts), parts[0].device
    chunk = max(64, triton.next_power_of_2(triton.cdiv(h * w, 64)))
    pieces = triton.cdiv(h * w, chunk)
    means = torch.empty(2, b, pieces, channels, dtype=torch.float32, device=device)
    affine = torch.empty(b, 2, channels, dtype=torch.float32, device=device)
    begin = 0
    for part in parts:
        block = min(64, triton.next_power_of_2(part.shape[3]))
        _moments_kernel[(b, pieces, triton.cdiv(part.shape[3], block))](
            part, means[0], means[1], h * w, part.shape[3], channels, begin, chunk=chunk, rows=64, block_c=block
        )
        begin += part.shape[3]
    per_group = channels // groups
    _merge_kernel[(b, groups)](
        means[0], means[1], weight if shift is None else shift, 0 if shift is None else shift.stride(0), weight, bias,
        affine, h * w, pieces, channels, eps, chunk=chunk, per_group=per_group, block_c=triton.next_power_of_2(per_group),
        block_p=triton.next_power_of_2(pieces), has_shift=shift is not None,
    )  # fmt: skip
    return affine


def _apply(
    part: Tensor, affine: Tensor, begin: int, grid: Tensor | None, out: Tensor, corner: tuple[int, int], activate: bool
) -> None:
    """One part, whose channels begin at `begin` in `affine`, into `out`; `corner` is its place there."""
    b, h, w, width = part.shape
    _, out_h, out_w, _ = out.shape
    block = min(128, triton.next_power_of_2(width))
    rows = APPLY_BLOCK // block
    _apply_kernel[(b, triton.cdiv(out_h * out_w, rows), triton.cdiv(width, block))](
        part, affine, affine if grid is None else grid, out, width, affine.shape[2], begin, h, w, out_h, out_w, *corner,
        rows=rows, block_c=block, activate=activate, integer=grid is not None,
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
