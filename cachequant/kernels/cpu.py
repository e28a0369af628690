"""INT8 on the CPU: oneDNN's convolution and matrix product through torch's own operators.

Activations are uint8 with the step's scale and zero point (arguments of each call), weights int8 per output channel, outputs
float32 with scale, bias and an optional sum in the epilogue. The numbers are those of `cachequant.kernels.reference`.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass

import torch
from torch import Tensor

from cachequant.kernels.fused import Grid
from cachequant.kernels.reference import Geometry
from cachequant.types import WeightGrid

LOW, HIGH = -128, 127
"""What an int8 weight can be."""


@functools.cache
def unavailable() -> str | None:
    """Why this machine cannot run INT8 layers exactly and fast; None where it can."""
    if not hasattr(torch.ops.onednn, "qconv_prepack") or not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN's int8 operators"
    if platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_vnni_supported():
        return "this processor has no VNNI instructions: int8 would be no faster than float32"
    return _probe()


def _probe() -> str | None:
    """Run one saturating convolution and product and compare exactly: old processors overflow, other builds lack operators."""
    x = torch.full((1, 32, 2, 2), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    grid = WeightGrid(torch.full((16, 32, 1, 1), 255, dtype=torch.uint8), torch.ones(16), torch.full((16,), 128.0), 8)
    flat = WeightGrid(grid.values[:, :, 0, 0], grid.scale, grid.zero_point, 8)
    strided = Geometry(True, stride=(2, 2))  # a 1×1 convolution that is not a matrix product
    try:
        found = PackedWeight.of(grid, strided)(x, Grid(1.0, 0, 8), grid.scale)
        product = PackedWeight.of(flat, Geometry(False))(x[:, :, 0, 0].contiguous(), Grid(1.0, 0, 8), grid.scale)
    except (RuntimeError, NotImplementedError) as error:
        return f"oneDNN's int8 operators do not run here ({str(error).splitlines()[0][:100]})"
    exact = 255.0 * 127.0 * 32.0
    if not (found == exact).all() or not (product == exact).all():
        return "oneDNN's int8 operators are not exact on this processor"
    return None


def unsupported(weights: tuple[WeightGrid, ...], geometry: Geometry) -> str | None:
    """Why a layer cannot run in INT8 here; None where it can."""
    if geometry.groups != 1:
        return f"{geometry.groups} groups"
    if geometry.is_conv and isinstance(geometry.padding, str) and _paddings(geometry, weights[0]) is None:
        return f"padding {geometry.padding!r} of an even kernel"
    return None


def _paddings(geometry: Geometry, weight: WeightGrid) -> list[int] | None:
    """Numeric padding; None where it is not symmetric."""
    if not isinstance(geometry.padding, str):
        return list(geometry.padding)
    if geometry.padding == "valid":
        return [0, 0]
    spans = [d * (k - 1) for d, k in zip(geometry.dilation, weight.values.shape[2:], strict=True)]
    return [s // 2 for s in spans] if all(s % 2 == 0 for s in spans) else None


@dataclass(frozen=True)
class PackedWeight:
    """Integer weights of one segment in oneDNN's layout; a 1×1 convolution is packed as a matrix over pixels.

    The plan's weights q - z lie in [-255, 255]. Where they all fit int8 they are used as they are; else each channel is
    moved by the smallest offset o that makes it fit, w = w' + o, and o·Σx, one more product with a single output channel of
    ones, is added: exact, whatever the zero point is.

    Attributes:
        packed: w' [O, I, ...].
        none: [O] zeros, the zero points of w'.
        geometry: of the layer.
        padding: of a convolution that stays one, None for a matrix.
        offset: [O] o, or None where all are 0.
        ones: packed weights of ones [1, I, ...] beside an offset.
    """

    packed: Tensor
    none: Tensor
    geometry: Geometry
    padding: list[int] | None
    offset: Tensor | None
    ones: Tensor | None

    @staticmethod
    def of(grid: WeightGrid, geometry: Geometry) -> PackedWeight:
        """Pack the weights of a supported layer."""
        rows = grid.values.flatten(1).to(torch.int16) - grid.zero_point.to(torch.int16)[:, None]  # [O, n]
        low, high = rows.amin(1), rows.amax(1)
        offset = (high - HIGH).clamp(min=0) + (low - LOW).clamp(max=0)  # [O]; a range of 255 leaves at most one of them
        values = (rows - offset[:, None]).to(torch.int8).view(grid.values.shape)
        padding = _paddings(geometry, grid) if geometry.is_conv else None
        if geometry.is_conv and values[0, 0].numel() == 1 and geometry.stride == (1, 1) and padding == [0, 0]:
            values, padding = values.flatten(1), None
        moved = bool(offset.any())
        return PackedWeight(
            _pack(values, geometry, padding),
            torch.zeros(len(values), dtype=torch.int32),
            geometry,
            padding,
            offset.float() if moved else None,
            _pack(torch.ones_like(values[:1]), geometry, padding) if moved else None,
        )

    def __call__(
        self,
        x: Tensor,
        grid: Grid,
        scale: Tensor,
        bias: Tensor | None = None,
        plus: Tensor | None = None,
        reuse: bool = False,
    ) -> Tensor:
        """scale[o]·grid.scale·Σ (x - z)·w + bias (+ plus).

        Args:
            x: uint8 [B, I, H, W] in channels-last memory, or [..., I].
            grid: of x.
            scale: [O] factor of each channel beside the grid's.
            bias: [O] or None.
            plus: float32 of the output's shape and memory order, added; left as it is unless `reuse`.
            reuse: `plus` may be overwritten with the result.

        Returns:
            float32 [B, O, H', W'] in channels-last memory, or [..., O].
        """
        if self.padding is not None:
            y = self._conv(self.packed, self.none, x, grid, scale, bias)
            if self.offset is not None and self.ones is not None:
                total = self._conv(self.ones, self.none[:1], x, grid, torch.ones(1), None)  # [B, 1, H', W']
                y.addcmul_(total, (self.offset * scale).view(-1, 1, 1))
            return y if plus is None else y.add_(plus)
        rows = _rows(x, self.geometry)  # [R, I]
        other = None if plus is None else _rows(plus, self.geometry)
        if self.offset is not None and self.ones is not None:
            total = self._linear(self.ones, self.none[:1], rows, grid, torch.ones(1), None, None, False)  # [R, 1]
            column = self.offset * scale
            other, reuse = total * column if other is None else torch.addcmul(other, total, column), True
        y = self._linear(self.packed, self.none, rows, grid, scale, bias, other, reuse)  # [R, O]
        if not self.geometry.is_conv:
            return y.view(*x.shape[:-1], y.shape[1])
        return y.view(x.shape[0], x.shape[2], x.shape[3], y.shape[1]).permute(0, 3, 1, 2)

    def _conv(
        self, weight: Tensor, none: Tensor, x: Tensor, grid: Grid, scale: Tensor, bias: Tensor | None
    ) -> Tensor:
        """torch's operator has a fused sum for convolutions too, but copies its result: an add in place is faster."""
        assert self.padding is not None
        place = (list(self.geometry.stride), self.padding, list(self.geometry.dilation), 1)
        head = (x, grid.scale, grid.zero_point, weight, scale, none, bias)
        return torch.ops.onednn.qconv2d_pointwise(*head, *place, 1.0, 0, torch.float32, "none", [], "")

    @staticmethod
    def _linear(
        weight: Tensor, none: Tensor, x: Tensor, grid: Grid, scale: Tensor, bias: Tensor | None,
        other: Tensor | None, reuse: bool,
    ) -> Tensor:  # fmt: skip
        op, head = torch.ops.onednn.qlinear_pointwise, (x, grid.scale, grid.zero_point, weight, scale, none)
        if other is None:
            return op(*head, bias, 1.0, 0, torch.float32, "none", [], "")
        kind = "sum" if reuse else "add"
        return op.binary(*head, other, bias, 1.0, 0, torch.float32, 1.0, 0, kind, 1.0, "none", [], "")


def _rows(x: Tensor, geometry: Geometry) -> Tensor:
    """[B, C, H, W] or [..., C] -> [R, C]; a view where memory allows it."""
    return (x.permute(0, 2, 3, 1) if geometry.is_conv else x).reshape(-1, x.shape[1 if geometry.is_conv else -1])


def _pack(values: Tensor, geometry: Geometry, padding: list[int] | None) -> Tensor:
    """int8 [O, I, ...] in oneDNN's layout, ready for any input shape and zero point."""
    if padding is None:
        return torch.ops.onednn.qlinear_prepack(values, None)
    place = (list(geometry.stride), padding, list(geometry.dilation), 1)
    return torch.ops.onednn.qconv_prepack(values, torch.ones(len(values)), 1.0, 1, *place, None)
