"""Compiles every Triton kernel for a card that is not there: `python compile_triton.py 90`; prints one line per kernel.

The launchers run on CPU tensors with a stand-in driver that names the architecture, and every launch stops after ptxas.
"""

from __future__ import annotations

import itertools
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from cachequant.kernels.cuda import triton_feed_forward, triton_norm, triton_pointwise, triton_product, triton_steps


class Driver:
    """What Triton's compiler asks of a driver."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, _: int) -> None:
        pass

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_only(seen: dict[str, int]) -> None:
    """Make every launch end after the compilation."""
    original = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        seen[f"{self.__name__} {len(kernel.asm['cubin'])} B"] = seen.get(self.__name__, 0) + 1
        return kernel

    JITFunction.run = run


def compile_all() -> None:
    """Every kernel, in both floating types and with and without what can be fused."""
    grids = torch.zeros(2, 4)
    ints, weight = torch.zeros(64, 64, dtype=torch.int8), torch.zeros(64, 64, dtype=torch.int8)
    image, kernel = torch.zeros(1, 8, 8, 64, dtype=torch.int8), torch.zeros(64, 3, 3, 64, dtype=torch.int8)
    triton_pointwise.window_sum(image, (3, 3), (1, 1))
    for dtype in (torch.float16, torch.bfloat16):
        x, vector = torch.zeros(2, 64, 32, 64, dtype=dtype), torch.zeros(64, dtype=dtype)
        for upsample in (1, 2):
            triton_pointwise.quantize_image(x, grids[0], (1, 1, 1, 1), upsample)
        for size, halves, shift in itertools.product((8, 64), (1, 2), (False, True)):
            parts = [x[:, :size].contiguous()] * halves
            wide = vector.repeat(halves)
            add = torch.zeros(2, 64 * halves, dtype=dtype) if shift else None
            given = parts, add, wide, wide, 16, 1e-5, True, grids[:halves], (1, 1, 1, 1)
            triton_norm.group_norm(*given)
            triton_norm.group_norm(*given, grids[:halves])
        for last, other in itertools.product((False, True), (None, x)):
            order = torch.channels_last if last else torch.contiguous_format
            given = x.contiguous(memory_format=order)
            triton_steps.map_channels(given, other, torch.zeros(3, 3, 64), torch.zeros(1, dtype=torch.int64), 1)
        triton_norm.group_norm_float(x, vector, vector, 16, 1e-5)
        for affine, modulate in itertools.product((False, True), (False, True)):
            per_batch = torch.zeros(2, 64, dtype=dtype)
            triton_norm.layer_norm(
                x.view(2, -1, 64), *((vector, vector) if affine else (None, None)),
                *((per_batch, per_batch) if modulate else (None, None)), 1e-5, grids,
            )  # fmt: skip
    owner, columns = torch.zeros(64, dtype=torch.int32), [*torch.zeros(4, 64)]
    for maps in ([], [owner, owner, torch.zeros(3, 1, dtype=torch.int64), *torch.zeros(2, 64)]):
        triton_steps.load_step(
            torch.zeros(1, dtype=torch.int64), torch.zeros(3, 2, 4), torch.zeros(3, 2, 2), [owner, *columns], maps, grids,
            *torch.zeros(3, 64),
        )  # fmt: skip
    tokens, per_batch = torch.zeros(2, 32, 64, dtype=torch.float16), torch.zeros(2, 64, dtype=torch.float16)
    triton_pointwise.gated_sum(tokens, tokens, per_batch)
    triton_norm.layer_norm(tokens, None, None, per_batch, per_batch, 1e-5, grids, (tokens, per_batch))
    hidden, scale = torch.zeros(64, 32, dtype=torch.int8), torch.zeros(64)
    for blocks, gated, sums in itertools.product(triton_feed_forward.BLOCKS, (False, True), (False, True)):
        if sums and blocks != triton_feed_forward.BLOCKS[0]:
            continue
        rest = (scale, None, 0.0, scale, scale) if sums else (scale, None, 0.0, None, None)
        out = hidden if gated else ints
        operands = triton_product.Operands(scale, *rest)
        triton_feed_forward.activated(ints, weight, operands, grids[0], gated, not gated, out, blocks)
    for dtype, full, blocks in itertools.product(
        (torch.float16, torch.bfloat16, torch.int8), (False, True), triton_product.BLOCKS
    ):
        if dtype is not torch.float16 and blocks != triton_product.BLOCKS[0]:
            continue
        scale = torch.zeros(64)
        out = torch.zeros(64, 64, dtype=dtype)
        made = torch.zeros(1, 6, 6, 64, dtype=dtype)
        source = torch.float16 if dtype is torch.int8 else dtype
        for like, rows in ((out, (64,)), (made, (1, 6, 6))):
            extra = (scale, like.to(source), 1.0, torch.zeros(rows), scale) if full else (None, None, 1.0, None, None)
            operands = triton_product.Operands(scale, *extra)
            if like is out:
                triton_product.linear(ints, weight, operands, out, blocks)
            else:
                triton_product.conv2d(image, kernel, (1, 1), operands, made, blocks)


if __name__ == "__main__":
    driver.set_active(Driver(int(sys.argv[1])))
    counted: dict[str, int] = {}
    compile_only(counted)
    compile_all()
    print(f"triton {triton.__version__}, sm_{sys.argv[1]}: {len(counted)} kernels\n" + "\n".join(sorted(counted)))
