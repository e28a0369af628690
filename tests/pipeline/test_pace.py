"""A time budget in the pipeline: measured times in, refreshes and a schedule out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from cachequant.config import RunConfig
from cachequant.errors import UserError
from cachequant.pipeline import pace as module
from cachequant.pipeline import step_times
from cachequant.pipeline.calibrate import Calibration
from cachequant.pipeline.context import Context
from cachequant.pipeline.stages import Stages
from cachequant.pipeline.step_times import StepTimes, measure_step_times
from cachequant.plan import Plan

Configure = Callable[..., RunConfig]
EQUAL = StepTimes((5.0,) * 6, (1.0,) * 6, overhead=2.0, untouched=50.0)
"""Six steps: 2 + 6 + 4·K milliseconds."""


@pytest.fixture
def counted_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Time goes on by a millisecond with every module that ran and with every look at the clock, and never else."""
    count = itertools.count()

    def tick(*_: Any) -> None:
        next(count)

    monkeypatch.setattr(step_times, "time", SimpleNamespace(perf_counter=lambda: next(count) / 1e3))
    handle = register_module_forward_hook(tick)
    yield
    handle.remove()


@pytest.mark.usefixtures("counted_time")
def test_measured_times_are_of_every_step_and_of_the_whole_run(pipe: Any, configure: Configure) -> None:
    context = Context.of(pipe, configure("backend=simulated"))
    times = measure_step_times(context, untouched=True)
    assert len(times.full) == len(times.cached) == 6 and times.allowance(9e9, None).equal
    assert times.full[0] > times.cached[0] > 0
    assert times.overhead == pytest.approx(
        14
    )  # the hooked network and a look at the clock for each step, and two looks
    assert times.untouched == pytest.approx(6 * times.full[0] + times.overhead)
    assert measure_step_times(context, untouched=False).untouched is None
    assert "forward" not in vars(pipe.unet)


@pytest.mark.parametrize(
    ("setting", "refreshes", "interval"),
    [
        ("cache.budget_ms=12", 1, 6),
        ("cache.budget_ms=19.9", 2, 3),
        ("cache.speedup=2.5", 3, 2),
        ("cache.speedup=1.6", 5, 2),
    ],
)
def test_a_budget_gives_the_largest_number_of_refreshes(
    pipe: Any,
    configure: Configure,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    refreshes: int,
    interval: int,
) -> None:
    monkeypatch.setattr(module, "measure_step_times", lambda *_: EQUAL)
    stages = Stages.at(Context.of(pipe, configure("method=dps", setting)), tmp_path, quiet=True)
    cache = stages.context.config.cache
    assert (cache.refreshes, cache.interval, cache.budget_ms, cache.speedup) == (refreshes, interval, None, None)
    plan, _ = stages.plan()
    spent = 6 + 4 * refreshes
    assert len(plan.schedule.refresh_steps) == refreshes
    assert plan.provenance["budget"]["expected_ms"] == spent <= plan.provenance["budget"]["network_ms"] < spent + 4
    again = Plan.load(plan.save(tmp_path / "plan"))
    assert again.config.cache.refreshes == refreshes and again.schedule == plan.schedule


@pytest.mark.parametrize("kind", ["uniform", "power", "dps"])
def test_every_kind_of_schedule_has_the_refreshes_that_were_asked_for(
    pipe: Any, configure: Configure, tmp_path: Path, kind: str
) -> None:
    for refreshes in (1, 4, 6):
        config = configure("method=dps", f"schedule.kind={kind}", f"cache.refreshes={refreshes}", "quant.enabled=false")
        schedule, _ = Stages.at(Context.of(pipe, config), tmp_path, quiet=True).schedule()
        assert len(schedule.refresh_steps) == refreshes


def test_times_are_measured_once_for_a_run_folder(
    pipe: Any, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()
    monkeypatch.setattr(module, "measure_step_times", lambda *_: (next(calls), EQUAL)[1])
    for setting in ("cache.budget_ms=12", "cache.budget_ms=20", "cache.budget_ms=12"):
        Stages.at(Context.of(pipe, configure(setting)), tmp_path, quiet=True)
    assert next(calls) == 1


def test_times_belong_to_the_format_of_the_feature_and_to_the_machine(
    pipe: Any, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()
    monkeypatch.setattr(module, "measure_step_times", lambda *_: (next(calls), EQUAL)[1])
    Stages.at(Context.of(pipe, configure("cache.budget_ms=12")), tmp_path, quiet=True)
    Stages.at(Context.of(pipe, configure("cache.budget_ms=12", "cache.feature_bits=8")), tmp_path, quiet=True)
    assert next(calls) == 2
    monkeypatch.setattr(module, "machine_name", lambda _: "another card")
    Stages.at(Context.of(pipe, configure("cache.budget_ms=12")), tmp_path, quiet=True)
    assert next(calls) == 4


def test_steps_of_two_prices_are_scheduled_within_the_budget(
    pipe: Any, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = StepTimes((9.0, 9.0, 9.0, 3.0, 3.0, 3.0), (2.0, 2.0, 2.0, 1.0, 1.0, 1.0), 1.0)
    monkeypatch.setattr(module, "measure_step_times", lambda *_: times)
    config = configure("method=dps", "cache.budget_ms=24", "quant.enabled=false")
    stages = Stages.at(Context.of(pipe, config), tmp_path, quiet=True)
    schedule, _ = stages.schedule()
    spent = sum(times.full[t] if schedule.is_refresh(t) else times.cached[t] for t in range(6))
    assert spent <= 23 and stages.context.config.cache.refreshes == 2
    calibration, _ = stages.calibration()
    fixed, _ = Stages(stages.context, stages.store).schedule()
    assert isinstance(calibration, Calibration) and schedule.cost is not None and fixed.cost is not None
    assert schedule.cost <= fixed.cost  # a refresh in the cheap half may be had beside the two
    assert torch.tensor(schedule.refresh_steps).diff().max() <= 6


def test_mistakes_are_one_line(
    pipe: Any, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measure_step_times", lambda *_: EQUAL)
    with pytest.raises(UserError, match=r"budget is 7 ms, expected at least 10: one full step of 5 ms and 5 cached"):
        Stages.at(Context.of(pipe, configure("cache.budget_ms=9")), tmp_path, quiet=True)
    with pytest.raises(UserError, match=r"cache.refreshes and cache.speedup are set, expected at most one"):
        configure("cache.refreshes=2", "cache.speedup=2")
    with pytest.raises(UserError, match=r"cache.refreshes is 7 and sampler.steps is 6"):
        configure("cache.refreshes=7")
    with pytest.raises(UserError, match=r"stage 1 .step_times. has no output"):
        Stages.at(Context.of(pipe, configure("cache.speedup=3")), tmp_path, only=2, quiet=True)


def test_evaluations_of_other_rows_cost_in_proportion() -> None:
    from cachequant.pipeline.step_times import _price

    assert _price({4: 8.0, 2: 5.0}, 4) == 8.0 and _price({4: 8.0}, 2) == 4.0
    assert not replace(EQUAL, full=(5.0,) * 5 + (6.0,)).allowance(50.0, None).equal
