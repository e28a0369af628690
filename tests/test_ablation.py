"""The ablation's arithmetic: means over seeds, and the share of the naive damage that a row removes."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from cachequant.config import load_config, repository_folder
from cachequant.costs import COSTS


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablation", repository_folder() / "scripts" / "ablation.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
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


@pytest.mark.parametrize("name", COSTS)
def test_every_cost_of_the_schedule_is_a_row(ablation: ModuleType, name: str) -> None:
    _, overrides = ablation.split_row(f"{name}:paper,schedule.cost={name},cache.refreshes=12", 5)
    config = load_config(repository_folder() / "configs" / "fashion.yaml", overrides)
    assert config.schedule.cost == name and config.schedule.kind == "dps" and config.cache.refreshes == 12
