"""Schedule sensitivity: the candidates are what they are called, and each is judged by its own images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from cachequant.config import RunConfig
from cachequant.costs import COSTS
from cachequant.errors import UserError
from cachequant.pipeline.calibrate import gather
from cachequant.pipeline.context import Context
from cachequant.pipeline.sample import draw
from cachequant.pipeline.stages import Stages
from cachequant.pipeline.studies import schedule as module
from cachequant.pipeline.studies.findings import write_study
from cachequant.pipeline.studies.schedule import Measured, cost_tables, rank_correlations, study
from cachequant.pipeline.studies.subject import StudySubject
from cachequant.schedule import best_schedule, group_costs, schedule_cost
from cachequant.types import Schedule

Configure = Callable[..., RunConfig]
SIGNS = [1 if i % 2 else -1 for i in range(len(COSTS))]


def subject_of(pipe: Any, config: RunConfig, folder: Path) -> StudySubject:
    return StudySubject(Stages.at(Context.of(pipe, config), folder, quiet=True), None, folder)


@pytest.mark.parametrize("name", ["l1", "joint", "forecast_sampler"])
def test_the_tables_of_all_costs_are_those_of_calibrations_for_each(
    pipe: Any, configure: Configure, tmp_path: Path, name: str
) -> None:
    config = configure("method=paper", f"schedule.cost={name}")
    band, weights = cost_tables(subject_of(pipe, config, tmp_path))[name]
    own = gather(Context.of(pipe, config))
    torch.testing.assert_close(band, own.band, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weights, own.weights, rtol=1e-5, atol=0.0)


def test_every_schedule_is_judged_by_the_images_of_a_plan_made_for_it(
    pipe: Any, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RANDOM", 3)
    subject = subject_of(pipe, configure("method=uniform_dec", "quant.enabled=false"), tmp_path)
    found = study(subject, 3)
    records = found.numbers["schedules"]
    assert len(records) == 1 + len(module.POWERS) + len(COSTS) + 3
    tables = cost_tables(subject)
    for name, record in records.items():
        schedule = Schedule(tuple(record["refresh_steps"]), 6, 2)
        assert len(schedule.refresh_steps) == 3
        for cost, (band, weights) in tables.items():
            assert record["costs"][cost] == pytest.approx(
                schedule_cost(group_costs(band, weights, COSTS[cost].coherent), schedule)
            )
        if name.startswith("dps "):
            cost = name.removeprefix("dps ")
            best = best_schedule(tables[cost][0], 2, tables[cost][1], coherent=COSTS[cost].coherent)
            assert record["costs"][cost] == pytest.approx(best.cost)
            assert all(record["costs"][cost] <= other["costs"][cost] * (1 + 1e-9) for other in records.values())
    context, seeds = subject.judging(3)
    exact = draw(context, None, seeds, "test").images
    plan, _ = subject.stages.plan()  # the method's own schedule is the uniform one
    made = draw(context, plan, seeds, "test").images
    assert records["uniform"]["error"] == pytest.approx(float((made - exact).square().mean()), rel=1e-4)
    chosen = replace(subject.stages, chosen=Schedule((0, 1, 5), 6, 2)).plan()[0]
    assert chosen.schedule.refresh_steps == (0, 1, 5)
    lines = {line[0]: line for line in found.tables[0].lines}
    assert len(lines) == 1 + 1 + len(module.POWERS) + len(COSTS) and len(found.figures) == 2


def test_an_interrupted_study_measures_only_what_is_missing(
    pipe: Any, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RANDOM", 2)
    config = configure("method=naive", "quant.enabled=false")
    first = study(subject_of(pipe, config, tmp_path), 2)
    drawn = []
    monkeypatch.setattr(module, "draw", lambda *a, **k: (drawn.append(a[3]), draw(*a, **k))[1])
    again = study(subject_of(pipe, config, tmp_path), 2)
    assert drawn == ["full"] and again.numbers == first.numbers


def test_a_cost_that_knows_the_order_has_rank_correlation_one() -> None:
    schedule = Schedule((0,), 2, 2)
    found = {
        f"random {i}": Measured(
            schedule, {cost: float(sign * i) for cost, sign in zip(COSTS, SIGNS, strict=True)}, i**3, 0.0
        )
        for i in range(5)
    } | {"uniform": Measured(schedule, dict.fromkeys(COSTS, 0.0), 1e9, 0.0)}
    ranks = rank_correlations(found)
    assert list(ranks.values()) == pytest.approx(SIGNS)


def test_costs_and_errors_that_are_all_alike_have_no_rank_correlation() -> None:
    schedule, flat = Schedule((0,), 2, 2), next(iter(COSTS))
    found = {
        f"random {i}": Measured(schedule, {cost: 1.0 if cost == flat else float(i) for cost in COSTS}, i, 0.0)
        for i in range(4)
    }
    ranks = rank_correlations(found)
    assert ranks[flat] is None and all(rank == pytest.approx(1) for cost, rank in ranks.items() if cost != flat)
    same = {name: replace(measured, error=0.5) for name, measured in found.items()}
    assert set(rank_correlations(same).values()) == {None}


def test_a_group_longer_than_any_of_dps_has_no_finite_objective_and_the_page_says_so(
    pipe: Any, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RANDOM", 2)
    config = configure("method=uniform_dec", "quant.enabled=false", "schedule.power=6", "sampler.steps=8")
    subject = subject_of(pipe, config, tmp_path)
    found = study(subject, 2)
    write_study(found, subject.context, tmp_path / "study.html")
    records = json.loads((tmp_path / "study.json").read_text())["schedules"]
    for record in records.values():
        ends = [*record["refresh_steps"], 8]
        beyond = max(end - start for start, end in pairwise(ends)) > 4
        assert all((value is None) is beyond for value in record["costs"].values())
    assert records["power, noisy end"]["refresh_steps"] == [0, 1, 2, 3]  # whose last group has five steps


def test_one_schedule_alone_is_measured_and_has_no_ranks(
    pipe: Any, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RANDOM", 2)
    subject = subject_of(pipe, configure("method=uniform_dec", "quant.enabled=false", "cache.interval=6"), tmp_path)
    found = study(subject, 2)
    write_study(found, subject.context, tmp_path / "study.html")
    assert set(json.loads((tmp_path / "study.json").read_text())["rank_correlation"].values()) == {None}
    lines = {line[0]: line for line in found.tables[0].lines}
    assert lines["dps l1"][4:6] == ["1.000", "–"] and lines["uniform"][4:6] == ["–", "–"]


@pytest.mark.parametrize("changes", [("cache.interval=1",), ("cache.interval=1", "sampler.steps=1")])
def test_steps_that_are_all_full_leave_nothing_to_compare(
    pipe: Any, configure: Configure, tmp_path: Path, changes: tuple[str, ...]
) -> None:
    with pytest.raises(UserError, match=r"cache\.interval is 1 of \d steps.*raise it"):
        study(subject_of(pipe, configure(*changes), tmp_path), 2)
