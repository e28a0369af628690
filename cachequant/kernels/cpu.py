"""INT8 on the CPU: oneDNN's convolution and matrix product through torch's own operators, Winograd's 3×3 convolution.

Activations are uint8 with the step's scale and zero point (arguments of each call), weights int8 per output channel, outputs
float32 with scale, bias and an optional sum in the epilogue. The numbers are those of `cachequant.kernels.reference`.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass

import torch
from torch import Tensor

from cachequant.kernels import winograd
from cachequant.kernels.fused import Grid, Sum, window_sums
from cachequant.kernels.reference import Geometry
from cachequant.kernels.winograd import WinogradWeight
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
    """Run one saturating convolution and product: old processors overflow, other builds lack the operators."""
    x = torch.full((1, 32, 2, 2), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    grid = WeightGrid(torch.full((16, 32, 1, 1), 255, dtype=torch.uint8), torch.ones(16), torch.full((16,), 128.0), 8)
    flat = WeightGrid(grid.values[:, :, 0, 0], grid.scale, grid.zero_point, 8)
    strided = Geometry(True, stride=(2, 2))  # a 1×1 convolution that is not a matrix product
    try:
        found = PackedWeight.of(grid, strided).convolve(x, Grid(1.0, 0, 8), grid.scale, None)
        product = PackedWeight.of(flat, Geometry(False)).multiply(x[:, :, 0, 0], Grid(1.0, 0, 8), grid.scale, None)
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
    if geometry.is_conv and _paddings(geometry, weights[0].values.shape[2:]) is None:
        return f"padding {geometry.padding!r} of an even kernel"
    return None


def _paddings(geometry: Geometry, kernel: tuple[int, ...]) -> list[int] | None:
    """Numeric padding; None where it is not symmetric."""
    if not isinstance(geometry.padding, str):
        return list(geometry.padding)
    if geometry.padding == "valid":
        return [0, 0]
    spans = [d * (k - 1) for d, k in zip(geometry.dilation, kernel, strict=True)]
    return [s // 2 for s in spans] if all(s % 2 == 0 for s in spans) else None


@dataclass(frozen=True)
class PackedWeight:
    """Integer weights of one segment in oneDNN's layout; a 1×1 convolution is packed as a matrix over pixels.

    The plan's weights q - z lie in [-255, 255]. Where they all fit int8 they are used as they are; else each channel is
    moved by the smallest offset o that makes it fit, w = w' + o. Then Σ x·w = Σ x·w' + o·Σx, and Σx is one number per
    output pixel: exact, whatever the zero point is, and an outer product that is added where the output is read.

    Attributes:
        packed: w' [O, I, ...].
        none: [O] zeros, the zero points of w'.
        geometry: of the layer.
        padding: of a convolution that stays one, None for a matrix.
        kernel: its height and width.
        offset: [O] o, or None where all are 0.
    """

    packed: Tensor
    none: Tensor
    geometry: Geometry
    padding: list[int] | None
    kernel: tuple[int, ...]
    offset: Tensor | None

    @staticmethod
    def of(grid: WeightGrid, geometry: Geometry) -> PackedWeight:
        """Pack the weights of a supported layer."""
        return PackedWeight.of_integers(*_moved(grid), geometry)

    @staticmethod
    def of_integers(values: Tensor, offset: Tensor | None, geometry: Geometry) -> PackedWeight:
        """From int8 [O, I, ...] w' and whole [O] o."""
        kernel = tuple(values.shape[2:])
        padding = _paddings(geometry, kernel) if geometry.is_conv else None
        if geometry.is_conv and kernel == (1, 1) and geometry.stride == (1, 1) and padding == [0, 0]:
            values, padding = values.flatten(1), None
        none = torch.zeros(len(values), dtype=torch.int32)
        packed = _pack(values, geometry, padding)
        return PackedWeight(packed, none, geometry, padding, kernel, None if offset is None else offset.float())

    @property
    def is_matrix(self) -> bool:
        """Whether `multiply` works on rows, and can add to its output."""
        return self.padding is None

    def output_size(self, height: int, width: int) -> tuple[int, ...]:
        """Height and width of the output of a convolution."""
        if self.padding is None:
            return height, width
        place = zip(
            (height, width), self.kernel, self.geometry.stride, self.padding, self.geometry.dilation, strict=True
        )
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in place)

    def convolve(self, x: Tensor, grid: Grid, scale: Tensor, bias: Tensor | None) -> Tensor:
        """scale[o]·grid.scale·Σ (x - z)·w' + bias of integers [B, I, H, W]: float32 [B, O, H', W'], both channels last.

        torch's operator has a fused sum too, but copies its result: whoever reads the output adds.
        """
        assert self.padding is not None
        place = (list(self.geometry.stride), self.padding, list(self.geometry.dilation), 1)
        head = (x, grid.scale, grid.zero_point, self.packed, scale, self.none, bias)
        return torch.ops.onednn.qconv2d_pointwise(*head, *place, 1.0, 0, torch.float32, "none", [], "")

    def multiply(
        self, x: Tensor, grid: Grid, scale: Tensor, bias: Tensor | None, plus: Tensor | None = None, reuse: bool = False
    ) -> Tensor:
        """scale[o]·grid.scale·(x - z)·w'ᵀ + bias (+ plus) of rows of integers [R, I]: float32 [R, O].

        Args:
            x: uint8 rows.
            grid: of x.
            scale: [O] factor of each channel beside the grid's.
            bias: [O] or None.
            plus: float32 [R, O] added.
            reuse: the result takes the memory of `plus`.
        """
        op, head = torch.ops.onednn.qlinear_pointwise, (x, grid.scale, grid.zero_point, self.packed, scale, self.none)
        if plus is not None and reuse:
            return op.binary(*head, plus, bias, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], "")
        out = op(*head, bias, 1.0, 0, torch.float32, "none", [], "")
        return out if plus is None else out.add_(plus)  # oneDNN's own "add" into new memory takes longer

    def sums(self, x: Tensor, grid: Grid) -> Tensor:
        """Σ (x - z) over everything that each output pixel or row reads: float32 [R]."""
        if self.padding is None:
            return window_sums(rows_of(x, self.geometry)[:, None, None], grid.zero_point, (1, 1, 1, 1, 0, 0, 1, 1))
        place = (*self.kernel, *self.geometry.stride, *self.padding, *self.geometry.dilation)
        return window_sums(x.permute(0, 2, 3, 1), grid.zero_point, place)


@dataclass(frozen=True)
class TiledWeight:
    """Integer weights of a 3×3 convolution that Winograd's algorithm multiplies; the interface is `PackedWeight`'s.

    Attributes:
        tiled: the weights.
        geometry: of the layer.
    """

    tiled: WinogradWeight
    geometry: Geometry
    offset = None
    """None is added outside: the weights' own is part of the product."""

    @functools.cached_property
    def direct(self) -> PackedWeight:
        """The same weights in oneDNN's layout, packed for the first image that is too small."""
        return PackedWeight.of_integers(*self.tiled.plain(), self.geometry)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output: the input's."""
        return height, width

    def convolve(self, x: Tensor, grid: Grid, scale: Tensor, bias: Tensor | None) -> Tensor:
        """scale[o]·grid.scale·Σ (x - z)·w + bias of integers [B, I, H, W]: float32 [B, O, H, W], both channels last."""
        if winograd.pays(x):
            return self.tiled.convolve(x, grid, scale, bias)
        out = self.direct.convolve(x, grid, scale, bias)
        if self.direct.offset is not None:
            columns = (self.direct.offset * scale * grid.scale)[None]  # [1, O]
            Sum((rows_of(out, self.geometry),), self.direct.sums(x, grid)[:, None], columns).settle()
        return out


def pack(grid: WeightGrid, geometry: Geometry) -> PackedWeight | TiledWeight:
    """Pack the weights of a supported layer for the fastest exact algorithm that is here."""
    values, offset = _moved(grid)
    kernel = tuple(values.shape[2:])
    padding = _paddings(geometry, kernel) if geometry.is_conv else None
    if padding is not None and winograd.unavailable() is None and winograd.fits(geometry, padding, values):
        return TiledWeight(WinogradWeight.of(values, offset), geometry)
    return PackedWeight.of_integers(values, offset, geometry)


def _moved(grid: WeightGrid) -> tuple[Tensor, Tensor | None]:
    """Weights w = q - z as int8 w' [O, I, ...] and whole [O] o: w = w' + o; None where all are 0."""
    zero, rows = grid.zero_point.to(torch.int32), grid.values.flatten(1)  # [O], [O, n]
    low, high = rows.amin(1) - zero, rows.amax(1) - zero
    offset = (high - HIGH).clamp(min=0) + (low - LOW).clamp(max=0)  # [O]; a range of 255 leaves at most one of them
    shift = (zero + offset).remainder(256).to(torch.uint8)
    values = (rows - shift[:, None]).view(torch.int8).view(grid.values.shape)  # bytes wrap, and the result fits
    return values, offset if offset.any() else None


def rows_of(x: Tensor, geometry: Geometry) -> Tensor:
    """[B, C, H, W] or [..., C] -> [R, C]; a view where memory is channels last."""
    return (x.permute(0, 2, 3, 1) if geometry.is_conv else x).reshape(-1, x.shape[1 if geometry.is_conv else -1])


def _pack(values: Tensor, geometry: Geometry, padding: list[int] | None) -> Tensor:
    """int8 [O, I, ...] in oneDNN's layout, ready for any input shape and zero point."""
    if padding is None:
        return torch.ops.onednn.qlinear_prepack(values, None)
    place = (list(geometry.stride), padding, list(geometry.dilation), 1)
    return torch.ops.onednn.qconv_prepack(values, torch.ones(len(values)), 1.0, 1, *place, None)
