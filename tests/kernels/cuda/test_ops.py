"""The operators' mathematics on the CPU; how the compiler sees them is in `tests.kernels.test_operators`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cachequant.kernels.cuda import ops, reference, step_ops
from tests.kernels.operator_cases import integers, step_tables


def quantized(x: torch.Tensor, bits: int = 8) -> tuple[torch.Tensor, float, float, torch.Tensor]:
    """(q, scale, zero point, grid on the device) of the plan's affine grid."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    levels = 2**bits - 1
    scale = (high - low) / levels
    zero_point = round(-low / scale)
    half = 2 ** (bits - 1)
    grid = torch.tensor([1 / scale, zero_point - half, -half, half - 1])
    q = (x * grid[0]).round().clamp(-zero_point, levels - zero_point) + zero_point
    return q, scale, float(zero_point), grid


@pytest.mark.parametrize(("padding", "stride"), [(1, 1), (1, 2), (0, 1)])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_a_padded_convolution_equals_the_plans_integers(padding, stride, asymmetric):
    """Zero points differ from 0, on both sides: the folded form of the package's docstring against (q - z)·(q_w - z_w)."""
    x = torch.randn(2, 5, 7, 8) + 0.4
    q, scale, zero_point, grid = quantized(x)
    q_w = torch.randint(0, 256, (6, 3, 3, 8)).double()
    zero_w = torch.randint(100, 156, (6,)).double() if asymmetric else torch.full((6,), 128.0, dtype=torch.float64)
    scale_w, bias = torch.rand(6) * 0.01, torch.randn(6)
    centred = q_w - zero_w[:, None, None, None]
    exact = F.conv2d(
        (q.double() - zero_point).permute(0, 3, 1, 2), centred.permute(0, 3, 1, 2), stride=stride, padding=padding
    ).permute(0, 2, 3, 1)
    expected = scale * scale_w.double() * exact + bias.double()

    rows = centred.flatten(1)
    offset = (rows.amax(1) - 127).clamp(min=0) + (rows.amin(1) + 128).clamp(max=0)  # o of each channel
    weight = (centred - offset[:, None, None, None]).to(torch.int8)
    assert bool(offset.any()) == asymmetric
    u = ops.quantize_image(x, grid, [padding] * 4, 1)
    factor = scale * scale_w
    shift = bias - factor * grid[1] * (weight.double().flatten(1).sum(1) + offset * rows.shape[1]).float()
    sums = ops.window_sum(u, [3, 3], [stride, stride]) if asymmetric else None
    found = ops.int8_conv2d(
        u, weight, factor, shift, None, 1.0, sums, factor * offset.float() if asymmetric else None,
        [stride, stride], torch.float32,
    )  # fmt: skip
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-4)


def test_two_halves_accumulate_instead_of_being_concatenated():
    x, weight = integers(9, 24), integers(5, 24)
    scale = torch.rand(5) * 1e-3
    whole = ops.int8_linear(x, weight, scale, None, None, 1.0, None, None, torch.float32)
    first = ops.int8_linear(
        x[:, :16].contiguous(), weight[:, :16].contiguous(), scale, None, None, 1.0, None, None, torch.float32
    )
    both = ops.int8_linear(
        x[:, 16:].contiguous(), weight[:, 16:].contiguous(), scale, None, first, 1.0, None, None, torch.float32
    )
    torch.testing.assert_close(both, whole)


def test_an_integer_output_is_the_requantised_product():
    """scale and shift divided by the next grid's step, plus its zero: rounding and clipping come with the cast."""
    x, weight = integers(7, 32), integers(4, 32)
    scale, shift, step, zero = torch.rand(4) * 1e-3, torch.randn(4), 0.05, 11.0
    real = ops.int8_linear(x, weight, scale, shift, None, 1.0, None, None, torch.float32)
    found = ops.int8_linear(x, weight, scale / step, shift / step + zero, None, 1.0, None, None, torch.int8)
    expected = ((real / step).round() + zero).clamp(-128, 127)
    assert (found.float() - expected).abs().max() <= 1  # a half may fall on either side
    assert ((found.float() - expected) != 0).float().mean() < 0.05


def test_accumulation_is_exact_where_float32_is_not():
    k = 20000
    x, weight = torch.full((1, k), 127, dtype=torch.int8), torch.full((1, k), 127, dtype=torch.int8)
    weight[0, 0] = 126
    assert reference.accumulate_linear(x, weight).item() == 127 * 127 * (k - 1) + 127 * 126  # above 2^24, odd


@pytest.mark.parametrize("mapped", [False, True])
def test_the_rows_of_a_step(mapped):
    """Column by column in float64."""
    step, grids, inputs, columns, maps, rows, scale, shift, offset = arguments = step_tables(mapped)
    step_ops.load_step(*arguments)
    owner, factor, base, sums, fixed = columns
    assert torch.equal(rows, grids[2])
    for c in range(7):
        s, zero = inputs[2, owner[c]].double()
        corrected = mapped and c in (1, 2)
        a = maps[3][4 + c - 1].double() if corrected else 1.0
        b = maps[4][4 + c - 1].double() if corrected else 0.0
        expected = factor[c].double() * s * a
        assert float(scale[c]) == pytest.approx(float(expected), rel=1e-5)
        wanted = base[c].double() + b - expected * zero * sums[c].double()
        assert float(shift[c]) == pytest.approx(float(wanted), rel=1e-4, abs=1e-5)
        assert float(offset[c]) == pytest.approx(float(expected * fixed[c].double()), rel=1e-5)
    assert int(step) == 2
