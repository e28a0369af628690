"""The reference backend: integer arithmetic simulated with floating-point integers.

Operands are at most 255 in magnitude, so they are exact even in TF32; products accumulate in float32. Every other backend
is tested against these functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

Pad = tuple[int, int, int, int]
"""Border of an image: left, right, top, bottom."""


@dataclass(frozen=True)
class Geometry:
    """How an operand meets its weights: a convolution's strides and paddings, or a linear layer (`is_conv` False)."""

    is_conv: bool
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] | str = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @staticmethod
    def of(layer: nn.Conv2d | nn.Linear) -> Geometry:
        """The geometry of an existing layer.

        Raises:
            ValueError: it pads with anything but zeros.
        """
        if isinstance(layer, nn.Linear):
            return Geometry(is_conv=False)
        if layer.padding_mode != "zeros":
            raise ValueError(f"padding_mode is {layer.padding_mode!r}, expected zeros: leave this layer unquantised")
        return Geometry(True, layer.stride, layer.padding, layer.dilation, layer.groups)

    @property
    def channel_dim(self) -> int:
        """Where the output channels are: 1 for [B, C, H, W], -1 for [..., C]."""
        return 1 if self.is_conv else -1

    def border(self, window: tuple[int, int]) -> Pad:
        """The border that a convolution puts around its input; `window`: rows and columns that one output pixel spans."""
        if isinstance(self.padding, str):
            if self.padding == "valid":
                return 0, 0, 0, 0
            height, width = (size - 1 for size in window)  # "same": the odd pixel at the end, as torch does
            return width // 2, width - width // 2, height // 2, height - height // 2
        height, width = self.padding
        return width, width, height, height


def product(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The layer without bias: conv2d [B, I, H, W] × [O, I, kh, kw], or linear [..., I] × [O, I]."""
    if geometry.is_conv:
        return F.conv2d(x, weight, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    return F.linear(x, weight)


def centred_integers(x: Tensor, scale: float, zero_point: float, bits: int) -> Tensor:
    """q - z for the grid (scale, zero_point): integers in floating point, 0 stands for 0 so padding is exact."""
    levels = 2**bits - 1
    return (x * (1.0 / scale)).round_().clamp_(-zero_point, levels - zero_point)


def epilogue(integers: Tensor, scale: Tensor, shift: Tensor | None, channel_dim: int) -> Tensor:
    """scale[c]·p + shift[c], the only floating-point work behind an integer product."""
    shape = [1] * integers.dim()
    shape[channel_dim] = -1
    if shift is None:
        return integers * scale.view(shape)
    return (integers * scale.view(shape)).add_(shift.view(shape))
