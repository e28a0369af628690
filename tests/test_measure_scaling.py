"""The scaling script: what it divides by what, and one run of it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from cachequant.config import repository_folder

SCRIPT = repository_folder() / "scripts" / "measure_scaling.py"


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_speed_up_and_efficiency_are_of_the_medians_over_the_first_row(script: dict[str, Any]) -> None:
    seconds = {2: (8.0, 20.0, 10.0), 4: (5.0, 1.0, 9.0), 8: (6.0, 5.0, 4.0)}
    runs = [{"workers": n, "images": 40, "seconds": seconds[n][i]} for i in range(3) for n in seconds]
    rows = script["compare"](runs)
    assert [row["seconds"] for row in rows] == [10.0, 5.0, 5.0] and rows[0]["runs"] == [8.0, 20.0, 10.0]
    assert [row["images_per_second"] for row in rows] == [4.0, 8.0, 8.0]
    assert [row["speed_up"] for row in rows] == [1.0, 2.0, 2.0]
    assert [row["efficiency"] for row in rows] == [1.0, 1.0, 0.5]


def test_a_batch_before_the_rounds_is_not_counted(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    def measured(_: Any, workers: int, count: int) -> dict[str, float]:
        calls.append((workers, count))
        return {"workers": workers, "images": count, "seconds": 99.0 if len(calls) == 1 else 8.0 / workers}

    rows: list[list[dict[str, Any]]] = []
    inside = script["main"].__globals__
    compare = inside["compare"]
    monkeypatch.setitem(inside, "measure", measured)
    monkeypatch.setitem(inside, "compare", lambda runs: rows.append(compare(runs)) or rows[-1])
    assert script["main"](["plan", "--workers", "1,2", "--count", "640", "--batch-size", "64", "--rounds", "2"]) == 0
    assert calls == [(1, 64), *[(1, 640), (2, 640)] * 2]
    assert [row["speed_up"] for row in rows[0]] == [1.0, 2.0]


def test_no_rounds_are_refused(script: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert script["main"](["plan", "--rounds", "0"]) == 2
    assert capsys.readouterr().err.strip() == "error: --rounds is 0, expected at least 1"


@pytest.mark.slow
def test_it_measures_the_miniature(script: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import cachequant as cq

    options = [
        "method=naive",
        "sampler.steps=4",
        "cache.interval=2",
        "calibration.samples=2",
        "calibration.batch_size=2",
    ]
    config = cq.load_config(repository_folder() / "configs" / "fashion.yaml", options)
    pipe = cq.load_pipeline(config.model.path, "cpu")
    plan = cq.calibrate(pipe, config, tmp_path / "stages", quiet=True).save(tmp_path / "plan")
    note = tmp_path / "note.json"
    arguments = [
        str(plan),
        "--workers",
        "1",
        "--count",
        "3",
        "--batch-size",
        "2",
        "--device",
        "cpu",
        "--json",
        str(note),
    ]
    assert script["main"](arguments) == 0
    found = json.loads(note.read_text())
    (row,) = found["rows"]
    assert row["workers"] == 1 and row["images"] == 3 and row["speed_up"] == 1.0
    assert row["images_per_second"] == pytest.approx(3 / row["seconds"]) and "measure_scaling.py" in found["command"]
    assert "images/s" in capsys.readouterr().out
    assert script["main"]([str(tmp_path / "absent"), "--workers", "1"]) == 2
