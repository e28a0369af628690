"""Triton: the first half of a feed-forward layer in one kernel, product, activation and quantisation.

The wide hidden state never leaves the multiprocessor. In Stable Diffusion's largest blocks it is 42 MB that would be written
and read again, more time than the product itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cachequant.kernels.cuda.triton_pointwise import normal_cdf, round_to_grid
from cachequant.kernels.cuda.triton_product import Blocks, Operands, rescaled, tile_of

BLOCKS = (
    Blocks(128, 64, 64, 4, 4),
    Blocks(128, 64, 64, 8, 4),
    Blocks(64, 64, 64, 4, 5),
    Blocks(128, 64, 128, 8, 3),
    Blocks(128, 128, 64, 8, 3),
    Blocks(64, 64, 128, 4, 4),
    Blocks(64, 128, 64, 8, 4),
    Blocks(64, 32, 128, 4, 4),
    Blocks(128, 128, 128, 8, 3),
    Blocks(128, 256, 64, 8, 3),
    Blocks(128, 256, 128, 8, 3),
    Blocks(256, 128, 64, 8, 3),
)
"""What the autotune chooses from; a gated activation has two accumulators of this size."""


def shared_bytes(blocks: Blocks, gated: bool) -> int:
    """Shared memory of a tile's pipeline: its rows of the input, and of the weights once or, with gates, twice."""
    return blocks.stages * blocks.k * (blocks.m + (2 if gated else 1) * blocks.n)


@triton.jit(do_not_specialize=["m"])
def _activated_kernel(
    x, weight, scale, shift, row_sum, offset, grid, out, m, n, k,
    gated: tl.constexpr, tanh: tl.constexpr, has_shift: tl.constexpr, has_offset: tl.constexpr,
    block_m: tl.constexpr, block_n: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """One tile of the hidden state: its values (and its gates, whose weights lie n rows further), then the integers."""
    tile_m, tile_n = tile_of(m, n, block_m, block_n)
    row = tile_m * block_m + tl.arange(0, block_m)
    column = tile_n * block_n + tl.arange(0, block_n)
    valid, wide = row < m, column < n
    total = tl.zeros([block_m, block_n], dtype=tl.int32)
    gates = tl.zeros([block_m, block_n], dtype=tl.int32)
    for start in range(0, k, block_k):
        inner = start + tl.arange(0, block_k)
        a = tl.load(x + row.to(tl.int64)[:, None] * k + inner[None, :], valid[:, None] & (inner < k)[None, :], other=0)
        read = wide[None, :] & (inner < k)[:, None]
        b = tl.load(weight + column.to(tl.int64)[None, :] * k + inner[:, None], read, other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
        if gated:
            b = tl.load(weight + (column + n).to(tl.int64)[None, :] * k + inner[:, None], read, other=0)
            gates = tl.dot(a, b, gates, out_dtype=tl.int32)
    y = rescaled(total, scale, shift, row_sum, offset, row, column, valid, wide, has_shift, has_offset)
    z = y
    if gated:
        z = rescaled(gates, scale, shift, row_sum, offset, row, column + n, valid, wide, has_shift, has_offset)
    # with tanh: ½(1 + tanh u) = sigmoid(2u)
    half = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z)) if tanh else normal_cdf(z)
    y = y * half * z if gated else y * half
    at = row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(out + at, round_to_grid(y, grid), valid[:, None] & wide[None, :])


def activated(
    x: Tensor, weight: Tensor, operands: Operands, grid: Tensor, gated: bool, tanh: bool, out: Tensor, blocks: Blocks
) -> None:
    """See `cachequant.kernels.cuda.reference.activated`; everything contiguous, operands without a source."""
    (m, k), n = x.shape, out.shape[1]
    scale, shift, _, _, row_sum, offset = operands.arguments()
    flags = operands.flags(torch.int8)
    _activated_kernel[(triton.cdiv(m, blocks.m) * triton.cdiv(n, blocks.n),)](
        x, weight, scale, shift, row_sum, offset, grid, out, m, n, k, gated=gated, tanh=tanh,
        has_shift=flags["has_shift"], has_offset=flags["has_offset"],
        block_m=blocks.m, block_n=blocks.n, block_k=blocks.k, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
