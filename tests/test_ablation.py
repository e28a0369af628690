"""The ablation's arithmetic: means over seeds, and the share of the naive damage that a row removes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from cachequant.config import load_config, repository_folder
from cachequant.costs import COSTS
from cachequant.errors import UserError


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablation", repository_folder() / "scripts" / "ablation.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def result(row: str, interval: int, seed: int, distance: float, psnr: float | None = 20.0) -> dict[str, object]:
    return {"row": row, "interval": interval, "seed": seed, "distance": distance, "psnr": psnr}


def test_share_removed_counts_only_seeds_that_have_a_naive_row(ablation: ModuleType) -> None:
    results = [
        result("full", 1, 0, 2.0, None),
        result("full", 1, 1, 3.0, None),
        result("naive", 10, 0, 12.0),
        result("ours", 10, 0, 4.0, 30.0),
        result("ours", 10, 1, 99.0, 99.0),
    ]
    lines = ablation.markdown(results).splitlines()
    assert lines[2] == "| full | 2.50 | – | – |"
    assert lines[3] == "| naive | 12.00 (1) | 20.0 | 0% |"
    assert lines[4] == "| ours | 4.00 (1) | 30.0 | 80% |"


def test_rows_are_a_label_a_method_and_overrides(ablation: ModuleType) -> None:
    assert ablation.split_row("paper", 5) == ("paper", ["cache.interval=5", "method=paper"])
    label, overrides = ablation.split_row("ours:best,correction.forecast=false", 10)
    assert label == "ours" and overrides == ["cache.interval=10", "method=best", "correction.forecast=false"]


def test_retrieval_is_a_column_where_it_was_measured(ablation: ModuleType) -> None:
    results = [
        {**result("full", 1, 0, 0.25, None), "retrieval": 0.5},
        {**result("naive", 5, 0, 0.75), "retrieval": 0.25},
        {**result("ours", 5, 0, 0.5), "retrieval": 0.375},
    ]
    lines = ablation.markdown(results).splitlines()
    assert lines[2] == "| full | 0.2500 | – | – | 50.0% |"
    assert lines[4] == "| ours | 0.5000 (1) | 20.0 | 50% | 37.5% |"
    assert all(line.count("|") == lines[0].count("|") for line in lines[1:])


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fashion_ldm", "drawings_sd"])
def test_decoded_images_of_latent_miniatures_are_judged(config: str, ablation: ModuleType, tmp_path: Path) -> None:
    path, out = repository_folder() / "configs" / f"{config}.yaml", tmp_path / "out.json"
    changes = ["sampler.steps=4", "calibration.samples=2", "calibration.batch_size=2"]
    argv = [str(path), "--intervals", "2", "--seeds", "1", "--samples", "4", "--batch-size", "2", "--device", "cpu"]
    argv += ["--out", str(out), "--row", "naive", "--row", "ours:best"]
    argv += [word for change in changes for word in ("--set", change)]
    ablation.main(argv)
    first = json.loads(out.read_text())
    rows = {row["row"]: row for row in first["results"]}
    assert list(rows) == ["full", "naive", "ours"]
    assert rows["full"]["feature_distance"] == 0.0 and rows["full"]["psnr"] is None
    assert all(rows[name]["feature_distance"] > 0 and rows[name]["psnr"] > 5 for name in ("naive", "ours"))
    assert ("retrieval" in rows["ours"]) == (config == "drawings_sd")
    ablation.main(argv)
    assert json.loads(out.read_text())["results"] == first["results"]  # nothing was measured twice


def test_models_without_a_judge_are_refused(ablation: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="miniature 'other' is not in"):
        ablation.main(
            [
                str(repository_folder() / "configs" / "fashion.yaml"),
                "--set",
                "model.name=other",
                "--out",
                str(tmp_path / "x"),
            ]
        )


@pytest.mark.parametrize("name", COSTS)
def test_every_cost_of_the_schedule_is_a_row(ablation: ModuleType, name: str) -> None:
    _, overrides = ablation.split_row(next(row for row in ablation.BY_COST if row.startswith(f"{name}:")), 5)
    config = load_config(repository_folder() / "configs" / "fashion.yaml", overrides)
    assert (config.method, config.cache.interval, config.schedule.cost) == ("best", 5, name)
    assert config.schedule.kind == "dps" and not config.schedule.fallback


def test_rows_of_ones_own_and_of_every_cost_exclude_each_other(ablation: ModuleType) -> None:
    with pytest.raises(SystemExit):
        ablation.parse(["x.yaml", "--out", "x.json", "--costs", "--row", "naive"])
    assert ablation.parse(["x.yaml", "--out", "x.json", "--costs"]).row == []
