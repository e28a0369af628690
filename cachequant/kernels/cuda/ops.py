"""The GPU operators under one name each, `torch.ops.cachequant.*`: torch.compile, export and CUDA graphs see them.

On the CPU they are the functions of `cachequant.kernels.cuda.reference`. On a GPU, products and convolutions run the fastest
of the compiled and the Triton kernels for their shape, everything else runs in Triton. What changes from step to step is in
`cachequant.kernels.cuda.step_ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from cachequant.kernels.cuda import reference
from cachequant.kernels.cuda.dispatch import run_activated, run_attention, run_product
from cachequant.kernels.cuda.registration import contiguous, gpu_kernel
from cachequant.kernels.reference import Pad


def _pad(values: list[int]) -> Pad:
    left, right, top, bottom = values
    return left, right, top, bottom


def _pair(values: list[int]) -> tuple[int, int]:
    first, second = values
    return first, second


@custom_op("cachequant::int8_linear", mutates_args=())
def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    source: Tensor | None,
    beta: float,
    row_sum: Tensor | None,
    offset: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """int8 [M, K] × int8 [N, K] -> [M, N] with the epilogue of `cachequant.kernels.cuda`.

    Args:
        x, weight: operands.
        scale, shift, offset: float32 [N].
        source: [M, N] of the output's type (float16 for an int8 output), added times `beta`.
        beta: factor of source.
        row_sum: float32 [M], Σ x.
        dtype: float16, bfloat16, float32 or int8 (rounded, saturated).
    """
    total = reference.accumulate_linear(x, weight)
    return reference.epilogue(total, scale, shift, source, beta, row_sum, offset, dtype)


@gpu_kernel(int8_linear)
def _(x, weight, scale, shift, source, beta, row_sum, offset, dtype):  # type: ignore[no-untyped-def]
    contiguous(x, weight, scale, shift, source, row_sum, offset)
    out = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
    run_product(x, weight, (1, 1), scale, shift, source, beta, row_sum, offset, out)
    return out


@int8_linear.register_fake
def _(x, weight, scale, shift, source, beta, row_sum, offset, dtype):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


@custom_op("cachequant::int8_linear_activated", mutates_args=())
def int8_linear_activated(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    row_sum: Tensor | None,
    offset: Tensor | None,
    grid: Tensor,
    kind: str,
) -> Tensor:
    """See `cachequant.kernels.cuda.reference.activated`: int8 [M, K] × int8 [N or 2N, K] -> int8 [M, N]."""
    return reference.activated(x, weight, scale, shift, row_sum, offset, grid, kind)


def _hidden(x: Tensor, weight: Tensor, kind: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // (2 if kind == "geglu" else 1))


@gpu_kernel(int8_linear_activated)
def _(x, weight, scale, shift, row_sum, offset, grid, kind):  # type: ignore[no-untyped-def]
    contiguous(x, weight, scale, shift, row_sum, offset, grid)
    out = _hidden(x, weight, kind)
    run_activated(x, weight, scale, shift, row_sum, offset, grid, kind, out)
    return out


@int8_linear_activated.register_fake
def _(x, weight, scale, shift, row_sum, offset, grid, kind):  # type: ignore[no-untyped-def]
    return _hidden(x, weight, kind)


@custom_op("cachequant::int8_conv2d", mutates_args=())
def int8_conv2d(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    source: Tensor | None,
    beta: float,
    row_sum: Tensor | None,
    offset: Tensor | None,
    stride: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """int8 [B, H, W, C], its border already in it, × int8 [N, R, S, C] -> [B, P, Q, N]; the rest as for `int8_linear`."""
    total = reference.accumulate_conv2d(x, weight, _pair(stride))
    return reference.epilogue(total, scale, shift, source, beta, row_sum, offset, dtype)


def _conv_output(x: Tensor, weight: Tensor, stride: list[int], dtype: torch.dtype) -> Tensor:
    rows = (x.shape[1] - weight.shape[1]) // stride[0] + 1
    columns = (x.shape[2] - weight.shape[2]) // stride[1] + 1
    return x.new_empty(x.shape[0], rows, columns, weight.shape[0], dtype=dtype)


@gpu_kernel(int8_conv2d)
def _(x, weight, scale, shift, source, beta, row_sum, offset, stride, dtype):  # type: ignore[no-untyped-def]
    contiguous(x, weight, scale, shift, source, row_sum, offset)
    out = _conv_output(x, weight, stride, dtype)
    run_product(x, weight, _pair(stride), scale, shift, source, beta, row_sum, offset, out)
    return out


@int8_conv2d.register_fake
def _(x, weight, scale, shift, source, beta, row_sum, offset, stride, dtype):  # type: ignore[no-untyped-def]
    return _conv_output(x, weight, stride, dtype)


@custom_op("cachequant::quantize_image", mutates_args=())
def quantize_image(x: Tensor, grid: Tensor, pad: list[int], upsample: int) -> Tensor:
    """[B, H, W, C] -> int8 on `grid` [4], pixels repeated `upsample` times, inside a border of the grid's zero."""
    return reference.quantize_image(x, grid, _pad(pad), upsample).clone()


@gpu_kernel(quantize_image)
def _(x, grid, pad, upsample):  # type: ignore[no-untyped-def]
    from cachequant.kernels.cuda import triton_pointwise

    contiguous(x, grid)
    return triton_pointwise.quantize_image(x, grid, _pad(pad), upsample)


def _padded(x: Tensor, pad: list[int], upsample: int = 1) -> Tensor:
    height, width = x.shape[1] * upsample + pad[2] + pad[3], x.shape[2] * upsample + pad[0] + pad[1]
    return x.new_empty(x.shape[0], height, width, x.shape[3], dtype=torch.int8)


@quantize_image.register_fake
def _(x, grid, pad, upsample):  # type: ignore[no-untyped-def]
    return _padded(x, pad, upsample)


@custom_op("cachequant::group_norm_int8", mutates_args=())
def group_norm_int8(
    parts: list[Tensor],
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    activate: bool,
    grids: Tensor,
    pad: list[int],
    raw_grids: Tensor | None = None,
) -> list[Tensor]:
    """See `cachequant.kernels.cuda.reference.group_norm`: parts [B, H, W, C_i] -> int8, each on its row of `grids`."""
    return reference.group_norm(parts, shift, weight, bias, groups, eps, activate, grids, _pad(pad), raw_grids)


@gpu_kernel(group_norm_int8)
def _(parts, shift, weight, bias, groups, eps, activate, grids, pad, raw_grids=None):  # type: ignore[no-untyped-def]
    from cachequant.kernels.cuda import triton_norm

    contiguous(*parts, None if shift is None else shift[0], weight, bias, grids, raw_grids)
    return triton_norm.group_norm(list(parts), shift, weight, bias, groups, eps, activate, grids, _pad(pad), raw_grids)


@group_norm_int8.register_fake
def _(parts, shift, weight, bias, groups, eps, activate, grids, pad, raw_grids=None):  # type: ignore[no-untyped-def]
    raw = [] if raw_grids is None else [torch.empty_like(part, dtype=torch.int8) for part in parts]
    return [_padded(part, pad) for part in parts] + raw


@custom_op("cachequant::group_norm_float", mutates_args=())
def group_norm_float(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """GroupNorm of [B, H, W, C] in its own type."""
    return reference.group_norm_float(x, weight, bias, groups, eps)


@gpu_kernel(group_norm_float)
def _(x, weight, bias, groups, eps):  # type: ignore[no-untyped-def]
    from cachequant.kernels.cuda import triton_norm

    contiguous(x, weight, bias)
    return triton_norm.group_norm_float(x, weight, bias, groups, eps)


@group_norm_float.register_fake
def _(x, weight, bias, groups, eps):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@custom_op("cachequant::layer_norm_int8", mutates_args=())
def layer_norm_int8(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    grids: Tensor,
) -> Tensor:
    """See `cachequant.kernels.cuda.reference.layer_norm`: [B, L, C] -> int8 [G, B, L, C]."""
    return reference.layer_norm(x, weight, bias, scale, shift, eps, grids)


@gpu_kernel(layer_norm_int8)
def _(x, weight, bias, scale, shift, eps, grids):  # type: ignore[no-untyped-def]
    from cachequant.kernels.cuda import triton_norm

    contiguous(x, weight, bias, scale, shift, grids)
    return triton_norm.layer_norm(x, weight, bias, scale, shift, eps, grids)[1]


@layer_norm_int8.register_fake
def _(x, weight, bias, scale, shift, eps, grids):  # type: ignore[no-untyped-def]
    return x.new_empty(grids.shape[0], *x.shape, dtype=torch.int8)


@custom_op("cachequant::gated_layer_norm_int8", mutates_args=())
def gated_layer_norm_int8(
    x: Tensor, more: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float, grids: Tensor
) -> tuple[Tensor, Tensor]:
    """A residual and the norm behind it: x + gate·more, and `layer_norm_int8` of that with `scale` and `shift`.

    Args:
        x, more: [B, L, C].
        gate, scale, shift: [B, C].
        eps, grids: of `layer_norm_int8`.

    Returns:
        [B, L, C] of the type of x, int8 [G, B, L, C].
    """
    total = reference.gated_sum(x, more, gate)
    return total, reference.layer_norm(total, None, None, scale, shift, eps, grids)


@gpu_kernel(gated_layer_norm_int8)
def _(x, more, gate, scale, shift, eps, grids):  # type: ignore[no-untyped-def]
    from cachequant.kernels.cuda import triton_norm

    contiguous(x, more, gate, scale, shift, grids)
    return triton_norm.layer_norm(x, None, None, scale, shift, eps, grids, (more, gate))


@gated_layer_norm_int8.register_fake
def _(x, more, gate, scale, shift, eps, grids):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), x.new_empty(grids.shape[0], *x.shape, dtype=torch.int8)


@custom_op("cachequant::gated_sum", mutates_args=())
def gated_sum(x: Tensor, more: Tensor, gate: Tensor) -> Tensor:
    """See `cachequant.kernels.cuda.reference.gated_sum`: x + gate·more of [B, L, C] with a gate [B, C]."""
    return reference.gated_sum(x, more, gate)


@gpu_kernel(gated_sum)
def _(x, more, gate):  # type: ignore[no-untyped-def]
    from cachequant.kernels.cuda import triton_pointwise

    contiguous(x, more, gate)
    return triton_pointwise.gated_sum(x, more, gate)


@gated_sum.register_fake
def _(x, more, gate):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@custom_op("cachequant::multi_head_attention", mutates_args=())
def multi_head_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """See `cachequant.kernels.cuda.reference.multi_head_attention`."""
    return reference.multi_head_attention(query, key, value, heads)


@gpu_kernel(multi_head_attention)
def _(query, key, value, heads):  # type: ignore[no-untyped-def]
    return run_attention(query, key, value, heads)


@multi_head_attention.register_fake
def _(query, key, value, heads):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape)


@custom_op("cachequant::window_sum", mutates_args=())
def window_sum(x: Tensor, window: list[int], stride: list[int]) -> Tensor:
    """Σ of int8 [B, H, W, C] over a convolution's receptive field -> float32 [B, P, Q]."""
    return reference.window_sum(x, _pair(window), _pair(stride))


@gpu_kernel(window_sum)
def _(x, window, stride):  # type: ignore[no-untyped-def]
    from cachequant.kernels.cuda import triton_pointwise

    contiguous(x)
    return triton_pointwise.window_sum(x, _pair(window), _pair(stride))


@window_sum.register_fake
def _(x, window, stride):  # type: ignore[no-untyped-def]
    rows, columns = (x.shape[1] - window[0]) // stride[0] + 1, (x.shape[2] - window[1]) // stride[1] + 1
    return x.new_empty(x.shape[0], rows, columns, dtype=torch.float32)
