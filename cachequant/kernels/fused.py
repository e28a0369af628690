"""What stands between two integer products: normalise, activate, quantise in one operator.

The C++ operators run these in one pass over memory on the CPU; where they are not built, or on another device, plain torch
does, and is what the C++ is tested against. Tensors are float32 with channels last: [B, P, C] with P pixels or tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cachequant.kernels.native import load_native


@dataclass(frozen=True)
class Grid:
    """The grid of one activation at one step: q = clip(round(x / scale) + zero_point, 0, 2^bits - 1)."""

    scale: float
    zero_point: int
    bits: int

    @property
    def levels(self) -> int:
        """The largest integer."""
        return 2**self.bits - 1

    @property
    def flat(self) -> list[float]:
        """As the C++ operators take it."""
        return [self.scale, float(self.zero_point), float(self.levels)]


@dataclass(frozen=True)
class Sum:
    """An output [R, C] whose terms are not added yet: dense₀ + dense₁ + sums·columns; whatever reads it adds them.

    Attributes:
        dense: one or two float32 [R, C], owned by this sum.
        sums: [R, k], k at most 2, or None.
        columns: [k, C] beside `sums`.
    """

    dense: tuple[Tensor, ...]
    sums: Tensor | None = None
    columns: Tensor | None = None

    def settle(self) -> Tensor:
        """The output [R, C]; the memory of `dense` may be taken for it."""
        first, other = self.dense[0], self.dense[1] if len(self.dense) > 1 else None
        if self.sums is None or self.columns is None:
            return first if other is None else first.add_(other)
        if native(first):
            torch.ops.cachequant.add_terms(first, other, self.sums, self.columns)
            return first
        return (first if other is None else first.add_(other)).addmm_(self.sums, self.columns)


def window_sums(q: Tensor, zero_point: int, place: tuple[int, ...]) -> Tensor:
    """Σ (q - z) over everything that each output pixel of a convolution reads; padding counts as 0.

    Args:
        q: uint8 [B, H, W, C]; rows of a matrix product are [R, 1, 1, C].
        zero_point: z.
        place: kernel, stride, padding and dilation, height and width of each.

    Returns:
        float32 [B·H'·W'], exact below 2²⁴.
    """
    if native(q):
        return torch.ops.cachequant.window_sums(q, zero_point, place)
    kernel, stride, padding, dilation = (list(place[i : i + 2]) for i in range(0, 8, 2))
    pixel = q.sum(3, dtype=torch.int32).sub_(zero_point * q.shape[3]).float()[:, None]  # [B, 1, H, W]
    return F.conv2d(pixel, torch.ones(1, 1, *kernel, device=q.device), None, stride, padding, dilation).flatten()


def native(x: Tensor) -> bool:
    """Whether the C++ operators take this tensor."""
    return x.device.type == "cpu" and load_native() is None


def quantize(x: Tensor, grid: Grid) -> Tensor:
    """x of any shape and dense strides -> uint8 of the same shape and strides.

    The reciprocal of the scale is rounded to float32 first, as in `cachequant.kernels.reference.centred_integers`: the
    integers are the same ones.
    """
    if native(x):
        return torch.ops.cachequant.quantize(x, grid.flat)
    q = (x * (1.0 / grid.scale)).round_().clamp_(-grid.zero_point, grid.levels - grid.zero_point)
    return q.add_(grid.zero_point).to(torch.uint8)


def group_norm(
    parts: tuple[Tensor | Sum, ...],
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    activate: bool,
    grids: tuple[Grid, ...],
    shift: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Group normalisation of the concatenated parts (+ shift), SiLU if asked, and each part on its own grid.

    Neither the concatenation nor the sums are written to memory; groups may straddle the border of the parts.

    Args:
        parts: one or two tensors [B, P, C_i]; a single one may be a sum whose terms have B·P rows and this shape.
        weight, bias: [C], C the sum of the widths.
        groups: of the normalisation.
        eps: of the normalisation.
        activate: SiLU behind the normalisation.
        grids: one per part, or () for float32 outputs.
        shift: [B, C], or [1, C] for all of them, added before the normalisation (the time embedding).

    Returns:
        One tensor [B, P, C_i] per part.
    """
    given = parts[0]
    terms = given if isinstance(given, Sum) else Sum((given,))
    first, other = terms.dense[0], terms.dense[1] if len(terms.dense) > 1 else None
    skip = parts[1] if len(parts) > 1 else None
    assert skip is None or isinstance(skip, Tensor)
    if native(first):
        flat = [value for grid in grids for value in grid.flat]
        inputs = (first, other, terms.sums, terms.columns, skip, shift)
        return tuple(torch.ops.cachequant.group_norm(*inputs, weight, bias, groups, eps, activate, flat))
    x = first if other is None else first + other
    if terms.sums is not None and terms.columns is not None:
        x = x + (terms.sums @ terms.columns).view(x.shape)
    widths = [x.shape[2]] if skip is None else [x.shape[2], skip.shape[2]]
    x = x if skip is None else torch.cat([x, skip], dim=2)  # [B, P, C]
    if shift is not None:
        x = x + shift[:, None]
    y = F.group_norm(x.transpose(1, 2), groups, weight, bias, eps).transpose(1, 2)
    y = F.silu(y) if activate else y
    halves = y.split(widths, dim=2)
    return tuple(h.contiguous() if not grids else quantize(h.contiguous(), grids[i]) for i, h in enumerate(halves))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, grids: tuple[Grid, ...]) -> tuple[Tensor, ...]:
    """Layer normalisation of rows [R, C], then integers on each of the grids: uint8 [R, C] per grid."""
    if native(x):
        flat = [value for grid in grids for value in grid.flat]
        return tuple(torch.ops.cachequant.layer_norm(x, weight, bias, eps, flat))
    y = F.layer_norm(x, (x.shape[1],), weight, bias, eps)
    return tuple(quantize(y, grid) for grid in grids)


def geglu(x: Tensor, grid: Grid) -> Tensor:
    """value·gelu(gate) of rows [R, 2C] = [value | gate], as integers [R, C]."""
    if native(x):
        return torch.ops.cachequant.geglu(x, grid.flat)
    value, gate = x.chunk(2, dim=1)
    return quantize(value * F.gelu(gate), grid)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float, grid: Grid | None = None) -> Tensor:
    """softmax(q·kᵀ·scale)·v per head.

    On a CPU with AVX-512 and VNNI q·kᵀ is of integers: each query on a grid of 1/46,000 of its length or 1/32,767 of its
    largest value, whichever is coarser, keys on the coarsest of their head's. Normal operands then err less than in
    half precision, a head with a key ten times as long as the others as much. Elsewhere float32.

    Args:
        query: [B, N, H·d]; rows may be strided.
        key, value: [B, M, H·d], M at least 1.
        heads: H.
        scale: factor of the scores, not negative.
        grid: quantise the result, None for float32.

    Returns:
        [B, N, H·d].
    """
    if native(query) and query.shape[2] // heads <= 512:
        rows = (_rows(operand) for operand in (query, key, value))
        return torch.ops.cachequant.attention(*rows, heads, scale, grid.flat if grid else [])
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (query, key, value))  # [B, H, ·, d]
    out = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)  # [B, N, H·d]
    return out if grid is None else quantize(out, grid)


def _rows(x: Tensor) -> Tensor:
    """[B, N, C] as the C++ operator reads it: all rows the same distance apart."""
    alike = 1 in x.shape[:2] or x.stride(0) == x.shape[1] * x.stride(1)
    return x if alike and x.stride(2) == 1 else x.contiguous()
