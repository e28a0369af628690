"""Runs a product or convolution on the fastest kernel that supports it: compiled if it is built, else Triton.

A kernel that fails for a shape is left out; where all do, plain torch computes it (`cachequant.report` names both).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cachequant.kernels.cuda import library, plain, reference
from cachequant.kernels.cuda.build import library_path
from cachequant.kernels.cuda.tuning import REFERENCE, Result, TuningTable
from cachequant.kernels.cuda.variants import VARIANTS, Variant, variants_for

if TYPE_CHECKING:
    from cachequant.kernels.cuda.triton_product import Blocks

TRITON = "triton_"
"""Prefix of a Triton kernel's name; its blocks follow."""

SHARED_MEMORY = {(8, 0): 163 << 10, (8, 6): 99 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}
"""Compute capability -> bytes of shared memory that a program can have (CUDA C++ programming guide)."""

ATTENTION_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""Torch's implementations of attention."""


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@cache
def built(capability: tuple[int, int]) -> tuple[Variant, ...]:
    """The compiled kernels of a card that are in the cache folder."""
    return tuple(v for v in variants_for(capability) if library_path(v).is_file())


@cache
def table(device: torch.device) -> TuningTable:
    """The card's tuning table."""
    return TuningTable.of(device)


def candidates(
    capability: tuple[int, int], operation: str, channels: int, outputs: int, dtype: torch.dtype, has_row_sum: bool
) -> tuple[str, ...]:
    """Names of the kernels that support a layer, compiled ones first."""
    compiled = _compiled(capability, operation, channels, outputs, dtype, has_row_sum)
    if not has_triton():
        return compiled
    from cachequant.kernels.cuda.triton_product import BLOCKS

    return (*compiled, *(TRITON + "x".join(map(str, blocks)) for blocks in BLOCKS))


def _compiled(
    capability: tuple[int, int],
    operation: str,
    channels: int,
    outputs: int,
    dtype: torch.dtype,
    has_row_sum: bool,
    activation: str | None = None,
) -> tuple[str, ...]:
    """Names of the compiled kernels that support a layer and the activation behind it."""
    kind = _built(capability, operation, dtype, activation)
    return tuple(v.name for v in kind if v.unsupported(channels, outputs, has_row_sum) is None)


def _built(
    capability: tuple[int, int], operation: str, dtype: torch.dtype, activation: str | None = None
) -> tuple[Variant, ...]:
    """The compiled kernels of one kind that are in the cache folder."""
    wanted = (operation, dtype, activation)
    return tuple(v for v in built(capability) if (v.operation, v.dtype, v.activation) == wanted)


def not_compiled(
    capability: tuple[int, int], operation: str, channels: int, outputs: int, dtype: torch.dtype, has_row_sum: bool
) -> str | None:
    """Why no compiled kernel that is here takes a layer, so that Triton's slower one does; None where one does.

    None too where there is not one of its kind: `choose_backend` says that once, not for every layer.
    """
    reasons = [v.unsupported(channels, outputs, has_row_sum) for v in _built(capability, operation, dtype)]
    return reasons[0] if reasons and None not in reasons else None


def activated_candidates(
    capability: tuple[int, int], kind: str, channels: int, outputs: int, has_row_sum: bool
) -> tuple[str, ...]:
    """Names of the kernels that run a linear layer with an activation behind it, compiled ones first.

    Args:
        capability: of the card.
        kind: "geglu", "gelu" or "gelu_tanh".
        channels, outputs: of the layer; for "geglu" twice as many outputs as the result has.
        has_row_sum: whether its weights are asymmetric.
    """
    compiled = _compiled(capability, "linear", channels, outputs, torch.int8, has_row_sum, kind)
    if not has_triton():
        return compiled
    from cachequant.kernels.cuda.triton_feed_forward import BLOCKS, shared_bytes

    room = SHARED_MEMORY.get(capability, min(SHARED_MEMORY.values()))
    tiles = [blocks for blocks in BLOCKS if shared_bytes(blocks, kind == "geglu") <= room]
    return (*compiled, *(TRITON + "x".join(map(str, blocks)) for blocks in tiles))


def run_product(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    scale: Tensor,
    shift: Tensor | None,
    source: Tensor | None,
    beta: float,
    row_sum: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
    name: str | None = None,
) -> None:
    """`int8_linear` or `int8_conv2d` into `out`, by the kernel `name`, or the fastest one, or plain torch where all fail.

    Raises:
        RuntimeError: neither compiled kernels nor Triton are here.
    """
    operation = "linear" if x.dim() == 2 else "conv2d"
    capability = torch.cuda.get_device_capability(x.device)
    operands = (scale, shift, source, beta, row_sum, offset)

    def call(kernel: str) -> None:
        """The product by one kernel, or in plain torch."""
        if kernel == REFERENCE:
            plain.product(x, weight, stride, *operands, out)
        elif kernel.startswith(TRITON):
            from cachequant.kernels.cuda import triton_product

            blocks, given = _blocks(kernel), triton_product.Operands(*operands)
            if operation == "linear":
                triton_product.linear(x, weight, given, out, blocks)
            else:
                triton_product.conv2d(x, weight, stride, given, out, blocks)
        else:
            library.run(_variant(kernel), x, weight, stride, *operands, out)

    if name is not None:
        return call(name)
    names = candidates(capability, operation, x.shape[-1], weight.shape[0], out.dtype, row_sum is not None)
    _refuse_none(names, operation, x)
    fused = "".join(letter for letter, t in zip("bca", (shift, source, offset), strict=True) if t is not None)
    sizes = "x".join(map(str, (*x.shape, *weight.shape, *stride)))
    _run_fastest(x.device, f"{operation} {sizes} {fused} {str(out.dtype).removeprefix('torch.')}", names, call)


def run_activated(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    row_sum: Tensor | None,
    offset: Tensor | None,
    grid: Tensor,
    kind: str,
    out: Tensor,
    name: str | None = None,
) -> None:
    """`int8_linear_activated` into `out`, by the kernel `name`, or the fastest one, or plain torch where all fail.

    Raises:
        RuntimeError: neither compiled kernels nor Triton are here.
    """
    operands = (scale, shift, None, 0.0, row_sum, offset)

    def call(kernel: str) -> None:
        """Product and activation by one kernel, or in plain torch."""
        if kernel == REFERENCE:
            plain.activated(x, weight, scale, shift, row_sum, offset, grid, kind, out)
        elif kernel.startswith(TRITON):
            from cachequant.kernels.cuda import triton_feed_forward, triton_product

            blocks, given = _blocks(kernel), triton_product.Operands(*operands)
            triton_feed_forward.activated(x, weight, given, grid, kind == "geglu", kind == "gelu_tanh", out, blocks)
        else:
            library.run(_variant(kernel), x, weight, (1, 1), *operands, out, grid)

    if name is not None:
        return call(name)
    capability = torch.cuda.get_device_capability(x.device)
    names = activated_candidates(capability, kind, x.shape[-1], weight.shape[0], row_sum is not None)
    _refuse_none(names, kind, x)
    sizes = "x".join(map(str, (*x.shape, *weight.shape)))
    fused = "".join(letter for letter, t in zip("ba", (shift, offset), strict=True) if t is not None)
    _run_fastest(x.device, f"{kind} {sizes} {fused}", names, call)


def run_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """`multi_head_attention` by the fastest of torch's implementations: its own choice is not always that.

    Args:
        query: [B, N, C].
        key, value: [B, M, C].
        heads: of C / heads channels each.

    Returns:
        [B, N, C], contiguous.
    """

    def call(name: str) -> Tensor:
        """Attention by one implementation, or by torch's own choice, also where each of them failed."""
        with nullcontext() if name in ("auto", REFERENCE) else sdpa_kernel(ATTENTION_BACKENDS[name]):
            return reference.multi_head_attention(query, key, value, heads)

    sizes = "x".join(map(str, (query.shape[0], heads, query.shape[1], key.shape[1], query.shape[2] // heads)))
    layout = "".join("c" if t.is_contiguous() else "s" for t in (query, key, value))
    known = f"attention {sizes} {layout} {str(query.dtype).removeprefix('torch.')} {torch.__version__}"
    return _run_fastest(query.device, known, ("auto", *ATTENTION_BACKENDS), call)


def _refuse_none(names: tuple[str, ...], what: str, x: Tensor) -> None:
    if not names:
        raise RuntimeError(f"no kernel for {what} of {x.shape[-1]} channels: build the kernels or install Triton")


def _blocks(name: str) -> Blocks:
    """The tile in a Triton kernel's name."""
    from cachequant.kernels.cuda.triton_product import Blocks

    return Blocks(*map(int, name.removeprefix(TRITON).split("x")))


def _variant(name: str) -> Variant:
    """The compiled kernel of this name."""
    return next(v for v in VARIANTS if v.name == name)


def _run_fastest(device: torch.device, key: str, names: tuple[str, ...], call: Callable[[str], Result]) -> Result:
    """The kernel on file for `key`, or the one that a measurement finds; nothing is measured during a capture."""
    return table(device).run(key, names, call, not torch.cuda.is_current_stream_capturing())
