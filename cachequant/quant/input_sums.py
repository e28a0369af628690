"""Second moments of what a layer multiplies: the statistics that closed-form rounding needs, streamed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cachequant.kernels.cuda.packing import padding_of
from cachequant.kernels.reference import Geometry

ROWS = 4
"""Input rows per column of the second moment that are looked at, over all calls together."""


class InputSums:
    """E[x xᵀ] of a layer's input rows x: a window [I·kh·kw] of a convolution, a token [I] of a linear layer.

    Memory is n² numbers, however much is seen. Of each call a share of the rows, drawn at random, is taken.

    Args:
        weight: of the layer, [O, I, kh, kw] or [O, I].
        geometry: of the layer.
        calls: how many calls there will be.
    """

    def __init__(self, weight: Tensor, geometry: Geometry, calls: int) -> None:
        self.geometry, self.window = geometry, (int(weight.shape[2]), int(weight.shape[3])) if geometry.is_conv else (1, 1)
        self.columns = weight[0].numel()
        self._share = -(-ROWS * self.columns // calls)
        self._sum, self._rows = torch.zeros(self.columns, self.columns, device=weight.device), 0
        self._random = torch.Generator().manual_seed(0)

    def update(self, x: Tensor) -> None:
        """Add one call's input, [B, I, H, W] or [..., I]."""
        rows = self._windows(x.detach()) if self.geometry.is_conv else self._some(x.detach().flatten(0, -2))
        self._sum.addmm_(rows.T.float(), rows.float())
        self._rows += len(rows)

    @property
    def moment(self) -> Tensor:
        """E[x xᵀ] [n, n]; zero where nothing was seen."""
        return self._sum / max(1, self._rows)

    def _some(self, rows: Tensor) -> Tensor:
        """At most a share of rows [r, n]."""
        return rows if len(rows) <= self._share else rows[self._chosen(len(rows)).to(rows.device)]

    def _chosen(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self._random)[: self._share]

    def _windows(self, x: Tensor) -> Tensor:
        """Windows of the input at some output pixels, columns in the order of the weight's: [r, I·kh·kw]."""
        (height, width), stride, dilation = self.window, self.geometry.stride, self.geometry.dilation
        padded = F.pad(x, padding_of(self.geometry, (dilation[0] * (height - 1) + 1, dilation[1] * (width - 1) + 1)))
        tall, wide = (
            (size - d * (k - 1) - 1) // s + 1
            for size, d, k, s in zip(padded.shape[2:], dilation, self.window, stride, strict=True)
        )
        chosen = self._chosen(len(x) * tall * wide).to(x.device)
        batch, row, column = chosen // (tall * wide), chosen // wide % tall * stride[0], chosen % wide * stride[1]
        taken = [
            padded[batch, :, row + i * dilation[0], column + j * dilation[1]]  # [r, I]
            for i in range(height)
            for j in range(width)
        ]
        return torch.stack(taken, dim=2).flatten(1)
