"""A quantised layer as it is deployed: real integers through a backend's product, everything else folded beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.correction import fold_into_epilogue
from cachequant.errors import UserError
from cachequant.kernels.cpu import PackedWeight, pack, rows_of
from cachequant.kernels.fused import Grid, Sum, quantize
from cachequant.kernels.reference import Geometry
from cachequant.quant.layers import Layer
from cachequant.quant.observer import StepQuantizer
from cachequant.types import AffineMap, LayerQuant


class IntegerLayer(nn.Module):
    """Stands where an `nn.Conv2d` or `nn.Linear` stood: quantise the input, multiply integers, one float32 epilogue.

    The numbers are those of `cachequant.quant.layers.QuantLayer` in its QUANTIZED mode. Fused blocks call `grids`,
    `open` and `output` themselves and quantise in whatever comes before.

    Args:
        source: the layer that is replaced; its weight is not read, and may be on the meta device.
        state: integer weights and input tables; nothing of the weights is kept but their packed form.
        clock: tells the step.
        corrections: step -> map of the first segment's product (a₂, b₂).
    """

    deployed = True

    def __init__(
        self,
        source: Layer,
        state: LayerQuant,
        clock: FeatureCache,
        corrections: dict[int, AffineMap] | None = None,
    ) -> None:
        super().__init__()
        self.geometry, self.widths, self.clock = Geometry.of(source), state.widths, clock
        self.time: Any = None  # a resnet's first convolution carries the table of its time embedding
        self._source = (source,)  # a tuple hides it from the module tree
        self.packed = [pack(grid, self.geometry) for grid in state.weights]
        self.scales = [grid.scale.float().contiguous() for grid in state.weights]  # oneDNN reads them as they lie
        self.bias = None if source.bias is None else source.bias.detach().float()
        self.corrections = dict(corrections or {})
        self._quantizers = [StepQuantizer(table.bits, table=table) for table in state.inputs]
        self._grids: dict[int, tuple[Grid, ...]] = {}
        self._first: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._offsets: dict[int, Tensor] = {}

    @property
    def source(self) -> Layer:
        """The layer that was replaced."""
        return self._source[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerLayer:
        """`.to()` reaches the replaced layer too; integers stay on the CPU, and what has no data as it is.

        Raises:
            UserError: the network is moved to another device.
        """
        if fn(torch.empty(0)).device.type != "cpu":
            raise UserError(
                "this pipeline runs INT8 on the cpu, expected it to stay there: call cachequant.disable first"
            )
        self.source._apply(lambda tensor: tensor if tensor.is_meta else fn(tensor))
        super()._apply(fn, recurse)
        return self

    def grids(self) -> tuple[Grid, ...]:
        """The grid of every input segment at this step."""
        step = self.clock.step
        if step not in self._grids:
            rows = [(q.row(step), q.bits) for q in self._quantizers]
            self._grids[step] = tuple(Grid(scale, int(zero_point), bits) for (scale, zero_point), bits in rows)
        return self._grids[step]

    def segments(self, x: Tensor) -> tuple[Tensor, ...]:
        """The input's channels, cut where the grids change."""
        return x.split(self.widths, dim=self.geometry.channel_dim) if len(self.widths) > 1 else (x,)

    def quantize(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Integers of every segment, channels last."""
        order = torch.channels_last if self.geometry.is_conv else torch.contiguous_format
        dense = (part.float().contiguous(memory_format=order) for part in parts)
        return tuple(quantize(part, grid) for part, grid in zip(dense, self.grids(), strict=True))

    def open(self, integers: tuple[Tensor, ...], plus: Tensor | None = None, reuse: bool = False) -> Sum:
        """The layer's output as rows [R, O], with terms that whoever reads it adds.

        Args:
            integers: uint8 of every segment.
            plus: rows added to it.
            reuse: the memory of `plus` may be taken.
        """
        dense: list[Tensor] = []
        sums: list[Tensor] = []
        for segment, (q, packed, grid) in enumerate(zip(integers, self.packed, self.grids(), strict=True)):
            scale, shift = self._epilogue() if segment == 0 else (self.scales[segment], None)
            if isinstance(packed, PackedWeight) and packed.is_matrix:
                plus = packed.multiply(rows_of(q, self.geometry), grid, scale, shift, plus, reuse)
                reuse = True
            else:
                dense.append(rows_of(packed.convolve(q, grid, scale, shift), self.geometry))
            if packed.offset is not None:
                sums.append(packed.sums(q, grid))
        if plus is not None:
            dense.append(plus)
        if len(dense) > 2:
            dense = [dense[0].add_(dense[1]), dense[2]]
        if not sums:
            return Sum(tuple(dense))
        return Sum(tuple(dense), torch.stack(sums, dim=1) if len(sums) > 1 else sums[0][:, None], self._columns())

    def output(self, integers: tuple[Tensor, ...], plus: Tensor | None = None, reuse: bool = False) -> Tensor:
        """The layer's output [B, O, H', W'] or [..., O], all terms added; the arguments are those of `open`."""
        rows, shape = self.open(integers, plus, reuse).settle(), integers[0].shape
        if not self.geometry.is_conv:
            return rows.view(*shape[:-1], rows.shape[1])
        height, width = self.packed[0].output_size(shape[2], shape[3])
        return rows.view(shape[0], height, width, rows.shape[1]).permute(0, 3, 1, 2)

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """[B, I, H, W] -> [B, O, H', W'], or [..., I] -> [..., O]."""
        return self.output(self.quantize(self.segments(x))).to(x.dtype)

    def _epilogue(self) -> tuple[Tensor, Tensor | None]:
        """(scale, shift) of the first segment at this step, beside the grid's scale which the product applies itself."""
        correction = self.corrections.get(self.clock.step)
        if correction is None:
            return self.scales[0], self.bias
        step = self.clock.step
        if step not in self._first:
            self._first[step] = fold_into_epilogue(self.scales[0], self.bias, correction)
        return self._first[step]

    def _columns(self) -> Tensor:
        """What the sums of the inputs are multiplied by at this step, one row per segment with an offset: [k, O]."""
        step = self.clock.step
        if step not in self._offsets:
            scales = (self._epilogue()[0], *self.scales[1:])
            triples = zip(self.packed, scales, self.grids(), strict=True)
            rows = [packed.offset * scale * grid.scale for packed, scale, grid in triples if packed.offset is not None]
            self._offsets[step] = torch.stack(rows)
        return self._offsets[step]
