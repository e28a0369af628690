"""The demo and the error study at toy size: every file is there and every number is computed."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from cachequant.config import repository_folder
from cachequant.pipeline.demo import METHODS, run_demo

SMALL = [
    "sampler.steps=6",
    "cache.interval=2",
    "calibration.samples=2",
    "calibration.batch_size=2",
    "sample.count=2",
    "sample.batch_size=2",
]


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    run_demo(folder, "cpu", SMALL)
    return folder


def test_every_file_is_written(demo: Path) -> None:
    for name in ("grid.png", "schedule.png", "error.png", "quality.png"):
        with Image.open(demo / name) as picture:
            assert min(picture.size) > 50
    assert (demo / "report.html").stat().st_size > 10_000
    assert (demo / "plan" / "plan.json").is_file()


def test_metrics_have_the_rows_and_keys_of_the_contract(demo: Path) -> None:
    rows = json.loads((demo / "metrics.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["full", *METHODS]
    keys = {"name", "feature_distance", "psnr", "ssim", "full_step_share", "macs", "bytes", "seconds"}
    assert all(set(row) == keys for row in rows)
    full, *others = rows
    assert full["feature_distance"] == 0 and full["ssim"] == pytest.approx(1.0) and full["full_step_share"] == 1
    for row in others:
        assert row["full_step_share"] == 0.5
        assert row["bytes"] < 0.3 * full["bytes"] and row["macs"] < 0.6 * full["macs"]
        assert math.isfinite(row["psnr"]) and row["feature_distance"] > 0 and row["seconds"] > 0


def test_macs_are_those_of_the_schedule(demo: Path) -> None:
    """Three full and three cached steps: between a half and a half plus three shallow steps."""
    rows = {row["name"]: row for row in json.loads((demo / "metrics.json").read_text())["rows"]}
    assert 0.5 < rows["naive"]["macs"] / rows["full"]["macs"] < 0.56


def test_the_page_shows_the_numbers(demo: Path) -> None:
    page = (demo / "report.html").read_text()
    rows = json.loads((demo / "metrics.json").read_text())["rows"]
    assert all(row["name"] in page for row in rows)
    assert all(f"{row['psnr']:.2f}" in page for row in rows if row["psnr"] is not None)


@pytest.mark.parametrize("error", ["cache", "quant"])
def test_the_error_study_shows_that_fits_lower_the_error(
    tmp_path: Path, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    study = load_script(repository_folder() / "err_add" / "dec.py")
    config = str(repository_folder() / "configs" / "fashion.yaml")
    settings = [word for item in [*SMALL, "method=paper"] for word in ("--set", item)]
    assert study.main([config, "--error", error, *settings, "--out", str(tmp_path)]) == 0
    curves = json.loads((tmp_path / "err_add" / f"{error}.json").read_text())
    assert (tmp_path / "err_add" / f"{error}.png").is_file()
    corrected = [name for name in curves if name.endswith("corrected")]
    assert 2 * len(corrected) == len(curves)
    for name in corrected:
        after = curves[name]
        before = curves[{"corrected": "reused as it is"}.get(name, name.replace("corrected", "rounded"))]
        assert set(before) == set(after) and before
        assert all(after[step] <= before[step] * (1 + 1e-6) for step in before)
    assert "mean" in capsys.readouterr().out
