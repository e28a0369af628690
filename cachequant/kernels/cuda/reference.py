"""What every GPU operator computes, in plain torch: exact integers, float32 around them.

These functions are the operators on the CPU, and the reference that the kernels are tested against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cachequant.kernels.reference import Pad

INT8_OUT = torch.int8
"""Output type of a requantised product: rounded to nearest even and saturated."""


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 to the output's type; int8 rounds to nearest even and saturates."""
    return x.round().clamp(-128, 127).to(torch.int8) if dtype is torch.int8 else x.to(dtype)


def accumulate_linear(x: Tensor, weight: Tensor) -> Tensor:
    """int8 [M, K] × int8 [N, K] -> int32 [M, N]; float64 holds every partial sum exactly."""
    return (x.double() @ weight.double().t()).to(torch.int32)


def accumulate_conv2d(x: Tensor, weight: Tensor, stride: tuple[int, int]) -> Tensor:
    """int8 [B, H, W, C] × int8 [N, R, S, C] -> int32 [B, P, Q, N], without padding."""
    y = F.conv2d(x.double().permute(0, 3, 1, 2), weight.double().permute(0, 3, 1, 2), stride=stride)
    return y.permute(0, 2, 3, 1).to(torch.int32)


def epilogue(
    total: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    source: Tensor | None,
    beta: float,
    row_sum: Tensor | None,
    offset: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """scale[n]·total + shift[n] + beta·source + row_sum[m]·offset[n] in float32, then the cast.

    Args:
        total: int32 [..., N].
        scale, shift, offset: float32 [N].
        source: [..., N] of any floating type.
        beta: factor of source.
        row_sum: float32 [...] without the channels.
        dtype: of the result.
    """
    rest = torch.zeros((), device=total.device) if shift is None else shift
    if row_sum is not None and offset is not None:
        rest = row_sum[..., None] * offset + rest
    if source is not None:
        rest = beta * source.float() + rest
    return cast(scale * total.float() + rest, dtype)


def window_sum(x: Tensor, window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Σ u over a convolution's receptive field: int8 [B, H, W, C] -> float32 [B, P, Q], exact up to 2²⁴."""
    flat = x.double().sum(3)[:, None]  # [B, 1, H, W]
    ones = torch.ones(1, 1, *window, dtype=torch.float64, device=x.device)
    return F.conv2d(flat, ones, stride=stride)[:, 0].float()


def quantize(x: Tensor, grid: Tensor) -> Tensor:
    """u = clip(round(x·inverse) + zero, low, high) of the same shape; `grid` [4] holds inverse, zero, low, high."""
    inverse, zero, low, high = grid.unbind()
    return ((x.float() * inverse).clamp(low - zero, high - zero).round() + zero).to(torch.int8)


def pad_image(q: Tensor, grid: Tensor, pad: Pad) -> Tensor:
    """int8 [B, H, W, C] with a border of the grid's zero; `pad` is left, right, top, bottom."""
    if pad == (0, 0, 0, 0):
        return q
    left, right, top, bottom = pad
    b, h, w, c = q.shape
    out = grid[1].to(torch.int8).expand(b, h + top + bottom, w + left + right, c).clone()
    out[:, top : top + h, left : left + w] = q
    return out


def quantize_image(x: Tensor, grid: Tensor, pad: Pad, upsample: int) -> Tensor:
    """[B, H, W, C] -> int8, every pixel repeated `upsample` times along both axes, inside a border of zeros."""
    q = quantize(x, grid).repeat_interleave(upsample, 1).repeat_interleave(upsample, 2)
    return pad_image(q, grid, pad)


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
    """GroupNorm (+ SiLU) of the concatenated parts + shift, each part quantised on its own grid.

    Args:
        parts: [B, H, W, C_i], concatenated along channels; groups may straddle their border.
        shift: [B, C] added before the normalisation (the time embedding).
        weight, bias: [C].
        groups, eps, activate: of the normalisation; SiLU behind it.
        grids: [parts, 4].
        pad: border of zeros.
        raw_grids: [parts, 4], for the integers of the parts themselves, without a border, behind the others.
    """
    x = torch.cat([part.float() for part in parts], dim=3)
    if shift is not None:
        x = x + shift.float()[:, None, None]
    y = F.group_norm(x.permute(0, 3, 1, 2), groups, weight.float(), bias.float(), eps).permute(0, 2, 3, 1)
    y = F.silu(y) if activate else y
    halves = y.split([part.shape[3] for part in parts], dim=3)
    raw = [] if raw_grids is None else [quantize(part, grid) for part, grid in zip(parts, raw_grids, strict=True)]
    return [pad_image(quantize(half, grid), grid, pad) for half, grid in zip(halves, grids, strict=True)] + raw


def group_norm_float(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """GroupNorm of [B, H, W, C] in its own type."""
    y = F.group_norm(x.float().permute(0, 3, 1, 2), groups, weight.float(), bias.float(), eps)
    return y.permute(0, 2, 3, 1).to(x.dtype).contiguous()


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    grids: Tensor,
) -> Tensor:
    """LayerNorm, modulated as y·(1 + scale) + shift where those are given, on every grid.

    Args:
        x: [B, L, C].
        weight, bias: [C] or None.
        scale, shift: [B, C] or None (adaptive norm of a DiT block).
        eps: of the normalisation.
        grids: [G, 4].

    Returns:
        int8 [G, B, L, C].
    """
    gain, base = (None if t is None else t.float() for t in (weight, bias))
    y = F.layer_norm(x.float(), x.shape[-1:], gain, base, eps)
    if scale is not None and shift is not None:
        y = y * (1 + scale.float()[:, None]) + shift.float()[:, None]
    return torch.stack([quantize(y, grid) for grid in grids])


def gated_sum(x: Tensor, more: Tensor, gate: Tensor) -> Tensor:
    """x + gate·more of [B, L, C] with a gate [B, C], in float32, of the type of x."""
    return (x.float() + gate.float()[:, None] * more.float()).to(x.dtype)


def geglu(x: Tensor, grid: Tensor) -> Tensor:
    """value·gelu(gate) of [R, 2C] = [value | gate] -> int8 [R, C]."""
    value, gate = x.float().chunk(2, dim=1)
    return quantize(value * F.gelu(gate), grid)


def gelu(x: Tensor, grid: Tensor, tanh: bool) -> Tensor:
    """GELU, exact or in its tanh form, of [R, C] -> int8 [R, C]."""
    return quantize(F.gelu(x.float(), approximate="tanh" if tanh else "none"), grid)


def multi_head_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention of [B, N, C] over key and value [B, M, C] in so many heads: [B, N, C], contiguous."""
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (query, key, value))  # [B, H, ·, d]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).contiguous()


def activated(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    row_sum: Tensor | None,
    offset: Tensor | None,
    grid: Tensor,
    kind: str,
) -> Tensor:
    """A product and the activation behind it: `epilogue`, then `geglu` or `gelu`, in float32 in between.

    Args:
        x: int8 [M, K].
        weight: int8 [N, K]; for "geglu" [2N, K], values before gates.
        scale, shift, row_sum, offset: of `epilogue`.
        grid: [4] of the result.
        kind: "geglu", "gelu" or "gelu_tanh".

    Returns:
        int8 [M, N].
    """
    hidden = epilogue(accumulate_linear(x, weight), scale, shift, None, 0.0, row_sum, offset, torch.float32)
    return geglu(hidden, grid) if kind == "geglu" else gelu(hidden, grid, kind == "gelu_tanh")


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
    """The rows of one step of all layers, into `rows`, `scale`, `shift` and `offset`.

    scale = s_w·s·a₂,  shift = bias + b₂ - scale·zero·sums,  offset = scale·o.

    Args:
        step: [1] int64.
        grids: [T, G, 4], copied to `rows` [G, 4].
        inputs: [T, G, 2], scale s and zero of every grid.
        columns: owner (the grid of each column), s_w, bias, sums and o: [C] each.
        maps: none, or of each column the corrected layer (-1 without one) [C] and the channel of it [C], where the values of
            each layer's map begin at each step (-1 without one) [T, L] int64, a₂ and b₂ of all maps [V].
        rows, scale, shift, offset: results, [G, 4] and [C].
    """
    owner, factor, base, sums, fixed = columns
    rows.copy_(grids.index_select(0, step)[0])
    found = inputs.index_select(0, step)[0].index_select(0, owner)  # [C, 2]
    torch.mul(factor, found[:, 0], out=scale)
    if maps:
        layer, channel, first, gain, lift = maps
        begin = first.index_select(0, step)[0].index_select(0, layer.clamp(min=0))  # [C]
        mapped = (layer >= 0) & (begin >= 0)
        place = torch.where(mapped, begin + channel, 0)
        scale.mul_(torch.where(mapped, gain.index_select(0, place), 1.0))
        base = base + torch.where(mapped, lift.index_select(0, place), 0.0)
    torch.addcmul(base, scale, found[:, 1] * sums, value=-1, out=shift)
    torch.mul(scale, fixed, out=offset)


def dense(x: Tensor) -> Tensor:
    """x without gaps in memory, its channels last or before all pixels; x itself where it is so."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if last or x.is_contiguous() else x.contiguous()


def map_channels(x: Tensor, other: Tensor | None, maps: Tensor, step: Tensor, channel_dim: int) -> Tensor:
    """y = scale·x + shift (+ previous·other) on the first C' channels, x on the others: of shape and type of x, as `dense`.

    Args:
        x: [B, C, H, W] or [B, N, C].
        other: the same with at least C' channels, or None.
        maps: [T, 3, C'] float32: scale, shift, previous.
        step: [1] int64.
        channel_dim: where C is.
    """
    scale, shift, previous = maps.index_select(0, step)[0]  # [C'] each
    width, shape = len(scale), [1] * x.dim()
    shape[channel_dim] = -1
    y = x.narrow(channel_dim, 0, width) * scale.view(shape) + shift.view(shape)
    if other is not None:
        y = y + other.narrow(channel_dim, 0, width) * previous.view(shape)
    rest = x.narrow(channel_dim, width, x.shape[channel_dim] - width)
    return torch.empty_like(dense(x)).copy_(torch.cat([y.to(x.dtype), rest], channel_dim))
