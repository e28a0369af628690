"""A quantised layer on the GPU: the operators of `cachequant.kernels.cuda` with scales from the step tables."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.kernels.cuda import ops
from cachequant.kernels.cuda.dispatch import not_compiled
from cachequant.kernels.cuda.packing import DeviceWeight
from cachequant.kernels.reference import Geometry, Pad
from cachequant.quant.layers import Layer
from cachequant.quant.replaced import change_type_in_place
from cachequant.quant.step_tables import Columns, StepTables
from cachequant.types import ActivationTable, AffineMap, LayerQuant


def nhwc(x: Tensor) -> Tensor:
    """[B, C, H, W] -> contiguous [B, H, W, C]; a view of channels-last memory."""
    return x.permute(0, 2, 3, 1).contiguous()


def nchw(x: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, C, H, W] in channels-last memory, a view."""
    return x.permute(0, 3, 1, 2)


@dataclass
class Segment:
    """One product: int8 weights [N, K] or [N, R, S, C], its columns of the tables, whether it needs sums of its input."""

    weight: Tensor
    columns: Columns
    asymmetric: bool


class DeviceLayer(nn.Module):
    """Stands where an `nn.Conv2d` or `nn.Linear` stood; the numbers are those of `QuantLayer` in its QUANTIZED mode.

    Args:
        source: the layer that is replaced; its weight is not read, and may be on the meta device.
        state: integer weights and input tables.
        clock: tells the step.
        tables: of the network; frozen before the first call.
        corrections: step -> map of the first segment's product (a₂, b₂).

    Attributes:
        constant: whether grids and epilogue are the same at all steps.
        time: joint projections of timestep (and class) that the first layer of a resnet or DiT block carries, or None.
        context: holder of the key and value of the attention whose key projection this is, or None.
    """

    deployed = True

    def __init__(
        self,
        source: Layer,
        state: LayerQuant,
        clock: FeatureCache,
        tables: StepTables,
        corrections: dict[int, AffineMap] | None = None,
    ) -> None:
        super().__init__()
        self.geometry, self.widths, self.clock, self.tables = Geometry.of(source), state.widths, clock, tables
        self._source = (source,)  # a tuple hides it from the module tree
        weights = [DeviceWeight.of(grid, tables.device) for grid in state.weights]
        self.joint: tuple[Segment, list[int]] | None = None
        self.constant = not corrections and all(_same_at_all_steps(table) for table in state.inputs)
        self.time: Any = None
        self.context: Any = None
        self.first_grid = tables.add_grids(state.inputs)
        bias = None if source.bias is None else source.bias.detach().float()
        self.parts = [
            Segment(w.values, self._columns(i, w, bias, corrections), w.offset is not None)
            for i, w in enumerate(weights)
        ]
        self.stride = list(self.geometry.stride) if self.geometry.is_conv else [1, 1]
        self.window = list(weights[0].values.shape[1:3]) if self.geometry.is_conv else [1, 1]
        self.pad = self.geometry.border((self.window[0], self.window[1])) if self.geometry.is_conv else (0,) * 4
        self.pointwise = self.window == [1, 1] and self.stride == [1, 1] and not any(self.pad)

    def _columns(
        self, segment: int, weight: DeviceWeight, bias: Tensor | None, corrections: dict[int, AffineMap] | None
    ) -> Columns:
        """Register a segment's epilogue; the first one carries the bias and the correction."""
        first = segment == 0
        return self.tables.add_columns(
            self.first_grid + segment,
            weight.scale,
            bias if first else None,
            weight.sums,
            weight.offset,
            corrections if first else None,
        )

    @property
    def source(self) -> Layer:
        """The layer that was replaced."""
        return self._source[0]

    def not_compiled(self, capability: tuple[int, int], dtype: torch.dtype) -> str | None:
        """Why Triton's slower kernel runs a segment of it on a card, see `dispatch.not_compiled`; None where none does."""
        operation = "linear" if self.pointwise or not self.geometry.is_conv else "conv2d"
        reasons = (
            not_compiled(capability, operation, w.shape[-1], w.shape[0], dtype, part.asymmetric)
            for part in self.parts
            for w in (part.weight,)
        )
        return next((reason for reason in reasons if reason is not None), None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeviceLayer:
        """`.to()` changes the type of the replaced layer where it waits; integers stay as they are.

        Raises:
            UserError: the network is moved to another device.
        """
        change_type_in_place(self.source, self.tables.device, fn)
        super()._apply(fn, recurse)
        return self

    @property
    def grids(self) -> Tensor:
        """[segments, 4] of this step: inverse scale, zero, lowest, highest."""
        self.tables.ensure(self.clock.step)
        return self.tables.grids[self.first_grid : self.first_grid + len(self.widths)]

    def segments(self, x: Tensor) -> tuple[Tensor, ...]:
        """The input's channels, cut where the grids change."""
        return x.split(self.widths, dim=self.geometry.channel_dim) if len(self.widths) > 1 else (x,)

    def quantize(self, parts: Sequence[Tensor], upsample: int = 1, pad: Pad | None = None) -> list[Tensor]:
        """Integers of every segment, [B, H, W, C] with this layer's border (or `pad`) or [R, C]."""
        if not self.geometry.is_conv:
            return [
                ops.quantize_image(p[None, None], g, [0] * 4, 1)[0, 0] for p, g in zip(parts, self.grids, strict=True)
            ]
        border = list(self.pad if pad is None else pad)
        return [ops.quantize_image(p, g, border, upsample) for p, g in zip(parts, self.grids, strict=True)]

    def output(self, integers: Sequence[Tensor], dtype: torch.dtype, source: Tensor | None = None) -> Tensor:
        """The layer's output from the integers of all segments; every further segment accumulates onto the one before.

        Args:
            integers: int8 [B, H, W, C] with the border, or [..., C] of a linear layer or 1×1 convolution.
            dtype: of the output.
            source: added, of the output's shape and type.

        Returns:
            [B, P, Q, N] or [..., N].
        """
        self.tables.ensure(self.clock.step)
        for q, segment in zip(integers, self.parts, strict=True):
            if self.pointwise or not self.geometry.is_conv:
                source = _matrix_product(segment, self.tables, q, dtype, source)
            else:
                scale, shift, offset = self.tables.of(segment.columns)
                sums = ops.window_sum(q, self.window, self.stride) if segment.asymmetric else None
                lift = offset if segment.asymmetric else None
                source = ops.int8_conv2d(q, segment.weight, scale, shift, source, 1.0, sums, lift, self.stride, dtype)
        assert source is not None, "a layer has at least one segment"
        return source

    def outputs(self, integers: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """The outputs [..., N_i] of this layer and of those that `join` joined to it, which all read the same integers."""
        if self.joint is None:
            return [self.output([integers], dtype)]
        self.tables.ensure(self.clock.step)
        wide, sizes = self.joint
        return list(_matrix_product(wide, self.tables, integers, dtype, None).split(sizes, dim=-1))

    def activated(self, integers: Tensor, kind: str, grid: Tensor) -> Tensor:
        """A linear layer and the activation behind it in one launch: int8 [..., K] -> int8 [..., N] on `grid` [4].

        Args:
            integers: of the layer's only segment.
            kind: "geglu" (N is half of the layer's outputs), "gelu" or "gelu_tanh".
            grid: of the result.
        """
        self.tables.ensure(self.clock.step)
        (segment,) = self.parts
        scale, shift, offset = self.tables.of(segment.columns)
        rows = integers.reshape(-1, integers.shape[-1])
        sums, lift = _input_sums(segment, rows), offset if segment.asymmetric else None
        made = ops.int8_linear_activated(rows, segment.weight.flatten(1), scale, shift, sums, lift, grid, kind)
        return made.view(*integers.shape[:-1], -1)

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """[B, I, H, W] -> [B, O, H', W'] in channels-last memory, or [..., I] -> [..., O]."""
        if self.geometry.is_conv:
            return nchw(self.output(self.quantize([nhwc(part) for part in self.segments(x)]), x.dtype))
        rows = [part.reshape(-1, part.shape[-1]).contiguous() for part in self.segments(x)]
        return self.output(self.quantize(rows), x.dtype).view(*x.shape[:-1], -1)


def _matrix_product(
    segment: Segment, tables: StepTables, q: Tensor, dtype: torch.dtype, source: Tensor | None
) -> Tensor:
    """int8 [..., K] -> [..., N], plus source."""
    scale, shift, offset = tables.of(segment.columns)
    rows = q.reshape(-1, q.shape[-1])
    sums = _input_sums(segment, rows)
    plus = None if source is None else source.reshape(len(rows), -1)
    lift = offset if segment.asymmetric else None
    made = ops.int8_linear(rows, segment.weight.flatten(1), scale, shift, plus, 1.0, sums, lift, dtype)
    return made.view(*q.shape[:-1], len(segment.weight))


def _input_sums(segment: Segment, rows: Tensor) -> Tensor | None:
    """Σ of the integers [M, K] of every row, [M], where the weights' zero point needs it."""
    return ops.window_sum(rows[None, None], [1, 1], [1, 1]).flatten() if segment.asymmetric else None


def _same_at_all_steps(table: ActivationTable) -> bool:
    return bool((table.scale == table.scale[0]).all() and (table.zero_point == table.zero_point[0]).all())


def join(layers: Sequence[DeviceLayer]) -> bool:
    """Let `layers[0].outputs` compute all of these at once, if they read the same integers and are neighbours in the tables.

    The weights of each become views of the joint ones.
    """
    first = layers[0]
    alike = all(
        layer.first_grid == first.first_grid and len(layer.parts) == 1 and not layer.geometry.is_conv
        for layer in layers
    )
    spans = [layer.parts[0].columns for layer in layers]
    if not alike or any(one.start + one.size != other.start for one, other in itertools.pairwise(spans)):
        return False
    sizes = [span.size for span in spans]
    weight = torch.cat([layer.parts[0].weight for layer in layers])
    asymmetric = any(layer.parts[0].asymmetric for layer in layers)
    for layer, part in zip(layers, weight.split(sizes), strict=True):
        layer.parts[0].weight = part
    first.joint = Segment(weight, Columns(spans[0].start, sum(sizes)), asymmetric), sizes
    return True
