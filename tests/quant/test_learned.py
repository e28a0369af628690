"""A layer with gradients on its rounding and grids: where it begins, what it computes, what is saved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cachequant.types import WeightGrid
from tests.learning import WIDTHS, convolution, inputs, learned_of, state_of


@pytest.fixture
def source() -> nn.Conv2d:
    return convolution()


def test_it_begins_at_the_real_weights_on_the_tables_rows(source: nn.Conv2d) -> None:
    state, (x, steps) = state_of(source, bits=8), inputs()
    layer, rows = learned_of(source, state)
    rows.steps = steps
    parts = []
    for part, inp in zip(x.split(WIDTHS, dim=1), state.inputs, strict=True):
        scale = inp.scale[steps // 2].view(-1, 1, 1, 1)  # steps 1 and 3 read the rows of 0 and 2
        parts.append(((part / scale).round() + 128).clamp(0, 255).sub(128) * scale)
    expected = F.conv2d(torch.cat(parts, 1), source.weight, source.bias, padding=1)
    step_size = max(float(g.scale.max()) for g in state.weights)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0.03 * step_size * 45 * float(x.abs().max()))


@pytest.mark.parametrize("moved", [False, True])
def test_untrained_it_is_hardened_to_the_integers_that_it_was_given(source: nn.Conv2d, moved: bool) -> None:
    state = state_of(source)
    if moved:  # as compensated rounding leaves them: some are not the nearest
        noise = torch.randint(-1, 2, state.weights[0].values.shape, generator=torch.Generator().manual_seed(3))
        values = (state.weights[0].values.int() + noise).clamp(0, 7).to(torch.uint8)
        state = replace(state, weights=(replace(state.weights[0], values=values), state.weights[1]))
    made = learned_of(source, state)[0].hardened()
    for before, after in zip(state.weights, made.weights, strict=True):
        assert torch.equal(before.values, after.values) and torch.equal(before.zero_point, after.zero_point)
    for before, after in zip(state.inputs, made.inputs, strict=True):
        assert torch.equal(before.scale, after.scale) and torch.equal(before.steps, after.steps)


@pytest.mark.parametrize("bias", [True, False])
def test_the_output_has_the_type_of_the_input(source: nn.Conv2d, bias: bool) -> None:
    if not bias:
        source.bias = None
    (x, steps), (layer, rows) = inputs(2), learned_of(source, state_of(source))
    rows.steps = steps
    assert layer(x.double()).dtype is torch.float64
    assert torch.equal(layer(x.bfloat16()), layer(x.bfloat16().float()).bfloat16())


def test_weights_stay_on_their_grid_whatever_rounding_and_zero_point_learn(source: nn.Conv2d) -> None:
    state = state_of(source)
    layer, _ = learned_of(source, state)
    with torch.no_grad():
        for parameter, shift in zip(layer.rounding, layer.weight_shift, strict=True):
            parameter.copy_(torch.where(torch.rand_like(parameter) < 0.5, 20.0, -20.0))
            shift.copy_(4 * torch.randn_like(shift))
        for i, (grid, saved) in enumerate(zip(state.weights, layer.hardened().weights, strict=True)):
            column = (-1, 1, 1, 1)
            expected = (saved.values.float() - saved.zero_point.view(column)) * grid.scale.view(column)
            torch.testing.assert_close(layer._weight(i), expected)
            assert int(saved.values.max()) == 2**grid.bits - 1 and int(saved.values.min()) == 0  # the ends were met


def test_zero_points_move_the_window_of_weights_and_stay_whole(source: nn.Conv2d) -> None:
    layer, rows = learned_of(source, state_of(source))
    rows.steps = torch.zeros(2, dtype=torch.int64)
    before = layer(inputs(2)[0])
    with torch.no_grad():
        layer.weight_shift[0].fill_(0.3)
    torch.testing.assert_close(layer(inputs(2)[0]), before)  # less than half a step is no step
    with torch.no_grad():
        layer.weight_shift[0].fill_(1.2)
    saved = layer.hardened().weights[0]
    assert torch.equal(saved.zero_point, (state_of(source).weights[0].zero_point + 1).clamp(max=7))
    grid: WeightGrid = state_of(source).weights[0]
    centred, was = (
        g.values.float() - g.zero_point.view(-1, 1, 1, 1) for g in (saved, grid)
    )  # the weights stay, where the window still holds them
    inside = (grid.values.float() + 1 <= 7) & (grid.zero_point.view(-1, 1, 1, 1) < 7)
    assert torch.equal(centred[inside], was[inside])


def test_dropped_activations_are_not_rounded_in_training_only(source: nn.Conv2d) -> None:
    x, steps = inputs(4)
    layer, rows = learned_of(source, state_of(source), drop=1.0)
    rows.steps = steps
    layer.train()
    soft_weight = torch.cat([layer._weight(0), layer._weight(1)], dim=1)
    torch.testing.assert_close(layer(x), F.conv2d(x, soft_weight, source.bias, padding=1))
    layer.eval()
    assert not torch.allclose(layer(x), F.conv2d(x, soft_weight, source.bias, padding=1), atol=1e-5)
