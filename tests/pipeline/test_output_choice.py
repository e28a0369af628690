"""Errors on held-out noise, and what is chosen by them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cachequant.config import RunConfig
from cachequant.pipeline import dec_quant
from cachequant.pipeline.calibrate import ScheduleTrial
from cachequant.pipeline.context import HELD_OUT, Context
from cachequant.pipeline.dec_cache import solve_maps
from cachequant.pipeline.dec_quant import OUTPUTS, fit_output
from cachequant.pipeline.features import gather_moments
from cachequant.pipeline.held_out import HeldOut, typical_error
from cachequant.pipeline.sample import draw
from cachequant.pipeline.stages import Stages
from cachequant.plan import Plan
from cachequant.schedule import uniform_schedule
from cachequant.types import Correction, Schedule

Configure = Callable[..., RunConfig]


def error_of(context: Context, plan: Plan, seeds: list[int]) -> float:
    made, exact = (draw(context, used, seeds, "test").images for used in (plan, None))
    return float((made.double() - exact.double()).square().flatten(1).mean(1).log().mean().exp())


def test_an_image_that_tips_over_does_not_decide() -> None:
    exact = torch.zeros(4, 3, 2, 2)
    made = torch.tensor([0.01, 0.01, 0.01, 0.5]).view(4, 1, 1, 1).expand_as(exact)
    assert typical_error(made, exact) == pytest.approx((1e-4**3 * 0.25) ** 0.25, rel=1e-6)
    assert typical_error(made, exact) < typical_error(exact + 0.03, exact) < float((made - exact).square().mean())
    assert 0.0 <= typical_error(exact, exact) < 1e-20


def test_the_error_of_a_schedule_is_that_of_a_plan_that_holds_its_feature_as_configured(
    pipe: Any, configure: Configure
) -> None:
    context = Context.of(pipe, configure("cache.feature_bits=8", "quant.enabled=false"))
    trial, schedule = ScheduleTrial(context), uniform_schedule(context.num_steps, 3)
    settings = context.config.correction
    maps = solve_maps(gather_moments(trial.context, schedule), settings.ridge, settings.inflation)
    plan = Plan(context.config, context.identity, context.timesteps, schedule, Correction(maps))
    assert trial.error(schedule) == pytest.approx(error_of(context, plan, trial.held_out.seeds), rel=1e-9)


def test_the_output_that_is_nearest_on_held_out_noise_is_chosen(
    pipe: Any, configure: Configure, tmp_path: Path
) -> None:
    common = ("quant.weight_bits=4", "quant.rounding=nearest", "backend=simulated", "calibration.batch_size=4")
    plans: dict[str, Plan] = {}
    for output in ("auto", *OUTPUTS):
        context = Context.of(pipe, configure(*common, f"correction.output={output}"))
        plans[output], _ = Stages.at(context, tmp_path, quiet=True).plan()
    seeds = context.seeds(HELD_OUT, len(context.paired_seeds))
    errors = {output: error_of(context, plans[output], seeds) for output in OUTPUTS}
    assert plans["auto"].provenance["output"] == pytest.approx(errors, rel=1e-4)
    assert len(set(errors.values())) == len(OUTPUTS) and "output" not in plans[OUTPUTS[0]].provenance
    nearest = min(errors, key=lambda output: errors[output])
    expected = plans[nearest if errors[nearest] < 0.95 * errors["spread"] else "spread"].correction.output
    made = plans["auto"].correction.output
    assert set(made) == set(expected)
    assert all(torch.equal(made[step].scale, expected[step].scale) for step in made)


@pytest.mark.parametrize(
    ("errors", "chosen"),
    [((1.0, 0.96, 2.0), "spread"), ((1.0, 0.94, 0.93), "refreshes"), ((1.0, 0.9, 0.97), "least_squares")],
)
def test_the_spread_is_kept_unless_another_is_clearly_nearer(
    pipe: Any, configure: Configure, monkeypatch: pytest.MonkeyPatch, errors: tuple[float, ...], chosen: str
) -> None:
    def fit(context: Context, *_: Any) -> Correction:
        return Correction({}, {context.config.correction.output: {}})

    def error(_: HeldOut, schedule: Schedule, correction: Correction, state: object) -> float:
        return errors[OUTPUTS.index(next(iter(correction.layers)))]

    monkeypatch.setattr(dec_quant, "fit_quantised", fit)
    monkeypatch.setattr(HeldOut, "error", error)
    context = Context.of(pipe, configure("correction.output=auto"))
    made, found = fit_output(context, uniform_schedule(6, 2), Correction(), None, torch.zeros(6, 1))
    assert set(made.layers) == {chosen} and list(found.values()) == list(errors)


def test_maps_of_refreshes_are_those_of_full_steps_alone(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    context = Context.of(pipe, configure("correction.output=refreshes", "schedule.kind=uniform", "cache.interval=3"))
    plan, _ = Stages.at(context, tmp_path, quiet=True).plan()
    assert set(plan.correction.output) == {0, 3}
