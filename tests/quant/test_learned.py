"""Reconstruction of a block: where it begins, what it minimises, what is saved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.config import ReconConfig
from cachequant.quant.layers import QuantLayer, quantize_weight
from cachequant.quant.learned import GAMMA, WARM_UP, ZETA, BlockData, LearnedLayer, Rows, train_block, unwhole
from cachequant.types import ActivationTable, LayerQuant, Schedule, WeightGrid

SETTINGS = ReconConfig(
    iterations=300, batch_size=16, weight_lr=0.1, scale_lr=1e-3, zero_point_lr=1e-3, regulariser=10.0
)
WIDTHS = (3, 2)


def table(scale: float, steps: int = 3) -> ActivationTable:
    return ActivationTable(
        torch.arange(0, 2 * steps, 2, dtype=torch.int32),
        scale * torch.linspace(1.0, 1.5, steps), torch.full((steps,), 128.0), 8,
    )  # fmt: skip


@pytest.fixture
def source() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(5, 4, 3, padding=1).requires_grad_(False)


def state_of(source: nn.Conv2d, bits: int = 3) -> LayerQuant:
    grids = tuple(quantize_weight(w, bits, "minmax") for w in source.weight.split(WIDTHS, dim=1))
    return LayerQuant(grids, (table(0.02), table(0.03)), WIDTHS)


def inputs(count: int = 32) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(count, 1, 6, 6, generator=random) * torch.linspace(0.5, 1.5, 5).view(1, 5, 1, 1)  # channels alike
    return x + 0.2 * torch.randn(count, 5, 6, 6, generator=random), torch.arange(count) % 5


def learned_of(source: nn.Conv2d, state: LayerQuant, drop: float = 0.0) -> tuple[LearnedLayer, Rows]:
    rows = Rows()
    return LearnedLayer(source, state, rows, drop).eval(), rows


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


def test_what_is_saved_computes_what_was_trained(source: nn.Conv2d) -> None:
    """Errors that training reports are those of the quantised layer on the saved state."""
    (x, steps), state = inputs(), state_of(source)
    layer, rows = learned_of(source, state)
    block = nn.Sequential(layer)
    data = BlockData((x,), {}, source(x), steps)
    before, after = train_block(block, {"0": layer}, data, rows, SETTINGS, "test")
    clock, power = FeatureCache(Schedule((0,), 6, 6)), data.target.square().mean()
    for saved, reported in ((state, before), (layer.hardened(), after)):
        quantised = QuantLayer(source, saved, clock)
        total = 0.0
        for step in range(5):
            clock.step = step
            mine = steps == step
            total += float((quantised(x[mine]) - data.target[mine]).square().sum())
        assert total / data.target.numel() / float(power) == pytest.approx(reported, rel=1e-3)
    assert after < 0.7 * before


def test_roundings_are_whole_before_they_are_hardened(source: nn.Conv2d) -> None:
    (x, steps), state = inputs(), state_of(source)
    shares = {}
    for regulariser in (0.0, 10.0):
        layer, rows = learned_of(source, state)
        settings = replace(SETTINGS, regulariser=regulariser)
        train_block(nn.Sequential(layer), {"0": layer}, BlockData((x,), {}, source(x), steps), rows, settings, "test")
        soft = torch.cat([h.flatten() for h in layer.soft()])
        shares[regulariser] = float(((soft < 0.02) | (soft > 0.98)).float().mean())
    assert shares[10.0] > 0.95 and shares[0.0] < 0.2


def test_the_regulariser_lives_behind_the_warm_up(source: nn.Conv2d) -> None:
    layer, _ = learned_of(source, state_of(source))
    assert float(unwhole({"": layer}, 0.99 * WARM_UP)) == 0.0
    value = unwhole({"": layer}, 0.99)
    soft = torch.cat([h.flatten() for h in layer.soft()])
    expected = (1 - (2 * soft - 1).abs().pow(2.0)).mean()  # β ends at 2
    torch.testing.assert_close(value, expected)
    value.backward()
    for parameter, h in zip(layer.rounding, layer.soft(), strict=True):
        sigmoid = torch.sigmoid(parameter.detach())
        slope = (ZETA - GAMMA) * sigmoid * (1 - sigmoid)  # dh/dp: no h is at an end yet
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0
        torch.testing.assert_close(parameter.grad, -4 * (2 * h.detach() - 1) * slope / len(soft))
    others = [*layer.weight_shift, *layer.scale_shift, *layer.zero_point]
    assert all(parameter.grad is None for parameter in others)


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
