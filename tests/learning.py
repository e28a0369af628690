"""A small convolution on two segments, with gradients on its 3-bit grids."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cachequant.quant.layers import quantize_weight
from cachequant.quant.learned import LearnedLayer, Rows
from cachequant.types import ActivationTable, LayerQuant

WIDTHS = (3, 2)


def table(scale: float, steps: int = 3) -> ActivationTable:
    return ActivationTable(
        torch.arange(0, 2 * steps, 2, dtype=torch.int32),
        scale * torch.linspace(1.0, 1.5, steps), torch.full((steps,), 128.0), 8,
    )  # fmt: skip


def convolution() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(5, 4, 3, padding=1).requires_grad_(False)


def state_of(source: nn.Conv2d, bits: int = 3) -> LayerQuant:
    grids = tuple(quantize_weight(w, bits, "minmax") for w in source.weight.split(WIDTHS, dim=1))
    return LayerQuant(grids, (table(0.02), table(0.03)), WIDTHS)


def inputs(count: int = 32) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(count, 1, 6, 6, generator=random) * torch.linspace(0.5, 1.5, 5).view(1, 5, 1, 1)  # channels alike
    return x + 0.2 * torch.randn(count, 5, 6, 6, generator=random), torch.arange(count) % 5


def learned_of(source: nn.Conv2d, state: LayerQuant, drop: float = 0.0) -> tuple[LearnedLayer, Rows]:
    rows = Rows()
    return LearnedLayer(source, state, rows, drop).eval(), rows
