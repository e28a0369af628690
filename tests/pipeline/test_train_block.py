"""Training of a block: what it minimises, when its regulariser pulls, its iterations from tables on the device."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.config import ReconConfig
from cachequant.pipeline.train_block import (
    ANNEALED,
    BETA_FIRST,
    BETA_LAST,
    FREE,
    BlockData,
    Training,
    annealing,
    train_block,
    unwhole,
)
from cachequant.quant.layers import QuantLayer
from cachequant.quant.learned import GAMMA, ZETA
from cachequant.types import Schedule
from tests.learning import convolution, inputs, learned_of, state_of

SETTINGS = ReconConfig(
    iterations=300, batch_size=16, weight_lr=0.1, scale_lr=1e-3, zero_point_lr=1e-3, regulariser=10.0
)


@pytest.fixture
def source() -> nn.Conv2d:
    return convolution()


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


def test_the_regulariser_is_the_papers(source: nn.Conv2d) -> None:
    layer, _ = learned_of(source, state_of(source))
    value = unwhole({"": layer}, torch.tensor(2.0))
    soft = torch.cat([h.flatten() for h in layer.soft()])
    torch.testing.assert_close(value, (1 - (2 * soft - 1).abs().pow(2.0)).mean())
    value.backward()
    for parameter, h in zip(layer.rounding, layer.soft(), strict=True):
        sigmoid = torch.sigmoid(parameter.detach())
        slope = (ZETA - GAMMA) * sigmoid * (1 - sigmoid)  # dh/dp: no h is at an end yet
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0
        torch.testing.assert_close(parameter.grad, -4 * (2 * h.detach() - 1) * slope / len(soft))
    others = [*layer.weight_shift, *layer.scale_shift, *layer.zero_point]
    assert all(parameter.grad is None for parameter in others)


def test_the_regulariser_begins_late_and_its_power_falls() -> None:
    pull, beta = annealing(1000)
    assert not pull[: int(1000 * FREE)].any() and (pull[int(1000 * FREE) :] == 1).all()
    assert (beta[: int(1000 * FREE)] == BETA_FIRST).all() and (beta[int(1000 * ANNEALED) :] == BETA_LAST).all()
    middle = beta[round(1000 * (FREE + ANNEALED) / 2)]
    assert float(middle) == pytest.approx((BETA_FIRST + BETA_LAST) / 2) and (beta.diff() <= 0).all()


def test_iterations_are_those_of_torchs_own_schedule(source: nn.Conv2d) -> None:
    """Rates, batches, annealing: against a loop that holds them in Python."""
    (x, steps), settings = inputs(), replace(SETTINGS, iterations=12)
    data, unit = BlockData((x,), {}, source(x), steps), torch.tensor(0.01)
    layer, rows = learned_of(source, state_of(source))
    training = Training(nn.Sequential(layer), {"0": layer}, data, rows, settings, unit)
    losses = [float(training.step()[0]) for _ in range(settings.iterations)]

    other, seen = learned_of(source, state_of(source))
    groups = (("rounding", settings.weight_lr), ("weight_shift", settings.zero_point_lr),
              ("zero_point", settings.zero_point_lr), ("scale_shift", settings.scale_lr))  # fmt: skip
    optimiser = torch.optim.Adam([{"params": list(getattr(other, name)), "lr": rate} for name, rate in groups])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.iterations)
    random, expected = torch.Generator().manual_seed(0), []
    for iteration in range(settings.iterations):
        index, progress = (
            torch.randint(len(x), (settings.batch_size,), generator=random),
            iteration / settings.iterations,
        )
        seen.steps = steps[index]
        loss = (other(x[index]) - data.target[index]).square().mean() / unit
        if progress >= FREE:
            share = min(1.0, (progress - FREE) / (ANNEALED - FREE))
            beta = BETA_LAST + (BETA_FIRST - BETA_LAST) * math.cos(math.pi * share / 2) ** 2
            loss = loss + settings.regulariser * unwhole({"": other}, torch.tensor(beta))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        expected.append(float(loss.detach()))
    assert losses == pytest.approx(expected, rel=1e-4)
    for name, _ in groups:
        for mine, theirs in zip(getattr(layer, name), getattr(other, name), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_iteration_trains_as_a_launched_one(source: nn.Conv2d) -> None:
    source = source.cuda()
    x, steps = (value.cuda() for value in inputs())
    data, unit, trained = BlockData((x,), {}, source(x), steps), torch.tensor(0.01, device="cuda"), []
    for captured in (True, False):
        layer, rows = learned_of(source, state_of(source))
        training = Training(nn.Sequential(layer), {"0": layer}, data, rows, SETTINGS, unit)
        if captured:
            training.run("test")
        else:
            for _ in range(SETTINGS.iterations):
                training.step()
        trained.append(layer)
    for mine, theirs in zip(*(layer.parameters() for layer in trained), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
