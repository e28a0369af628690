"""The script that compares the run time of methods: what it divides by what, and one run of it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from cachequant.config import repository_folder

SCRIPT = repository_folder() / "scripts" / "measure_run_time.py"


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_ratios_are_of_the_same_round(script: dict[str, Any]) -> None:
    """A machine that slows down for a round slows both down."""
    rows = script["compare"]({"paper": [2.0, 8.0, 4.0], "best": [2.2, 8.8, 2.0]}, 4)
    assert [row["seconds_per_image"] for row in rows] == [1.0, 0.55]
    assert [row["against_first"] for row in rows] == pytest.approx([1.0, 1.1])


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--count", "0"]])
def test_nothing_to_measure_is_refused(
    script: dict[str, Any], capsys: pytest.CaptureFixture[str], wrong: list[str]
) -> None:
    assert script["main"](["configs/fashion.yaml", *wrong]) == 2
    assert "expected at least 1 of each" in capsys.readouterr().err


def test_it_draws_with_every_method(script: dict[str, Any], tmp_path: Path) -> None:
    settings = ("sampler.steps=4", "cache.interval=2", "calibration.samples=2", "calibration.batch_size=2")
    settings += ("sample.batch_size=2", "schedule.cost=sampler", "schedule.fallback=false")
    options = [part for setting in settings for part in ("--set", setting)]
    found = tmp_path / "found.json"
    config = str(repository_folder() / "configs" / "fashion.yaml")
    common = ["--rounds", "1", "--count", "3", "--device", "cpu", "--json", str(found)]
    assert script["main"]([config, "--methods", "naive,best", *common, *options]) == 0
    record = json.loads(found.read_text())
    assert [row["method"] for row in record["rows"]] == ["naive", "best"]
    assert all(row["full_steps"] == 2 and row["seconds_per_image"] > 0 for row in record["rows"])
    assert record["rows"][0]["against_first"] == 1.0 and record["command"].startswith(
        "python scripts/measure_run_time.py"
    )


def test_asked_speed_ups_stand_beside_those_that_were_reached(script: dict[str, Any], tmp_path: Path) -> None:
    settings = (
        "sampler.steps=6",
        "cache.interval=2",
        "calibration.samples=2",
        "calibration.batch_size=2",
        "sample.batch_size=2",
    )
    options = [part for setting in settings for part in ("--set", setting)]
    found, config = tmp_path / "found.json", str(repository_folder() / "configs" / "fashion.yaml")
    common = ["--rounds", "1", "--count", "2", "--device", "cpu", "--json", str(found)]
    assert script["main"]([config, "--speedups", "1.2,2", *common, *options]) == 0
    full, slow, fast = json.loads(found.read_text())["rows"]
    assert [row["method"] for row in (full, slow, fast)] == ["full", "1.2x", "2x"]
    assert full["full_steps"] == 6 >= slow["full_steps"] >= fast["full_steps"] >= 1
    assert slow["asked"] == 1.2 and fast["reached"] == pytest.approx(full["runs"][0] / fast["runs"][0])
    assert "asked" not in full
