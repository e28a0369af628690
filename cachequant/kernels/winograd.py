"""3×3 convolutions of 8-bit integers with a quarter of the products, exactly: Winograd's F(4×4, 3×3) in integers.

Four by four outputs need 144 products per pair of channels directly, and 36 as Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A (Winograd 1980;
Lavin and Gray 2016). In floating point that rounds. Here nothing does:

- Bᵀ is whole. G = D⁻¹G' with whole G' and D = diag(4, -6, -6, 24, 24, 1), so that 24·D⁻¹ is whole too. G' takes a weight
  of at most 255 to 49·255, Bᵀ an input of at most 128 to 100·128: both fit 16 bits, which processors with VNNI multiply
  half as fast as 8.
- Sums over channels and AᵀD⁻¹ may leave 32 bits, where they wrap. What comes out is 576·Y modulo 2³². Nine has an inverse
  there, which leaves 64·Y; so Y is known where |Y| < 2²⁵. Inputs are taken relative to 128, |Y| ≤ 128·Σ|w|, and channels
  are summed in slices short enough for that; whole slices are added up in 32 bits. Σ w·(x - z) = Y + (128 - z)·Σw.

So a quarter of the products at half the speed. Weights stay 8 bits in memory and are transformed where they are used, 64
output channels at a time for some hundred tiles: that costs as much as six tiles of 4×4 pixels, hence `FEWEST`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cachequant.kernels.fused import Grid
from cachequant.kernels.native import load_native
from cachequant.kernels.reference import Geometry

FEWEST = 24
"""Tiles from which on it is faster than oneDNN's direct convolution (measured on Zen 4)."""
WIDTH, LONGEST = 64, 512
"""Output channels of a block, and most input channels of a slice."""
LIMIT = 2**25
"""What |Y| must stay below."""
DEEPEST = 3584
"""Most input channels: 9·255·255 each, summed in 32 bits."""


@functools.cache
def unavailable() -> str | None:
    """Why direct convolutions are used throughout; None where this is faster."""
    reason = load_native()
    if reason is not None:
        return reason
    if not hasattr(torch.ops.cachequant, "winograd"):
        return "this processor has no AVX-512 with VNNI"
    return "this processor multiplies 8 bits in tiles (AMX)" if torch.cpu._is_amx_tile_supported() else None


def fits(geometry: Geometry, padding: list[int], weight: Tensor) -> bool:
    """Whether the weights [O, I, ...] are of a convolution that this computes: 3×3, stride 1, a border of 1."""
    place = (*weight.shape[2:], *geometry.stride, *geometry.dilation, *padding, geometry.groups)
    outer, inner = weight.shape[:2]
    return place == (3, 3, 1, 1, 1, 1, 1, 1, 1) and outer % 16 == 0 and inner % 32 == 0 and inner <= DEEPEST


def pays(x: Tensor) -> bool:
    """Whether images [B, C, H, W] have tiles enough."""
    return x.shape[0] * -(-x.shape[2] // 4) * -(-x.shape[3] // 4) >= FEWEST


@dataclass(frozen=True)
class WinogradWeight:
    """Weights w = w' + o of one segment, as the operator reads them; outputs are filled up to whole blocks with zeros.

    Attributes:
        values: int8 [O / 64, I, 9, 64] w', in the order of `interleaved`.
        offset: int16 [O / 64, 64] o in the same order, or None where all are 0.
        totals: int32 [O] Σw.
        slice: input channels that are summed before 576·Y is read.
        outputs: O.
    """

    values: Tensor
    offset: Tensor | None
    totals: Tensor
    slice: int
    outputs: int

    @staticmethod
    def of(values: Tensor, offset: Tensor | None) -> WinogradWeight:
        """From int8 [O, I, 3, 3] w' and whole [O] o; a block at a time, so that little is made beside the result."""
        outer, inner = values.shape[:2]
        blocks, place = -(-outer // WIDTH), torch.argsort(interleaved())
        packed = values.new_zeros(blocks, inner, 9, WIDTH)
        totals, sizes = torch.empty(outer, dtype=torch.int32), torch.empty(outer, inner, dtype=torch.int32)
        for i, part in enumerate(values.split(WIDTH)):
            rows = slice(i * WIDTH, i * WIDTH + len(part))
            packed[i][:, :, place[: len(part)]] = part.flatten(2).permute(1, 2, 0)  # [I, 9, 64]
            whole = part.short() if offset is None else part + offset[rows].short().view(-1, 1, 1, 1)
            totals[rows] = whole.sum((1, 2, 3), dtype=torch.int32)
            sizes[rows] = whole.abs_().sum((2, 3), dtype=torch.int32)
        moved = None if offset is None else _blocks(offset.short())[:, interleaved()]
        return WinogradWeight(packed, moved, totals, longest_slice(sizes), outer)

    def plain(self) -> tuple[Tensor, Tensor | None]:
        """What `of` was given: int8 [O, I, 3, 3] w' and [O] o."""
        blocks, inner = self.values.shape[:2]
        back = torch.argsort(interleaved())
        rows = self.values.permute(0, 3, 1, 2)[:, back].reshape(blocks * WIDTH, inner, 3, 3)
        offset = None if self.offset is None else self.offset[:, back].flatten()[: self.outputs]
        return rows[: self.outputs].contiguous(), offset

    def convolve(self, x: Tensor, grid: Grid, scale: Tensor, bias: Tensor | None) -> Tensor:
        """scale[o]·grid.scale·Σ (x - z)·w + bias of uint8 [B, I, H, W] -> float32 [B, O, H, W], both channels last."""
        head, weights = (x.permute(0, 2, 3, 1), grid.scale, grid.zero_point), (self.values, self.offset, self.totals)
        return torch.ops.cachequant.winograd(*head, *weights, scale, bias, self.slice).permute(0, 3, 1, 2)


def _blocks(channels: Tensor) -> Tensor:
    """[O] -> [O / 64, 64], filled up with zeros."""
    return F.pad(channels, (0, -len(channels) % WIDTH)).view(-1, WIDTH)


def interleaved() -> Tensor:
    """Position -> output channel of a block: interleaving the halves of 128 bits puts channels in order."""
    position = torch.arange(WIDTH)
    half, lane = position // 32, position % 32
    return (2 * half + lane % 8 // 4) * 16 + lane // 8 * 4 + lane % 4


def longest_slice(sizes: Tensor) -> int:
    """Most input channels, of LONGEST halved, of which every slice has 128·Σ|w| < 2²⁵, from Σ|w| [O, I] over the window.

    32 always are: 32·9·255·128 < 2²⁵.
    """
    size = LONGEST
    while size > 32 and max(int(part.sum(1).max()) for part in sizes.split(size, dim=1)) * 128 >= LIMIT:
        size //= 2
    return size
