"""Number formats beside the uniform grid, simulated: a codebook of values, a scale, and the nearest value of each number."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cachequant.quant.affine import SHRINK_RATIOS
from cachequant.types import LayerQuant, WeightGrid


@functools.cache
def codebook(name: str, bits: int) -> Tensor:
    """The values of a format, rising, the largest magnitude 1: [K], K at most 2^bits.

    fp8: E4M3 without infinities (Micikevicius et al., FP8 formats for deep learning, 2022), 253 finite values.
    log2: 0 and ±2^-k, k from 0 to 2^(bits-1) - 2 (Miyashita et al., 2016, with a sign).
    """
    if name == "fp8":
        values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        values = values[values.isfinite()].unique()  # +0 and -0 are one
        return values / values.max()
    if name == "log2":
        powers = 0.5 ** torch.arange(2 ** (bits - 1) - 1, dtype=torch.float64)
        return torch.cat([-powers, torch.zeros(1), powers]).unique().float()
    raise ValueError(f"{name!r} has no codebook")


def encode(x: Tensor, book: Tensor) -> Tensor:
    """Index of the nearest value of a codebook [K], of two equally near ones the lower: integers of the shape of x."""
    return torch.bucketize(x.contiguous(), (book[1:] + book[:-1]) / 2)


def nearest(x: Tensor, name: str, bits: int) -> Tensor:
    """The nearest value of the format, in units of its scale."""
    book = codebook(name, bits).to(x.device)
    return book[encode(x, book)].to(x.dtype)


def search_scale(x: Tensor, name: str, bits: int, method: str, power: float = 2.4) -> Tensor:
    """The scale of each row [R, n]: its largest magnitude, with "mse" shrunk as by `cachequant.quant.affine.search_grid`."""
    largest = x.abs().amax(1)  # [R]
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    if method != "mse":
        return largest
    scales = [ratio * largest for ratio in SHRINK_RATIOS]
    errors = [
        (nearest(x / scale[:, None], name, bits) * scale[:, None] - x).abs().pow(power).mean(1) for scale in scales
    ]
    best = torch.stack(errors).argmin(0)  # [R]
    return torch.stack(scales).gather(0, best[None])[0]


def quantize_to_format(weight: Tensor, name: str, bits: int, search: str) -> WeightGrid:
    """A weight [O, I, ...] as indices into the format's codebook, with a scale per output channel."""
    rows = weight.detach().float().flatten(1)
    scale = search_scale(rows, name, bits, search)
    codes = encode(rows / scale[:, None], codebook(name, bits).to(rows.device)).to(torch.uint8)
    return WeightGrid(codes.view(weight.shape), scale, torch.zeros_like(scale), bits, name)


def centred_weight(grid: WeightGrid, device: torch.device) -> Tensor:
    """Weights in units of their scale, 0 being 0: [O, I, ...] float."""
    values = grid.values.to(device)
    if grid.format != "int":
        return codebook(grid.format, grid.bits).to(device)[values.long()]
    return values.float() - grid.zero_point.to(device).view(-1, *[1] * (values.dim() - 1))


def only_simulated(layer: LayerQuant) -> str | None:
    """Why a layer cannot run on integers whatever the backend; None where it can."""
    kinds = [grid.format for grid in layer.weights] + [table.format for table in layer.inputs]
    found = next((kind for kind in kinds if kind != "int"), None)
    return None if found is None else f"{found} is simulated only, integer backends run int8 and int4"
