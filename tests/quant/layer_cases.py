"""Layers, grids and inputs on them, and what a quantised layer must compute, in float64."""

from typing import Any

import torch
from torch import Tensor, nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.kernels.reference import product
from cachequant.quant.affine import quantize
from cachequant.quant.layers import Layer, QuantLayer, quantize_weight
from cachequant.types import ActivationTable, LayerQuant, Schedule


def clock(step: int = 0, steps: int = 10) -> FeatureCache:
    return FeatureCache(Schedule(tuple(range(0, steps, 2)), steps, 2), step=step)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(scale: float, zero_point: float, bits: int, steps: tuple[int, ...] = (0,)) -> ActivationTable:
    rows = len(steps)
    return ActivationTable(
        torch.tensor(steps, dtype=torch.int32),
        torch.full((rows,), scale),
        torch.full((rows,), float(zero_point)),
        bits,
    )


def conv(seed: int = 0, bias: bool = True, **kwargs: Any) -> nn.Conv2d:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"in_channels": 6, "out_channels": 5, "kernel_size": 3, "padding": 1, **kwargs}
    return nn.Conv2d(bias=bias, **options)


def linear(seed: int = 0, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(6, 5, bias=bias)


def quantised(source: Layer, tables: tuple[ActivationTable, ...], widths: tuple[int, ...], bits: int = 8) -> QuantLayer:
    grids = tuple(quantize_weight(w, bits, "minmax") for w in source.weight.split(widths, dim=1))
    return QuantLayer(source, LayerQuant(grids, tables, widths), clock())


def on_grid(shape: tuple[int, ...], parts: list[ActivationTable], widths: list[int], dim: int) -> Tensor:
    """Values up to two steps beyond each segment's grid, no nearer than 0.1 step to a rounding border."""
    segments = []
    for i, (part, width) in enumerate(zip(parts, widths, strict=True)):
        size = list(shape)
        size[dim] = width
        scale, zero, levels = float(part.scale[0]), float(part.zero_point[0]), 2**part.bits - 1
        integers = torch.randint(int(-zero) - 2, int(levels - zero) + 3, size, generator=generator(i)).float()
        segments.append(scale * (integers + 0.8 * torch.rand(size, generator=generator(9 + i)) - 0.4))
    return torch.cat(segments, dim)


def real(layer: QuantLayer, x: Tensor, row: int = 0) -> list[tuple[Tensor, Tensor]]:
    """(x_q, w_q) of every segment in float64, by the definition of the grid."""
    dim = layer.geometry.channel_dim
    pairs = []
    for part, grid, rows in zip(x.double().split(layer.widths, dim), layer.weights, layer.state.inputs, strict=True):
        scale, zero = rows.scale[row].double(), rows.zero_point[row].double()
        rounded = (quantize(part, scale, zero, rows.bits) - zero) * scale
        column = (-1, *[1] * (grid.values.dim() - 1))
        weight = (grid.values.double() - grid.zero_point.double().view(column)) * grid.scale.double().view(column)
        pairs.append((rounded, weight))
    return pairs


def reference_products(layer: QuantLayer, x: Tensor, row: int = 0) -> list[Tensor]:
    return [product(a, w, layer.geometry) for a, w in real(layer, x, row)]


def channels(values: Tensor, like: Tensor, dim: int) -> Tensor:
    shape = [1] * like.dim()
    shape[dim] = -1
    return values.double().view(shape)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    difference = (found.double() - expected.double()).abs().max()
    assert float(difference) <= tolerance * max(float(expected.abs().max()), 1.0)
