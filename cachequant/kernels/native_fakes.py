"""Shapes, types and strides of what the C++ operators return, without values: torch.compile and torch.export read these.

Importing this module registers them; the operators themselves come with `cachequant.kernels.native.load_native`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import register_fake


@register_fake("cachequant::quantize")
def _(x: Tensor, grid: list[float]) -> Tensor:
    return torch.empty_like(x, dtype=torch.uint8)


@register_fake("cachequant::group_norm")
def _(x, other, sums, columns, skip, shift, gamma, beta, groups, eps, activate, grids):  # type: ignore[no-untyped-def]
    parts = [x] if skip is None else [x, skip]
    return [part.new_empty(part.shape, dtype=_integers_or_float(grids)) for part in parts]


@register_fake("cachequant::add_terms")
def _(x: Tensor, other: Tensor | None, sums: Tensor, columns: Tensor) -> None:
    return None


@register_fake("cachequant::window_sums")
def _(q: Tensor, zero: int, place: list[int]) -> Tensor:
    kernel, stride, padding, dilation = (place[i : i + 2] for i in range(0, 8, 2))
    height, width = (
        (q.shape[1 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    )
    return q.new_empty(q.shape[0] * height * width, dtype=torch.float32)


@register_fake("cachequant::layer_norm")
def _(x: Tensor, gamma: Tensor, beta: Tensor, eps: float, grids: list[float]) -> list[Tensor]:
    return [x.new_empty(x.shape, dtype=torch.uint8) for _ in range(len(grids) // 3)]


@register_fake("cachequant::geglu")
def _(x: Tensor, grid: list[float]) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // 2, dtype=torch.uint8)


@register_fake("cachequant::attention")
def _(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float, grid: list[float]) -> Tensor:
    return query.new_empty(query.shape, dtype=_integers_or_float(grid))


if hasattr(torch.ops.cachequant, "winograd"):  # not on every processor

    @register_fake("cachequant::winograd")
    def _(q, step, zero, weights, offsets, totals, scale, bias, slice):  # type: ignore[no-untyped-def]
        return q.new_empty(*q.shape[:3], scale.shape[0], dtype=torch.float32)


def _integers_or_float(grid: list[float]) -> torch.dtype:
    return torch.uint8 if grid else torch.float32
