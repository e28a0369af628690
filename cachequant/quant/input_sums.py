"""Second moments of what a layer multiplies: the statistics that closed-form rounding needs, streamed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cachequant.kernels.reference import Geometry
from cachequant.quant.halves import even_and_odd

ROWS = 4
"""Input rows per column of the second moment that are looked at, over all calls together."""


FLUSH = 256
"""Rows that are added at once."""


class InputSums:
    """E[x xᵀ] of a layer's input rows x: a window [I·kh·kw] of a convolution, a token [I] of a linear layer.

    Even and odd samples go into sums of their own, so that what follows from one half can be judged on the other. Memory is
    2·n² numbers, however much is seen. Of each call a share of the rows, drawn at random, is taken.

    Args:
        weight: of the layer, [O, I, kh, kw] or [O, I].
        geometry: of the layer.
        calls: how many calls there will be.
    """

    def __init__(self, weight: Tensor, geometry: Geometry, calls: int) -> None:
        self.geometry = geometry
        self.window = (int(weight.shape[2]), int(weight.shape[3])) if geometry.is_conv else (1, 1)
        self.columns = weight[0].numel()
        self._share = -(-ROWS * self.columns // (2 * calls))  # of each half
        self._sums, self._rows = torch.zeros(2, self.columns, self.columns, device=weight.device), [0, 0]
        self._waiting: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._random = torch.Generator().manual_seed(0)

    def update(self, x: Tensor, samples: int | None = None, first: int = 0) -> None:
        """Add one call's input, [B, I, H, W] or [B, ..., I]; `samples` and `first` are those of `even_and_odd`."""
        for half, places in enumerate(even_and_odd(len(x), samples, first=first)):
            if not len(places):
                continue
            part = x[places.to(x.device)].detach().float()
            rows = self._windows(part) if self.geometry.is_conv else self._some(part.flatten(0, -2))
            self._waiting[half].append(rows)
            self._rows[half] += len(rows)
            if sum(map(len, self._waiting[half])) >= FLUSH:
                self._flush(half)

    @property
    def moment(self) -> Tensor:
        """E[x xᵀ] [n, n] over all samples; zero where nothing was seen."""
        self._flush(0)
        self._flush(1)
        return self._sums.sum(0) / max(1, sum(self._rows))

    @property
    def halves(self) -> tuple[Tensor, Tensor] | None:
        """E[x xᵀ] [n, n] of the even and of the odd samples; None where there was no second sample."""
        self._flush(0)
        self._flush(1)
        return (self._sums[0] / self._rows[0], self._sums[1] / self._rows[1]) if all(self._rows) else None

    def _flush(self, half: int) -> None:
        """Add what waits: a product of many rows costs hardly more than one of few, whose time goes into n² sums."""
        if self._waiting[half]:
            rows = torch.cat(self._waiting[half])
            self._sums[half].addmm_(rows.T, rows)
            self._waiting[half].clear()

    def _some(self, rows: Tensor) -> Tensor:
        """At most a share of rows [r, n]."""
        return rows if len(rows) <= self._share else rows[self._chosen(len(rows)).to(rows.device)]

    def _chosen(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self._random)[: self._share]

    def _windows(self, x: Tensor) -> Tensor:
        """Windows of the input at some output pixels, columns in the order of the weight's: [r, I·kh·kw]."""
        (height, width), stride, dilation = self.window, self.geometry.stride, self.geometry.dilation
        padded = F.pad(x, self.geometry.border((dilation[0] * (height - 1) + 1, dilation[1] * (width - 1) + 1)))
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
