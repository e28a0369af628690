"""The script that measures calibration, on networks of a few channels."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cachequant.config import repository_folder

SMALL = ("sampler.steps=4", "method=paper", "cache.interval=2")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = repository_folder() / "scripts" / "measure_calibration.py"
    spec = importlib.util.spec_from_file_location("measure_calibration", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_system_is_measured_once_and_an_interrupted_one_goes_on(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "calibration.json"
    common = ["--out", str(out), "--tiny", "--scale", "0.03", "--device", "cpu"]
    common += [word for item in SMALL for word in ("--set", item)]
    monkeypatch.setattr(script.subprocess, "run", lambda *a, **k: pytest.fail("another process was started"))
    for name in script.SYSTEMS:
        assert script.main([*common, "--only", name]) == 0
    record: dict[str, Any] = next(iter(json.loads(out.read_text())["runs"].values()))
    assert record["settings"]["tiny"] and set(record["systems"]) == {"stable_diffusion", "imagenet", "dit"}
    for name, system in record["systems"].items():
        assert system["evaluations"] == (5 if name == "stable_diffusion" else 4) and system["refreshes"] == 2
        assert system["total_seconds"] == pytest.approx(sum(s["seconds"] for s in system["stages"].values()))
        assert len(system["stages"]) == 7 and all(s["bytes"] > 0 for s in system["stages"].values())
        assert 0 < system["dps_seconds"] < system["stages"]["1 calibrate"]["seconds"]
        assert system["host_bytes"] > 10**8 and system["plan_bytes"] > 0
    capsys.readouterr()
    assert script.main(common) == 0  # nothing is left to do
    assert capsys.readouterr().out.count("DPS ") == 3
    del record["systems"]["dit"]
    key = next(iter(json.loads(out.read_text())["runs"]))
    out.write_text(json.dumps({"runs": {key: record}}))
    assert script.main([*common, "--only", "dit"]) == 0
    assert "5 fit_dec_quant: current" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "millions", "kept"),
    [("stable_diffusion", 860, 320), ("imagenet", 400, 192), ("dit", 750, 1152)],
)
def test_the_networks_have_the_papers_sizes(script: ModuleType, name: str, millions: int, kept: int) -> None:
    from cachequant.models.adapter import adapter, denoiser_of

    with torch.device("meta"):
        pipe = script.SYSTEMS[name](False)
    count = sum(p.numel() for p in denoiser_of(pipe).parameters()) / 1e6
    assert abs(count - millions) < 0.02 * millions  # DiT-XL's 675 M and 27 copies of its embedding (diffusers' format)
    assert adapter(pipe).width == kept
