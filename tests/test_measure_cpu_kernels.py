"""The script that holds the CPU's kernels against what they replace: one run of it, and what it divides."""

from __future__ import annotations

import json
import runpy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cachequant.config import repository_folder
from cachequant.kernels import winograd

SCRIPT = repository_folder() / "scripts" / "measure_cpu_kernels.py"
KERNELS = pytest.mark.skipif(winograd.unavailable() is not None, reason=str(winograd.unavailable()))


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@KERNELS
def test_each_kernel_is_timed_and_attention_is_compared_with_float64(script: dict[str, Any], tmp_path: Path) -> None:
    assert script["main"](["--small", "--rounds", "2", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    convolution, attention = found["rows"]
    assert convolution["ms"].keys() == {"winograd", "onednn"} and min(convolution["ms"].values()) > 0
    assert convolution["direct_gmacs_per_second"] == pytest.approx(
        2 * 400 * 32 * 64 * 9 / convolution["ms"]["winograd"] / 1e6
    )
    assert attention["error"]["torch"] < 1e-6 < attention["error"]["cachequant"] < 1e-3


def test_the_first_call_does_not_count(script: dict[str, Any]) -> None:
    calls = iter([0.2, 0.0, 0.0, 0.0])

    def call() -> Tensor:
        time.sleep(next(calls))
        return torch.empty(0)

    assert script["in_turn"]({"only": call}, 3)["only"] < 50.0


def test_elsewhere_it_says_so_in_one_line(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(winograd, "unavailable", lambda: "this processor has no AVX-512 with VNNI")
    assert script["main"](["--small"]) == 2
    assert "error: these kernels do not run here (this processor has no AVX-512 with VNNI)" in capsys.readouterr().err
