"""What a measured time belongs to: versions of what is there, and of nothing else."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
import torch

import cachequant
from cachequant.pipeline import machine
from cachequant.pipeline.machine import PACKAGES, processor_name, versions


def test_versions_name_what_is_installed_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "PACKAGES", (*PACKAGES, "no-such-package"))
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "absent")
    found = versions()
    assert found["cachequant"] == cachequant.__version__ and found["torch"] == torch.__version__
    assert "diffusers" in found and "no-such-package" not in found and "driver" not in found
    assert ("cuda" in found) == (torch.version.cuda is not None)


def test_the_processor_is_named_without_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    monkeypatch.setattr(platform, "processor", None)
    assert processor_name()


@pytest.mark.parametrize(
    "told",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.90.07  Fri May 31 09:35:42 UTC 2024\nGCC version: 12\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.90.07  Release Build\nGCC version: 12\n",
    ],
)
def test_the_driver_tells_its_version(told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "version").write_text(told)
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
    assert versions()["driver"] == "550.90.07"
