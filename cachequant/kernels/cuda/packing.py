"""A plan's integer weights as the GPU's operators read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cachequant.kernels.reference import Geometry
from cachequant.types import WeightGrid


@dataclass(frozen=True)
class DeviceWeight:
    """Weights w = q - z - o of one segment, see `cachequant.kernels.cuda`.

    Attributes:
        values: int8 [N, K], or [N, R, S, C] of a convolution.
        scale: float32 [N] s_w.
        sums: float32 [N] Σ w + o·n, what the activation's zero is multiplied by.
        offset: float32 [N] o, or None where all are 0.
    """

    values: Tensor
    scale: Tensor
    sums: Tensor
    offset: Tensor | None

    @staticmethod
    def of(grid: WeightGrid, device: torch.device) -> DeviceWeight:
        """Move every channel by the smallest offset that makes its weights fit int8; a grid of 8 bits spans 256 integers."""
        rows = grid.values.flatten(1).to(torch.int16) - grid.zero_point.to(torch.int16)[:, None]  # [N, n]
        offset = (rows.amax(1) - 127).clamp(min=0) + (rows.amin(1) + 128).clamp(max=0)  # [N]
        values = (rows - offset[:, None]).to(torch.int8).view(grid.values.shape)
        if values.dim() == 4:
            values = values.permute(0, 2, 3, 1)  # [N, R, S, C]
        return DeviceWeight(
            values.contiguous().to(device),
            grid.scale.float().to(device),
            rows.long().sum(1).float().to(device),
            offset.float().to(device) if bool(offset.any()) else None,
        )


def unsupported(weights: tuple[WeightGrid, ...], activation_bits: tuple[int, ...], geometry: Geometry) -> str | None:
    """Why a layer cannot run in INT8 on a GPU; None where it can."""
    bits = max(*(w.bits for w in weights), *activation_bits)
    if bits > 8:
        return f"{bits} bits"
    if geometry.groups != 1:
        return f"{geometry.groups} groups"
    if any(d != 1 for d in geometry.dilation):
        return f"dilation {geometry.dilation}"
    return None
