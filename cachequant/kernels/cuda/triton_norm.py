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

LARGE, SMALL, VALUES_PER_WARP = 8192, 1024, 1024
"""Most and fewest values of a program, as many as leave `PROGRAMS` of them, and values of a warp."""
MOMENT_BLOCK, MOMENT_WARPS = 4096, 4
"""Values that a program of the moments has in flight at once, and its warps."""
PROGRAMS, MOST_PIECES = 256, 32
"""Programs that are worth having, chunks of pixels that those of the output can merge."""


@triton.jit
def _read(
    first, second, row, channel, valid, width_first, width_second, begin, end, halves: tl.constexpr
):  # fmt: skip
    """Pixels [rows, 1] × channels [1, lanes] of concat(first, second) in float32; all channels are in [begin, end)."""
    if halves and begin >= width_first:
        value = tl.load(second + row * width_second + (channel - width_first), valid, other=0.0).to(tl.float32)
    else:
        value = tl.load(first + row * width_first + channel, valid & (channel < width_first), other=0.0).to(tl.float32)
        if halves and end > width_first:
            beyond = channel - width_first
            value += tl.load(second + row * width_second + beyond, valid & (beyond >= 0), other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["pixels"])
def _moments_kernel(
    first, second, shift, shift_stride, moments, pixels, width_first, width_second, groups, per_group: tl.constexpr,
    chunk: tl.constexpr, rows: tl.constexpr, held: tl.constexpr, block_g: tl.constexpr, block_c: tl.constexpr,
    halves: tl.constexpr, has_shift: tl.constexpr,
):  # fmt: skip
    """Sums of y - p and of its square over one chunk of pixels and `held` groups of y = concat(first, second) + shift.

    The pivot p of a group is its first channel at the first pixel: one of its own values, so that the difference of the two
    sums that is the variance loses few digits, and the same for all chunks, so that their sums add up.
    """
    batch = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    lane = tl.arange(0, block_c)
    begin = tl.program_id(2) * (held * per_group)
    end = begin + held * per_group
    channel = begin + lane
    real = (lane < held * per_group) & (channel < groups * per_group)
    origin = begin + lane // per_group * per_group  # the first channel of the lane's group
    corner = tl.zeros([1, 1], dtype=tl.int64) + batch * pixels
    pivot = _read(first, second, corner, origin[None, :], real[None, :], width_first, width_second, begin, end, halves)
    lift = -pivot
    if has_shift:
        added = shift + batch * shift_stride
        pivot += tl.load(added + origin, real, other=0.0).to(tl.float32)[None, :]
        lift = tl.load(added + channel, real, other=0.0).to(tl.float32)[None, :] - pivot
    total = tl.zeros([rows, block_c], dtype=tl.float32)
    square = tl.zeros([rows, block_c], dtype=tl.float32)
    for start in tl.range(0, chunk, rows, loop_unroll_factor=4):
        pixel = piece * chunk + start + tl.arange(0, rows)
        valid = (pixel < pixels)[:, None] & real[None, :]
        row = (batch * pixels + pixel)[:, None]
        value = _read(first, second, row, channel[None, :], valid, width_first, width_second, begin, end, halves)
        value = tl.where(valid, value + lift, 0.0)
        total += value
        square += value * value
    own = tl.arange(0, block_g)
    member = ((lane // per_group)[None, :] == own[:, None]) & real[None, :]
    group = tl.program_id(2) * held + own
    stored = (own < held) & (group < groups)
    plane = tl.num_programs(0) * tl.num_programs(1) * groups
    at = moments + (batch * tl.num_programs(1) + piece) * groups + group
    tl.store(at, tl.sum(tl.where(member, tl.sum(total, axis=0)[None, :], 0.0), axis=1), stored)
    tl.store(at + plane, tl.sum(tl.where(member, tl.sum(square, axis=0)[None, :], 0.0), axis=1), stored)
    is_origin = member & (lane % per_group == 0)[None, :]
    tl.store(at + 2 * plane, tl.sum(tl.where(is_origin, pivot, 0.0), axis=1), stored)


@triton.jit
def _normalised(
    x, moments, shift, weight, bias, grid, out, raw_grid, raw, batch, block, pixels, pieces, width, begin, groups, eps,
    height, columns, out_h, out_w, left, top, per_group: tl.constexpr, rows: tl.constexpr, block_c: tl.constexpr,
    block_g: tl.constexpr, block_p: tl.constexpr, has_shift: tl.constexpr, activate: tl.constexpr, integer: tl.constexpr,
    both: tl.constexpr,
):  # fmt: skip
    """Some pixels and channels of one part: y = x·gain + base, SiLU, integers if wanted, into its padded copy.

    With `both`, the integers of x itself on a grid of their own, too.
    """
    channel = block * block_c + tl.arange(0, block_c)
    real = channel < width
    place = begin + channel
    pixel = tl.program_id(1) * rows + tl.arange(0, rows)
    _, row, column, inside = padded_pixel(pixel, out_h, out_w, left, top, height, columns)
    valid = (pixel < out_h * out_w)[:, None] & real[None, :]
    source = batch * pixels + row * columns + column
    at_source = source[:, None] * width + channel[None, :]
    value = tl.load(x + at_source, valid & inside[:, None], other=0.0)  # on its way
    piece = tl.arange(0, block_p)
    group = (begin + block * block_c) // per_group + tl.arange(0, block_g)
    known = (piece < pieces)[:, None] & (group < groups)[None, :]
    at = moments + (batch * pieces + piece)[:, None] * groups + group[None, :]
    plane = tl.num_programs(0) * pieces * groups
    count = pixels * per_group
    away = tl.sum(tl.load(at, known, other=0.0), axis=0) / count  # [block_g], of the mean from the pivot
    spread = tl.sum(tl.load(at + plane, known, other=0.0), axis=0) / count - away * away
    inverse = tl.rsqrt(tl.maximum(spread, 0.0) + eps)
    mean = away + tl.load(moments + 2 * plane + batch * pieces * groups + group, group < groups, other=0.0)
    member = (place // per_group)[None, :] == group[:, None]  # [block_g, block_c]
    gain = tl.sum(tl.where(member, inverse[:, None], 0.0), axis=0)
    gain *= tl.load(weight + place, real, other=0.0).to(tl.float32)
    base = -tl.sum(tl.where(member, mean[:, None], 0.0), axis=0)
    if has_shift:
        base += tl.load(shift + place, real, other=0.0).to(tl.float32)
    base = base * gain + tl.load(bias + place, real, other=0.0).to(tl.float32)
    value = value.to(tl.float32)
    if both:
        tl.store(raw + at_source, round_to_grid(value, raw_grid), valid & inside[:, None])
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
    first, second, moments, shift, shift_stride, weight, bias, grids, out_first, out_second, raw_grids, raw_first,
    raw_second, pixels, pieces, blocks_first, width_first, width_second, groups, eps, height, columns, out_h, out_w,
    left, top,
    per_group: tl.constexpr, rows: tl.constexpr, block_c: tl.constexpr, block_g: tl.constexpr,
    block_p: tl.constexpr, halves: tl.constexpr, has_shift: tl.constexpr, activate: tl.constexpr, integer: tl.constexpr,
    both: tl.constexpr,
):  # fmt: skip
    """The output of one part or of both."""
    batch = tl.program_id(0).to(tl.int64)
    block = tl.program_id(2)
    shift += batch * shift_stride
    if block < blocks_first:
        _normalised(
            first, moments, shift, weight, bias, grids, out_first, raw_grids, raw_first, batch, block, pixels,
            pieces, width_first, 0, groups, eps, height, columns, out_h, out_w, left, top, per_group, rows, block_c,
            block_g, block_p, has_shift, activate, integer, both,
        )  # fmt: skip
    elif halves:
        _normalised(
            second, moments, shift, weight, bias, grids + 4, out_second, raw_grids + 4, raw_second, batch,
            block - blocks_first, pixels, pieces, width_second, width_first, groups, eps, height, columns, out_h, out_w,
            left, top, per_group, rows, block_c, block_g, block_p, has_shift, activate, integer, both,
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
    raw_grids: Tensor | None = None,
) -> list[Tensor]:
    """See `cachequant.kernels.cuda.reference.group_norm`; one or two contiguous parts, shift with rows of any stride."""
    b, h, w, _ = parts[0].shape
    left, right, top, bottom = pad
    size = (h + top + bottom, w + left + right)
    outs = [torch.empty(b, *size, part.shape[3], dtype=torch.int8, device=part.device) for part in parts]
    raw = [] if raw_grids is None else [torch.empty_like(part, dtype=torch.int8) for part in parts]
    _group_norm(parts, shift, weight, bias, groups, eps, activate, grids, outs, (left, top), raw_grids, raw)
    return outs + raw


def group_norm_float(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """GroupNorm of a contiguous [B, H, W, C] in its own type."""
    out = torch.empty_like(x)
    _group_norm([x], None, weight, bias, groups, eps, False, None, [out], (0, 0), None, [])
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
    raw_grids: Tensor | None,
    raw: list[Tensor],
) -> None:
    """One or two parts into `outs`, where their first pixel is at `corner` (left, top); integers if there are `grids`.

    The integers of the parts themselves go into `raw`, if it has a tensor for each.
    """
    b, h, w, _ = parts[0].shape
    _, out_h, out_w, _ = outs[0].shape
    first, second = parts[0], parts[-1]
    widths = [part.shape[3] for part in parts]
    per_group = sum(widths) // groups
    held, lanes = whole_groups(per_group, groups)
    blocks = triton.cdiv(groups, held)
    wanted = min(MOST_PIECES, triton.next_power_of_2(triton.cdiv(PROGRAMS, b * blocks)))
    chunk = max(16, triton.next_power_of_2(triton.cdiv(h * w, wanted)))
    pieces = triton.cdiv(h * w, chunk)
    moments = torch.empty(3, b, pieces, groups, dtype=torch.float32, device=first.device)
    added, stride = (weight, 0) if shift is None else (shift, shift.stride(0))
    at_once = max(1, min(chunk, MOMENT_BLOCK // lanes))
    flags = {"halves": len(parts) > 1, "has_shift": shift is not None, "per_group": per_group}
    _moments_kernel[(b, pieces, blocks)](
        first, second, added, stride, moments, h * w, widths[0], widths[-1], groups, rows=at_once,
        held=held, block_g=triton.next_power_of_2(held), block_c=lanes, num_warps=MOMENT_WARPS, chunk=chunk, **flags,
    )  # fmt: skip
    block = min(128, triton.next_power_of_2(max(widths)))
    counts = [triton.cdiv(width, block) for width in widths]
    rows, warps = _rows(out_h * out_w, block, b * sum(counts))
    _apply_kernel[(b, triton.cdiv(out_h * out_w, rows), sum(counts))](
        first, second, moments, added, stride, weight, bias, moments if grids is None else grids, outs[0], outs[-1],
        moments if raw_grids is None else raw_grids, (raw or outs)[0], (raw or outs)[-1], h * w, pieces, counts[0],
        widths[0], widths[-1], groups, eps, h, w, out_h, out_w, *corner, rows=rows, block_c=block,
        block_g=triton.next_power_of_2(min(groups, (block - 1) // per_group + 2)),
        block_p=triton.next_power_of_2(pieces), activate=activate, integer=grids is not None, both=bool(raw),
        num_warps=warps, **flags,
    )  # fmt: skip


def _rows(count: int, block: int, others: int) -> tuple[int, int]:
    """Rows of a program of `block` values each, and its warps, for `count` rows and `others` programs beside each other."""
    rows = max(1, LARGE // block)
    while rows * block > SMALL and rows > 1 and triton.cdiv(count, rows) * others < PROGRAMS:
        rows //= 2
    return rows, max(1, min(8, rows * block // VALUES_PER_WARP))


def whole_groups(per_group: int, groups: int) -> tuple[int, int]:
    """Groups of a program and the power of two of lanes for their channels, of which few should be left over."""
    fits = [(lanes // per_group, lanes) for lanes in (64, 128, 256) if lanes >= per_group]
    fits = fits or [(1, triton.next_power_of_2(per_group))]
    used = [min(held, groups) * per_group / lanes for held, lanes in fits]
    return next(
        (min(held, groups), lanes) for (held, lanes), share in zip(fits, used, strict=True) if share >= 0.85 * max(used)
    )


@triton.jit(do_not_specialize=["count", "per_batch", "plane"])
def _layer_norm_kernel(
    x, more, gate, total, weight, bias, scale, shift, grids, out, count, channels, per_batch, plane, eps,
    grid_count: tl.constexpr, rows: tl.constexpr, block_c: tl.constexpr, gated: tl.constexpr, affine: tl.constexpr,
    modulate: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    channel = tl.arange(0, block_c)
    real = channel < channels
    valid = (row < count)[:, None] & real[None, :]
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    where = (row // per_batch).to(tl.int64)[:, None] * channels + channel[None, :]
    value = tl.load(x + at, valid, other=0.0).to(tl.float32)
    if gated:
        value += tl.load(gate + where, valid, other=0.0).to(tl.float32) * tl.load(more + at, valid, other=0.0).to(
            tl.float32
        )
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + at, rounded, valid)
        value = rounded.to(tl.float32)
    value = tl.where(valid, value - (tl.sum(value, axis=1) / channels)[:, None], 0.0)
    y = value * tl.rsqrt(tl.sum(value * value, axis=1) / channels + eps)[:, None]
    if affine:
        y = y * tl.load(weight + channel, real, other=0.0).to(tl.float32)[None, :]
        y += tl.load(bias + channel, real, other=0.0).to(tl.float32)[None, :]
    if modulate:
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
    more: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """See `cachequant.kernels.cuda.reference.layer_norm` and `gated_layer_norm`.

    Args:
        x: contiguous [B, L, C].
        weight, bias, scale, shift, eps, grids: of the reference.
        more: tensor [B, L, C] and gate [B, C] of what is added to x before.

    Returns:
        x + gate·more, or x itself, and the integers.
    """
    b, length, channels = x.shape
    out = torch.empty(len(grids), b, length, channels, dtype=torch.int8, device=x.device)
    total = x if more is None else torch.empty_like(x)
    extra, gate = (x, x) if more is None else more
    block = triton.next_power_of_2(channels)
    rows, warps = _rows(b * length, block, 1)
    _layer_norm_kernel[(triton.cdiv(b * length, rows),)](
        x, extra, gate, total, x if weight is None else weight, x if bias is None else bias, x if scale is None else scale,
        x if shift is None else shift, grids, out, b * length, channels, length, b * length * channels, eps,
        grid_count=len(grids), rows=rows, block_c=block, gated=more is not None, affine=weight is not None,
        modulate=scale is not None, num_warps=warps,
    )  # fmt: skip
    return total, out
