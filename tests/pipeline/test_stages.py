"""Stages: what they compute, in closed form where there is one, and that nothing current is computed again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cachequant.budget import Allowance
from cachequant.cache.feature_cache import FeatureCache
from cachequant.config import RunConfig
from cachequant.costs import COSTS, band_for
from cachequant.errors import UserError
from cachequant.pipeline.calibrate import (
    Calibration,
    SamplerGains,
    budget_schedule,
    choose_schedule,
    gather,
    sampler_sigmas,
)
from cachequant.pipeline.context import FRESH, Context
from cachequant.pipeline.features import gather_moments
from cachequant.pipeline.hook import Call
from cachequant.pipeline.quant_params import calibrate_quantisers, layer_plans
from cachequant.pipeline.sample import draw
from cachequant.pipeline.stages import Stages
from cachequant.schedule import best_schedule, schedule_from_features, uniform_schedule
from cachequant.types import Correction

Configure = Callable[..., RunConfig]


def features_of(context: Context, seeds: list[int]) -> torch.Tensor:
    """All features of full-precision trajectories: [T, B, C, H, W]."""
    caught: list[torch.Tensor] = []

    def step(call: Call) -> torch.Tensor:
        output, feature = context.adapter.full(call.x, call.timestep, **call.kwargs)
        caught.append(feature.clone())
        return output

    cache = FeatureCache(uniform_schedule(context.num_steps, 1))
    for _ in context.run(step, cache, seeds, "test", len(seeds)):
        pass
    return torch.stack(caught)


def test_streamed_calibration_finds_the_schedule_of_stored_features(pipe: Any, configure: Configure) -> None:
    context = Context.of(pipe, configure("method=dps"))
    calibration = gather(context)
    found = choose_schedule(context, calibration)
    stored = features_of(context, context.seeds())
    expected = schedule_from_features(stored, 2)
    neighbour = (stored[1:] - stored[:-1]).abs().flatten(1).double().sum(1)
    assert torch.allclose(calibration.band[1:, 1], neighbour, rtol=1e-4)
    assert found.refresh_steps == expected.refresh_steps
    assert found.cost == pytest.approx(expected.cost, rel=1e-4)


@pytest.mark.parametrize("name", COSTS)
def test_every_cost_makes_the_best_schedule_of_stored_features(pipe: Any, configure: Configure, name: str) -> None:
    context = Context.of(pipe, configure("method=dps", f"schedule.cost={name}", "calibration.batch_size=4"))
    calibration = gather(context)
    found, cost = choose_schedule(context, calibration), COSTS[name]
    band = band_for(cost, context.num_steps, 2, 1, context.config.quant.activation_bits)
    for feature in features_of(context, context.seeds()):
        band.update(feature[::2] if (cost.error, cost.weight) == ("l2", "sampler") else feature)
    assert torch.allclose(calibration.band, band.values, rtol=1e-4)
    if cost.weight == "none":
        assert (calibration.weights == 1).all()
    assert calibration.neighbour.shape == (6,) and calibration.neighbour[0] == 0
    expected = best_schedule(band.values, 2, calibration.weights, coherent=cost.coherent)
    assert found.refresh_steps == expected.refresh_steps and found.cost == pytest.approx(expected.cost, rel=1e-4)


def test_a_schedule_that_takes_all_of_its_budget_is_within_it() -> None:
    """Times that float32 rounds, upward as often as downward."""
    random = torch.Generator().manual_seed(0)
    for _ in range(30):
        band = torch.rand(8, 4, generator=random).double()
        full, cached = (base + torch.rand(8, generator=random).double() for base in (2.0, 0.5))
        plenty = Allowance(tuple(full.tolist()), tuple(cached.tolist()), 1e3)
        ones, nothing = torch.ones(8, dtype=torch.float64), torch.zeros(8, 1)
        calibration = Calibration(band, "l1", ones, nothing, (), {})
        best = budget_schedule(calibration, 2, plenty, None)
        enough = replace(plenty, budget=plenty.spent(best.refresh_steps))
        assert budget_schedule(calibration, 2, enough, None) == best


def test_moments_of_full_precision_trajectories_are_those_of_stored_features(pipe: Any, configure: Configure) -> None:
    context = Context.of(pipe, configure("method=paper"))
    schedule = uniform_schedule(context.num_steps, 2)
    stored = features_of(context, context.seeds(FRESH))
    moments = gather_moments(context, schedule)
    assert set(moments) == {1, 3, 5}
    for step, sums in moments.items():
        x, y = stored[step - 1].double(), stored[step].double()
        error = sums.error()
        assert torch.allclose(error, (y - x).square().mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-9)
        assert (sums.error(sums.solve()) <= error + 1e-9).all()


def test_free_running_fit_zeroes_the_mean_error_on_its_own_trajectory(pipe: Any, configure: Configure) -> None:
    """The target of step t is the full-precision feature at the accelerated model's own x_t."""
    context = Context.of(pipe, configure("quant.enabled=false", "correction.ridge=0", "correction.inflation=0"))
    schedule = uniform_schedule(context.num_steps, 2)
    moments = gather_moments(context, schedule)
    maps = {step: sums.solve() for step, sums in moments.items()}
    cache = FeatureCache(schedule, keep=2)
    gaps: dict[int, torch.Tensor] = {}

    def step(call: Call) -> torch.Tensor:
        output, feature = context.adapter.full(call.x, call.timestep, **call.kwargs)
        if cache.must_refresh:
            cache.store(feature)
            return output
        reused = cache.reuse(maps[cache.step])
        gaps[cache.step] = (reused - feature).mean(dim=(0, 2, 3)).abs().max()
        return context.adapter.cached(call.x, call.timestep, None, reused, **call.kwargs)

    for _ in context.run(step, cache, context.seeds(FRESH), "test", 4):
        pass
    assert set(gaps) == {1, 3, 5}
    assert all(gap < 1e-4 for gap in gaps.values())
    assert maps[1].previous is None and maps[3].previous is not None


def test_quantisers_have_a_row_for_exactly_the_steps_that_run_them(pipe: Any, configure: Configure) -> None:
    context = Context.of(pipe, configure("method=naive"))
    schedule = uniform_schedule(context.num_steps, 2)
    state = calibrate_quantisers(context, gather(context), schedule, Correction())
    shallow = context.adapter.shallow_names()
    for name, layer in state.layers.items():
        expected = list(range(6)) if name in shallow else [0, 2, 4]
        assert all(table.steps.tolist() == expected for table in layer.inputs), name
    assert any(name not in shallow for name in state.layers) and any(name in shallow for name in state.layers)


def test_every_convolution_and_linear_layer_is_planned_by_structure(pipe: Any, configure: Configure) -> None:
    context = Context.of(pipe, configure("method=paper"))
    plans = layer_plans(context.adapter, context.config.quant)
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    assert set(plans) == {n for n, m in pipe.unet.named_modules() if isinstance(m, kinds)}
    low = layer_plans(context.adapter, Context.of(pipe, configure("quant.weight_bits=4", "method=paper")).config.quant)
    assert {n for n, p in low.items() if p.weight_bits == 8} == {"conv_in", "conv_out"}
    assert {n for n, p in plans.items() if p.split} == set(context.adapter.splits())
    assert not any(p.symmetric for p in plans.values())  # the paper's grids
    assert all(p.symmetric for p in layer_plans(context.adapter, configure("method=best").quant).values())


def test_sampler_weights_follow_the_closed_form_of_gaussian_data(pipe: Any, configure: Configure) -> None:
    """For data of variance v the exact path is x̄ ∝ √(σ² + v): the factor of `SamplerGains`, checked by its ODE."""
    context = Context.of(pipe, configure())
    sigma = sampler_sigmas(context)
    assert sigma[-1] == 0 and (sigma[:-1] > sigma[1:]).all()
    v = 0.3
    nodes = torch.linspace(float(sigma[0]), 0.0, 200_001, dtype=torch.float64)
    error = torch.ones((), dtype=torch.float64)
    slope = nodes / (nodes.square() + v)  # dx̄/dσ = ε = σ x̄ / (σ² + v)
    error = error * torch.exp(torch.trapezoid(slope, nodes))
    assert torch.isclose(error, torch.sqrt(v / (sigma[0].square() + v)), rtol=1e-6)
    gains = SamplerGains(context)
    gains._variance.append(v)
    gains._gain += 1.0
    gains._passes += 1.0
    expected = (sigma[:-1] - sigma[1:]).square() * v / (sigma[1:].square() + v)
    assert torch.allclose(gains.weights(), expected)


def test_second_run_computes_nothing_and_a_damaged_output_is_redone(
    pipe: Any, configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    context = Context.of(pipe, configure("method=paper"))
    first, _ = Stages.at(context, tmp_path).samples()
    assert capsys.readouterr().err.count(": current") == 0
    again, _ = Stages.at(context, tmp_path).samples()
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(": current" in line for line in lines if line[0].isdigit())
    assert torch.equal(first.images(), again.images())
    damaged = next(tmp_path.glob("2_*/moments.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-7])
    redone, _ = Stages.at(context, tmp_path).samples()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("2 ")]
    assert len(lines) == 1 and ": current" not in lines[0]
    assert torch.equal(redone.images(), first.images())


def test_another_interval_never_reads_the_first_ones_files(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    plans = [
        Stages.at(Context.of(pipe, configure("method=paper", f"cache.interval={n}")), tmp_path, quiet=True).plan()[0]
        for n in (2, 3)
    ]
    assert [len(plan.schedule.refresh_steps) for plan in plans] == [3, 2]
    assert len(list(tmp_path.glob("5_*"))) == 2


@pytest.mark.parametrize(("cost", "apart"), [("quantised", True), ("joint", True), ("l2", False), ("drift", False)])
def test_calibration_depends_on_the_bits_that_its_cost_rounds_to(
    pipe: Any, configure: Configure, tmp_path: Path, cost: str, apart: bool
) -> None:
    keys = {
        Stages.at(
            Context.of(pipe, configure("method=paper", f"schedule.cost={cost}", f"quant.activation_bits={bits}")),
            tmp_path,
        ).calibration_key()
        for bits in (4, 8)
    }
    assert len(keys) == (2 if apart else 1)


def test_a_single_stage_asks_for_the_ones_before_it(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    context = Context.of(pipe, configure("method=paper"))
    with pytest.raises(UserError, match=r"stage 1 \(calibrate\) has no output"):
        Stages.at(context, tmp_path, only=3, quiet=True).run(3)
    for number in range(1, 7):
        Stages.at(context, tmp_path, only=number, quiet=True).run(number)
    assert list(tmp_path.glob("6_sample-*/images-*.safetensors"))


@pytest.mark.parametrize("method", ["naive", "dps", "dec_cache", "paper", "uniform_dec", "best"])
def test_every_method_makes_finite_images_of_the_same_noise(
    pipe: Any, configure: Configure, tmp_path: Path, method: str
) -> None:
    context = Context.of(pipe, configure(f"method={method}"))
    plan, _ = Stages.at(context, tmp_path, quiet=True).plan()
    made, full = draw(context, plan, [5, 6], "test"), draw(context, None, [5, 6], "test")
    assert made.images.shape == full.images.shape == (2, 1, 16, 16)
    assert made.images.isfinite().all()
    assert (made.images - full.images).abs().mean() < 0.1


def test_corrections_on_every_layer_need_the_free_running_fit(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="free_running"):
        configure("method=paper", "correction.layers=all")
    context = Context.of(pipe, configure("correction.layers=all"))
    plan, _ = Stages.at(context, tmp_path, quiet=True).plan()
    assert plan.quant is not None and set(plan.correction.layers) == set(plan.quant.layers)
