"""Normalisations with what is fused into them against float64: layers of the networks, and random ones of any shape."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from kernel_cases import LIMITS, Case, attempt, compare, grid, worst
from torch import Tensor

from cachequant.kernels.cuda import ops, reference

PADDINGS = ([0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1])
"""Left, right, top, bottom."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SIZES = [(1, 1, 2), (2, 8, 8), (2, 7, 9), (2, 32, 32), (2, 64, 64), (1, 40, 33)]
LAYER_WIDTHS, ODD_WIDTHS = (320, 1152, 1280), (1, 7, 33, 321, 1153)
"""Channels of layer norms; the odd ones of the last size only, since Triton compiles for each."""

RANDOM_CASES, SEED = 24, 0
"""Random shapes and options of group norms, the same ones in every run."""

Size = tuple[int, int, int]
"""Images, height, width."""


def three_grids() -> Tensor:
    """[3, 4]: grids of different steps and zeros, of which the last has four bits."""
    coarse = torch.tensor([1 / 0.4, 3.0, -8.0, 7.0])
    return torch.stack([grid(-17.0), grid(23.0, 0.05), coarse])


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random values whose mean is far from zero."""
    return torch.randn(*shape).to(dtype) + 1


def on_grid(y: Tensor, on: Tensor) -> Tensor:
    """float64 to the integers of a grid [4], rounded once."""
    inverse, zero, low, high = on.double().unbind()
    return ((y * inverse).clamp(low - zero, high - zero).round() + zero).to(torch.int8)


def exact_group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """GroupNorm of [B, H, W, C] in float64."""
    y = F.group_norm(x.double().permute(0, 3, 1, 2), groups, weight.double(), bias.double(), 1e-5)
    return y.permute(0, 2, 3, 1)


def exact_layer_norm(x: Tensor, affine: tuple[Tensor, ...], modulation: tuple[Tensor, ...]) -> Tensor:
    """LayerNorm of [B, L, C] in float64, with weight and bias [C], and scale and shift [B, C], or () for none."""
    y = F.layer_norm(x.double(), x.shape[-1:], *(t.double() for t in affine), eps=1e-5)
    if modulation:
        scale, shift = (t.double()[:, None] for t in modulation)
        y = y * (1 + scale) + shift
    return y


def group_norm_case(
    size: Size, widths: tuple[int, ...], groups: int, pad: list[int], shifted: bool, activate: bool, raw: bool,
    dtype: torch.dtype,
) -> Case:  # fmt: skip
    """GroupNorm (+ SiLU) of one image or two halves, with `raw` their own integers too; the worst result counts."""
    grids = three_grids()[: len(widths)].contiguous()
    raw_grids = three_grids().flip(0)[: len(widths)].contiguous() if raw else None
    parts = [drawn(*size, c, dtype=dtype) for c in widths]
    gain, base = torch.randn(2, sum(widths)).to(dtype)
    shift = torch.randn(size[0], sum(widths)).to(dtype) if shifted else None
    found = ops.group_norm_int8(parts, shift, gain, base, groups, 1e-5, activate, grids, pad, raw_grids)

    x = torch.cat([part.double() for part in parts], dim=3)
    x = x if shift is None else x + shift.double()[:, None, None]
    y = exact_group_norm(x, gain, base, groups)
    halves = (F.silu(y) if activate else y).split(widths, dim=3)
    left, right, top, bottom = pad
    expected = [
        reference.pad_image(on_grid(y, g), g, (left, right, top, bottom)) for y, g in zip(halves, grids, strict=True)
    ]
    label = f"{list(size)} {widths} in {groups} pad {pad} {shifted} {activate} {raw} {str(dtype)[6:]}"
    cases = [compare("group_norm_int8", label, f, e, 0.01) for f, e in zip(found, expected, strict=False)]
    if raw_grids is not None:  # nothing but the rounding itself: no integer may differ
        wanted = [reference.quantize(part, g) for part, g in zip(parts, raw_grids, strict=True)]
        cases += [
            compare("group_norm_int8", label, f, e, 0.0) for f, e in zip(found[len(parts) :], wanted, strict=True)
        ]
    return worst(cases)


def float_norm_case(size: Size, channels: int, groups: int, dtype: torch.dtype) -> Case:
    """GroupNorm in floating point."""
    x = drawn(*size, channels, dtype=dtype)
    gain, base = torch.randn(2, channels).to(dtype)
    label = f"{list(x.shape)} in {groups} {str(dtype)[6:]}"
    found = ops.group_norm_float(x, gain, base, groups, 1e-5)
    return compare("group_norm_float", label, found, exact_group_norm(x, gain, base, groups), LIMITS[dtype])


def layer_norm_case(
    size: tuple[int, int], channels: int, affine: bool, modulate: bool, grids: int, dtype: torch.dtype
) -> Case:
    """LayerNorm on some grids; the worst counts."""
    on = three_grids()[:grids].contiguous()
    x = drawn(*size, channels, dtype=dtype)
    own = tuple(torch.randn(2, channels).to(dtype)) if affine else ()
    modulation = tuple(torch.randn(2, size[0], channels).to(dtype)) if modulate else ()
    found = ops.layer_norm_int8(x, *(own or (None, None)), *(modulation or (None, None)), 1e-5, on)
    y = exact_layer_norm(x, own, modulation)
    label = f"{list(x.shape)} {affine} {modulate} {grids} {str(dtype)[6:]}"
    cases = [compare("layer_norm_int8", label, f, on_grid(y, g), 0.01) for f, g in zip(found, on, strict=True)]
    return worst(cases)


def gated_case(size: tuple[int, int], channels: int, dtype: torch.dtype) -> Case:
    """A residual with a gate, alone and with the norm behind it; the worst of the results counts."""
    grids = three_grids()[:2].contiguous()
    x, more = drawn(2, *size, channels, dtype=dtype)
    gate, scale, shift = torch.randn(3, size[0], channels).to(dtype)
    total, found = ops.gated_layer_norm_int8(x, more, gate, scale, shift, 1e-5, grids)
    exact = x.double() + gate.double()[:, None] * more.double()
    y = exact_layer_norm(total, (), (scale, shift))
    name, label = "gated_layer_norm_int8", f"{list(x.shape)} {str(dtype)[6:]}"
    cases = [compare(name, label, f, on_grid(y, g), 0.01) for f, g in zip(found, grids, strict=True)]
    sums = total, ops.gated_sum(x, more, gate)
    return worst([*cases, *(compare(name, label, f, exact, LIMITS[dtype]) for f in sums)])


def random_group_norms(
    count: int, side: int
) -> Iterator[tuple[Size, tuple[int, ...], int, list[int], bool, bool, bool, torch.dtype]]:
    """Arguments of `group_norm_case`: images of up to `side` pixels a side, halves whose border may cut a group."""
    draw = random.Random(SEED)
    for _ in range(count):
        groups = draw.choice((1, 2, 3, 4, 5, 8, 16, 24, 48))
        channels = groups * draw.randint(1, 640 // groups)
        cut = draw.randint(1, channels)
        widths = (channels,) if cut == channels or draw.random() < 0.5 else (cut, channels - cut)
        size = draw.randint(1, 3), draw.randint(1, side), draw.randint(1, side)
        shifted, activate, raw = (draw.random() < 0.5 for _ in range(3))
        yield size, widths, groups, draw.choice(PADDINGS), shifted, activate, raw, draw.choice(DTYPES)


def norms(quick: bool) -> Iterator[Case]:
    """Every normalisation: as the networks call it, without SiLU, with the parts' integers, odd channels, random shapes."""
    sizes = [(2, 3, 5)] if quick else SIZES
    for size, dtype in itertools.product(sizes, DTYPES):
        if dtype is not torch.float16 and size != sizes[-1]:
            continue
        for widths, pad in itertools.product(((32,), (320,), (64, 32), (640, 320)), PADDINGS):
            arguments = size, widths, 32, pad, pad != PADDINGS[0], True, len(widths) > 1, dtype
            yield attempt("group_norm_int8", str(arguments), group_norm_case, *arguments)
        for channels, groups in ((32, 32), (320, 32), (960, 32), (96, 8), (45, 5), (7, 1)):
            yield attempt("group_norm_float", str((size, channels)), float_norm_case, size, channels, groups, dtype)
        rows = size[0], size[1] * size[2]
        widths_of_rows = (*LAYER_WIDTHS, *ODD_WIDTHS) if size == sizes[-1] else LAYER_WIDTHS
        for channels, flags in itertools.product(widths_of_rows, itertools.product((False, True), repeat=2)):
            arguments = rows, channels, *flags, 1 + channels % 3, dtype
            yield attempt("layer_norm_int8", str(arguments), layer_norm_case, *arguments)
        for channels in (7, 321, 320, 1152):
            yield attempt("gated_layer_norm_int8", str((rows, channels)), gated_case, rows, channels, dtype)
    for arguments in random_group_norms(*((4, 4) if quick else (RANDOM_CASES, 40))):
        yield attempt("group_norm_int8", str(arguments), group_norm_case, *arguments)
