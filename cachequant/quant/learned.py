"""A layer for reconstruction: its rounding and activation grids have gradients.

AdaRound's soft rounding (Nagel et al., ICML 2020, equations 22 and 23) with LSQ+'s straight-through activation grids
(Bhalgat et al., 2020), as CacheQuant's `--recon` uses them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cachequant.kernels.reference import Geometry, product
from cachequant.quant.layers import Layer
from cachequant.types import ActivationTable, LayerQuant, WeightGrid

GAMMA, ZETA = -0.1, 1.1
"""Stretch of the sigmoid that lets a soft rounding reach 0 and 1."""

KEPT = 0.8
"""How far towards compensated integers their roundings begin; measured: training loses them from the real weights."""


class Rows:
    """Steps of the samples in the current batch: [B], shared by the layers of a block."""

    steps: Tensor = torch.zeros(0, dtype=torch.int64)


class LearnedLayer(nn.Module):
    """A quantised layer whose rounding, zero points and activation grids have gradients; it begins at the real weights.

    A weight is s·(clip(base + h, 0, levels) - z), h ∈ [0, 1] its soft rounding; base is the whole number below the real
    weight, or its neighbour where rounding compensated others.

    Args:
        source: the full-precision layer.
        state: grids to begin with.
        rows: steps of the samples that come.
        drop: share of the activations that stay unrounded in training.
    """

    def __init__(self, source: Layer, state: LayerQuant, rows: Rows, drop: float) -> None:
        super().__init__()
        self.geometry, self.state, self.rows, self.drop = Geometry.of(source), state, rows, drop
        weight = source.weight.detach().float()
        self.bias = None if source.bias is None else source.bias.detach().float()
        self._steps = state.inputs[0].steps.to(weight.device)
        self.rounding, self.weight_shift = nn.ParameterList(), nn.ParameterList()
        self.scale_shift, self.zero_point = nn.ParameterList(), nn.ParameterList()
        for i, (part, grid, table) in enumerate(
            zip(weight.split(state.widths, dim=1), state.weights, state.inputs, strict=True)
        ):
            base, whole = _beginning(part, grid)
            self.register_buffer(f"base_{i}", base)
            self.register_buffer(f"grid_scale_{i}", _column(grid.scale.to(weight), part.dim()))
            self.register_buffer(f"grid_zero_{i}", _column(grid.zero_point.to(weight), part.dim()))
            self.rounding.append(nn.Parameter(_unrounded(whole)))
            self.weight_shift.append(nn.Parameter(torch.zeros_like(self.get_buffer(f"grid_zero_{i}"))))
            self.register_buffer(f"scale_{i}", table.scale.to(weight))
            self.scale_shift.append(nn.Parameter(torch.zeros_like(self.get_buffer(f"scale_{i}"))))
            self.zero_point.append(nn.Parameter(table.zero_point.to(weight, copy=True)))

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """The layer on soft weights and rounded activations, its output as `QuantLayer`'s."""
        channels = self.geometry.channel_dim
        parts = x.float().split(self.state.widths, dim=channels) if len(self.state.widths) > 1 else (x.float(),)
        total = sum(product(self._activation(part, i), self._weight(i), self.geometry) for i, part in enumerate(parts))
        assert isinstance(total, Tensor)
        if self.bias is not None:
            total = total + (self.bias.view(-1, 1, 1) if self.geometry.is_conv else self.bias)
        return total.to(x.dtype)

    def soft(self) -> Iterator[Tensor]:
        """h of every segment."""
        yield from map(_soft, self.rounding)

    def _weight(self, segment: int) -> Tensor:
        base, zero = self.get_buffer(f"base_{segment}"), self.get_buffer(f"grid_zero_{segment}")
        levels = 2 ** self.state.weights[segment].bits - 1
        moved = _whole(zero + self.weight_shift[segment]).clamp(0, levels)
        inside = (base - zero + _soft(self.rounding[segment]) + moved).clamp(0, levels)
        return (inside - moved) * self.get_buffer(f"grid_scale_{segment}")

    def _activation(self, x: Tensor, segment: int) -> Tensor:
        index = torch.searchsorted(self._steps, self.rows.steps.to(self._steps), right=True).sub(1).clamp(min=0)  # [B]
        shape = (-1, *[1] * (x.dim() - 1))
        scale = self._scale(segment)[index].view(shape)
        levels = 2 ** self.state.inputs[segment].bits - 1
        zero = _whole(self.zero_point[segment][index]).clamp(0, levels).view(shape)
        rounded = ((_whole(x / scale) + zero).clamp(0, levels) - zero) * scale
        if not self.drop or not self.training:
            return rounded
        return torch.where(torch.rand_like(x) < self.drop, x, rounded)

    def _scale(self, segment: int) -> Tensor:
        """[S] activation scales; what has the gradient is how far they moved, in units of their mean."""
        begun = self.get_buffer(f"scale_{segment}")
        return (begun + begun.mean() * self.scale_shift[segment]).abs().clamp(min=1e-12)

    @torch.no_grad()
    def hardened(self) -> LayerQuant:
        """Whole integers and grids, as they are saved."""
        weights, tables = [], []
        for i, (soft, grid, table) in enumerate(zip(self.soft(), self.state.weights, self.state.inputs, strict=True)):
            base, zero = self.get_buffer(f"base_{i}"), self.get_buffer(f"grid_zero_{i}")
            levels = 2**grid.bits - 1
            moved = (zero + self.weight_shift[i]).round().clamp(0, levels)
            values = (base - zero + (soft >= 0.5) + moved).clamp(0, levels).to(torch.uint8).cpu().contiguous()
            weights.append(WeightGrid(values, grid.scale, moved.flatten().cpu(), grid.bits))
            scale = self._scale(i).cpu()
            zeros = self.zero_point[i].round().clamp(0, 2**table.bits - 1).cpu()
            tables.append(ActivationTable(table.steps, scale, zeros, table.bits))
        return LayerQuant(tuple(weights), tuple(tables), self.state.widths)


def _beginning(weight: Tensor, grid: WeightGrid) -> tuple[Tensor, Tensor]:
    """(base, h) of real weights on a grid: base is the integer, or the one below where the real weight is less.

    base + h is the real weight, or as near as an h can be that still rounds to the integer which the grid came with. Where
    these integers are not simply the nearest ones they make good one another's errors, which the real weights do not:
    h then begins `KEPT` of the way towards them.
    """
    values, dims = grid.values.to(weight), weight.dim()
    wanted = weight / _column(grid.scale.to(weight), dims) + _column(grid.zero_point.to(weight), dims)
    up = (wanted < values).to(weight)
    base = values - up
    soft = (wanted - base).clamp(0.01, 0.99)
    soft = torch.where(up > 0, soft.clamp(min=0.52), soft.clamp(max=0.48))
    moved = (wanted - values).abs() > 0.51
    compensated = (moved & (wanted > 0) & (wanted < 2**grid.bits - 1)).float().mean() > 0.01
    return base, (KEPT * up + (1 - KEPT) * soft).clamp(0.01, 0.99) if compensated else soft


def _soft(parameter: Tensor) -> Tensor:
    """AdaRound's h (equation 23): a sigmoid that is stretched and clipped to [0, 1]."""
    return (torch.sigmoid(parameter) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def _unrounded(soft: Tensor) -> Tensor:
    """The parameter whose soft rounding is `soft`."""
    return torch.logit((soft - GAMMA) / (ZETA - GAMMA))


def _whole(x: Tensor) -> Tensor:
    """Rounding whose gradient is one (Bengio et al., 2013)."""
    return x + (x.round() - x).detach()


def _column(values: Tensor, dims: int) -> Tensor:
    """[O] -> [O, 1, ...] with `dims` dimensions."""
    return values.view(-1, *[1] * (dims - 1))
