"""The GPU operators that read the step from the device, so that a static graph serves all steps; the others are in `ops`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from cachequant.kernels.cuda import reference
from cachequant.kernels.cuda.registration import contiguous, gpu_kernel


@custom_op("cachequant::load_step", mutates_args=("rows", "scale", "shift", "offset"))
def load_step(
    step: Tensor,
    grids: Tensor,
    inputs: Tensor,
    columns: list[Tensor],
    maps: list[Tensor],
    rows: Tensor,
    scale: Tensor,
    shift: Tensor,
    offset: Tensor,
) -> None:
    """See `cachequant.kernels.cuda.reference.load_step`."""
    reference.load_step(step, grids, inputs, columns, maps, rows, scale, shift, offset)


@gpu_kernel(load_step)
def _(step, grids, inputs, columns, maps, rows, scale, shift, offset):  # type: ignore[no-untyped-def]
    from cachequant.kernels.cuda import triton_steps

    contiguous(grids, inputs, *columns, *maps, rows, scale, shift, offset)
    triton_steps.load_step(step, grids, inputs, list(columns), list(maps), rows, scale, shift, offset)


@load_step.register_fake
def _(step, grids, inputs, columns, maps, rows, scale, shift, offset):  # type: ignore[no-untyped-def]
    return None


@custom_op("cachequant::map_channels", mutates_args=())
def map_channels(x: Tensor, other: Tensor | None, maps: Tensor, step: Tensor, channel_dim: int) -> Tensor:
    """See `cachequant.kernels.cuda.reference.map_channels`."""
    return reference.map_channels(x, other, maps, step, channel_dim)


@gpu_kernel(map_channels)
def _(x, other, maps, step, channel_dim):  # type: ignore[no-untyped-def]
    from cachequant.kernels.cuda import triton_steps

    contiguous(maps)
    return triton_steps.map_channels(x, other, maps, step, channel_dim)


@map_channels.register_fake
def _(x, other, maps, step, channel_dim):  # type: ignore[no-untyped-def]
    return torch.empty_like(reference.dense(x))
