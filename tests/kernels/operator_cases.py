"""Arguments of every operator in torch's namespace `cachequant`, tiny, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GRIDS = torch.tensor([[20.0, 5.0, -128.0, 127.0], [30.0, -9.0, -128.0, 127.0]])
NATIVE_GRID = [0.03, 5.0, 255.0]
"""Scale, zero point and largest integer, as the C++ operators take them."""

Cases = dict[str, tuple[Any, ...]]


def integers(*shape: int) -> Tensor:
    """Random int8 of the whole range."""
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def step_tables(mapped: bool = True) -> tuple[Any, ...]:
    """Arguments of `load_step` for three grids, seven columns and the third step.

    The second and third column are corrected; the sixth is at other steps only.
    """
    columns = [torch.tensor([0, 0, 2, 2, 2, 1, 1], dtype=torch.int32), *torch.randn(4, 7)]
    layer, channel = (torch.tensor(c, dtype=torch.int32) for c in ([-1, 0, 0, -1, -1, 1, -1], [0, 0, 1, 0, 0, 0, 0]))
    first = torch.tensor([[0, 6], [2, -1], [4, -1], [-1, 7]])
    maps = [layer, channel, first, torch.rand(8), torch.randn(8)]
    results = torch.full((3, 4), torch.nan), *torch.full((3, 7), torch.nan)
    return torch.tensor([2]), torch.randn(4, 3, 4), torch.rand(4, 3, 2), columns, maps if mapped else [], *results


def device_cases() -> Cases:
    """Of the operators of the GPU: "name" or "name: what is special" -> arguments."""
    x, w = integers(6, 16), integers(8, 16)
    image, kernel = integers(2, 6, 5, 16), integers(8, 3, 3, 16)
    scale, shift, sums = torch.rand(8), torch.rand(8), torch.rand(6)
    small = scale * 1e-4  # hidden values around 1
    h, c = torch.randn(2, 4, 3, 8).half(), torch.randn(2, 16).half()
    norm = c, torch.rand(16), torch.rand(16), 4, 1e-5, True, GRIDS, [0, 1, 0, 1]
    tokens = torch.randn(2, 5, 8).half()
    rows = [tokens[:, i].clone() for i in range(3)]
    maps, step = torch.rand(4, 3, 6), torch.tensor([2])
    pixels = torch.randn(2, 8, 5, 4).half()
    last = pixels.contiguous(memory_format=torch.channels_last)
    return {
        "int8_linear": (x, w, scale, None, None, 1.0, None, None, torch.float16),
        "int8_linear: everything": (x, w, scale, shift, torch.rand(6, 8).half(), 1.0, sums, shift, torch.int8),
        "int8_linear_activated": (x, w, small, shift, None, None, GRIDS[0], "geglu"),
        "int8_linear_activated: gelu": (x, w, small, None, sums, shift, GRIDS[0], "gelu"),
        "int8_linear_activated: tanh": (x, w, small, None, None, None, GRIDS[0], "gelu_tanh"),
        "int8_conv2d": (
            image, kernel, scale, shift, torch.rand(2, 2, 2, 8).half(), 0.5, torch.rand(2, 2, 2), scale, [2, 2], torch.int8,
        ),
        "quantize_image": (h, GRIDS[0], [1, 1, 1, 1], 2),
        "quantize_image: no border": (h, GRIDS[0], [0, 0, 0, 0], 1),
        "group_norm_int8": ([h, h + 1], *norm, GRIDS),
        "group_norm_int8: without raw integers": ([h, h + 1], *norm),
        "group_norm_float": (h, torch.rand(8), torch.rand(8), 4, 1e-5),
        "layer_norm_int8": (tokens, torch.rand(8), torch.rand(8), *rows[:2], 1e-5, GRIDS),
        "gated_layer_norm_int8": (tokens, tokens + 1, *rows, 1e-5, GRIDS),
        "gated_sum": (tokens, tokens + 1, rows[0]),
        "multi_head_attention": (tokens, *torch.randn(2, 2, 3, 8).half(), 2),
        "multi_head_attention: slices": (*torch.randn(2, 5, 24).half().chunk(3, dim=2), 2),
        "window_sum": (image, [3, 3], [1, 1]),
        "map_channels": (tokens, tokens[:, 1:].clone().repeat(1, 2, 1)[:, :5], maps, step, 2),
        "map_channels: all, channels last": (last[:, :6].clone(), None, maps, step, 1),
        "map_channels: some, channels last": (last, pixels, maps, step, 1),
        "map_channels: all of a view": (pixels[:, :6].clone().transpose(2, 3), None, maps, step, 1),
        "map_channels: some of a view": (pixels.transpose(2, 3), None, maps, step, 1),
        "map_channels: all of a slice": (pixels[:, :6], None, maps, step, 1),
        "map_channels: some of a slice": (pixels[:, :, ::2], pixels[:, :, 1::2].repeat(1, 1, 2, 1)[:, :, :3], maps, step, 1),
        "load_step": step_tables(),
        "load_step: no maps": step_tables(mapped=False),
    }  # fmt: skip


def native_cases() -> Cases:
    """Of the C++ operators of the CPU."""
    x, rows = torch.randn(2, 3, 8), torch.randn(6, 8)
    terms, columns = torch.randn(6, 2), torch.randn(2, 8)
    norm = torch.rand(12), torch.rand(12), 4, 1e-5, True
    skip = torch.randn(2, 3, 4)
    return winograd_cases() | {
        "quantize": (torch.randn(2, 5, 4, 3).permute(0, 3, 1, 2), NATIVE_GRID),
        "group_norm": (x, x + 1, terms, columns, skip, torch.randn(1, 12), *norm, NATIVE_GRID * 2),
        "group_norm: floats": (x, None, None, None, skip, None, *norm, []),
        "group_norm: one part": (x, None, None, None, None, None, *torch.rand(2, 8), 4, 1e-5, False, NATIVE_GRID),
        "add_terms": (rows, rows + 1, terms, columns),
        "window_sums": (torch.randint(0, 256, (2, 6, 5, 4), dtype=torch.uint8), 3, [3, 2, 2, 1, 1, 0, 1, 2]),
        "layer_norm": (rows, *torch.rand(2, 8), 1e-5, NATIVE_GRID * 2),
        "geglu": (rows, NATIVE_GRID),
        "attention": (x, x + 1, x + 2, 2, 0.5, NATIVE_GRID),
        "attention: floats": (x, x + 1, x + 2, 2, 0.5, []),
    }


def winograd_cases() -> Cases:
    """Of the operator that some processors lack."""
    if not hasattr(torch.ops.cachequant, "winograd"):
        return {}
    weights, totals = integers(1, 32, 9, 64), torch.randint(-9, 9, (16,), dtype=torch.int32)
    offsets, images = (
        torch.randint(-9, 9, (1, 64), dtype=torch.int16),
        torch.randint(0, 256, (2, 6, 5, 32), dtype=torch.uint8),
    )
    return {
        "winograd": (images, 0.1, 3, weights, None, totals, torch.rand(16), None, 32),
        "winograd: offsets and a bias": (images, 0.1, 3, weights, offsets, totals, torch.rand(16), torch.rand(16), 32),
    }
