"""The compiled kernels: one source file and one tile shape each, and what they can run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

ALIGNMENT = 16
"""Bytes of the copies of compiled kernels: input channels are multiples of 16, outputs of 16 / bytes per element."""

DTYPES: dict[torch.dtype, tuple[str, str]] = {
    torch.float16: ("f16", "cutlass::half_t"),
    torch.bfloat16: ("bf16", "cutlass::bfloat16_t"),
    torch.int8: ("s8", "int8_t"),
}
"""Output type -> (short name, C++ name)."""


@dataclass(frozen=True)
class Variant:
    """One kernel, one shared library.

    Attributes:
        operation: "linear" or "conv2d".
        arch: 90 for wgmma and TMA, which run on compute capability 9.0 only; 80 for mma.sync, from 8.0 on.
        tile: rows, output channels and input channels of a tile.
        dtype: of the output.
        extra: further macros.
        activation: "gelu_tanh", with an int8 output on a grid of its own, or None.
    """

    operation: str
    arch: int
    tile: tuple[int, int, int]
    dtype: torch.dtype = torch.float16
    extra: tuple[tuple[str, int], ...] = field(default=())
    activation: str | None = None

    @property
    def name(self) -> str:
        """Unique, and a file name."""
        rest = "".join(f"_{key.lower()}{value}" for key, value in self.extra)
        rest += "" if self.activation is None else f"_{self.activation}"
        return f"{self.operation}_sm{self.arch}_{'x'.join(map(str, self.tile))}{rest}_{DTYPES[self.dtype][0]}"

    @property
    def source(self) -> str:
        """File in `csrc`."""
        return f"{'gemm' if self.operation == 'linear' else 'conv'}_sm{self.arch}.cu"

    @property
    def macros(self) -> tuple[str, ...]:
        """What the source is compiled with."""
        tile = [f"-DCQ_TILE_{axis}={size}" for axis, size in zip("MNK", self.tile, strict=True)]
        end = () if self.activation is None else (f"-DCQ_{self.activation.upper()}",)
        return (*tile, f"-DCQ_OUT={DTYPES[self.dtype][1]}", *(f"-DCQ_{key}={value}" for key, value in self.extra), *end)

    @property
    def target(self) -> str:
        """nvcc's code generation; the older kernels carry PTX, so that newer cards run them too."""
        if self.arch == 90:
            return "-gencode=arch=compute_90a,code=sm_90a"
        return "-gencode=arch=compute_80,code=[sm_80,compute_80]"

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a card of this compute capability runs it."""
        return capability == (9, 0) if self.arch == 90 else capability >= (8, 0)

    def unsupported(self, channels: int, outputs: int, has_row_sum: bool) -> str | None:
        """Why it cannot run a layer of these channels; None where it can."""
        step = ALIGNMENT // self.dtype.itemsize
        if channels % ALIGNMENT:
            return f"{channels} input channels, no multiple of {ALIGNMENT}"
        if outputs % step:
            return f"{outputs} output channels, no multiple of {step}"
        if has_row_sum and self.operation == "conv2d" and self.arch == 80:
            return "asymmetric weights"
        return None


def _gemm90(tile: tuple[int, int, int], cluster: int, cooperative: int, dtype: torch.dtype = torch.float16) -> Variant:
    return Variant("linear", 90, tile, dtype, (("CLUSTER_M", cluster), ("COOPERATIVE", cooperative)))


def _gelu90(tile: tuple[int, int, int], cluster: int, cooperative: int) -> Variant:
    plain = _gemm90(tile, cluster, cooperative, torch.int8)
    return replace(plain, activation="gelu_tanh")


def _conv90(tile: tuple[int, int, int], cluster: int = 1, dtype: torch.dtype = torch.float16) -> Variant:
    return Variant("conv2d", 90, tile, dtype, (("CLUSTER_M", cluster),))


def _sm80(operation: str, tile: tuple[int, int, int], stages: int, dtype: torch.dtype = torch.float16) -> Variant:
    return Variant(operation, 80, tile, dtype, (("STAGES", stages),))


VARIANTS: tuple[Variant, ...] = (
    _gemm90((128, 128, 128), 2, 0),
    _gemm90((64, 128, 128), 1, 0),
    _gemm90((64, 64, 128), 1, 0),
    _gemm90((128, 256, 128), 1, 1),
    _gemm90((128, 128, 128), 1, 1),
    _gemm90((128, 96, 128), 1, 0),
    _gemm90((128, 96, 128), 2, 0),
    _gemm90((128, 160, 128), 2, 0),
    _gelu90((128, 128, 128), 2, 0),
    _gelu90((128, 256, 128), 1, 1),
    _gelu90((64, 128, 128), 1, 0),
    _conv90((128, 128, 64)),
    _conv90((64, 160, 64)),
    _conv90((64, 128, 128)),
    _conv90((128, 128, 128)),
    _conv90((64, 64, 128)),
    _conv90((128, 160, 64)),
    _conv90((128, 160, 64), 2),
    _conv90((128, 160, 128), 2),
    _conv90((64, 160, 128)),
    _conv90((64, 160, 128), 2),
    _conv90((64, 80, 128)),
    _conv90((64, 32, 128)),
    _conv90((64, 192, 64)),
    _conv90((128, 192, 64)),
    _conv90((64, 96, 64)),
    _gemm90((128, 128, 128), 2, 0, torch.int8),
    _gemm90((64, 128, 128), 1, 0, torch.int8),
    _gemm90((128, 128, 128), 2, 0, torch.bfloat16),
    _gemm90((64, 128, 128), 1, 0, torch.bfloat16),
    _conv90((128, 128, 64), dtype=torch.bfloat16),
    _conv90((64, 128, 128), dtype=torch.bfloat16),
    _sm80("linear", (128, 128, 64), 4),
    _sm80("linear", (64, 64, 64), 5),
    _sm80("conv2d", (128, 128, 64), 4),
    _sm80("conv2d", (64, 64, 64), 5),
    _sm80("linear", (128, 128, 64), 4, torch.bfloat16),
    _sm80("conv2d", (128, 128, 64), 4, torch.bfloat16),
    _sm80("linear", (128, 128, 64), 4, torch.int8),
)
"""All of them. A multiprocessor takes in 64 bytes a clock, so a tile is as good as its operations per byte, as long as there
are tiles for all 132: 128×160 for large images, 128×96 where it fills the last wave better, clusters that share the weights,
narrow tiles for small images. Two sizes serve older cards. No convolution ends in int8, no kernel for older cards in GELU,
and none at all in GEGLU: Triton runs these, see `cachequant.kernels.cuda`."""


def variants_for(capability: tuple[int, int]) -> tuple[Variant, ...]:
    """What is worth having on a card: its own kernels, without the older ones where there are newer."""
    newest = 90 if capability == (9, 0) else 80
    return tuple(v for v in VARIANTS if v.arch == newest and v.runs_on(capability))
