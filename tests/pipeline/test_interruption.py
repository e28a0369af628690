"""A full disk and a killed run: what was complete stays, the rest is redone, and the result is the same."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cachequant.config import repository_folder
from cachequant.storage import file_hash

CONFIG = str(repository_folder() / "configs" / "fashion.yaml")
SMALL = (
    "sampler.steps=6", "cache.interval=2", "calibration.samples=4", "calibration.batch_size=2", "sample.count=2",
    "sample.batch_size=2", "schedule.fallback=false", "device=cpu",
)  # fmt: skip
STAGES = 8
"""Folders of a finished run: calibrate, schedule, features, cache fit, weights, tables, quantised fit, samples."""


def start(model: Path, out: Path, limit: int | None = None) -> subprocess.Popen[str]:
    """`cachequant run` in its own process; `limit` caps the bytes of any file it writes, as a full disk does."""
    settings = [word for item in (*SMALL, f"model.path={model}") for word in ("--set", item)]
    command = [sys.executable, "-m", "cachequant", "run", CONFIG, "--out", str(out), *settings]

    def cap() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    environment = {**os.environ, "PYTHONPATH": str(repository_folder()), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=cap
    )


def complete(model: Path, out: Path) -> str:
    """A run that must succeed: what it said."""
    process = start(model, out)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return errors


def finished(out: Path) -> dict[str, str]:
    """Hashes of every file of every finished stage, but for what it measured of time."""
    timed = ("done.json", "measured.json", "seconds.json")
    files = [p for folder in out.glob("[1-6]_*") if (folder / "done.json").is_file() for p in folder.iterdir()]
    return {str(p.relative_to(out)): file_hash(p) for p in files if p.name not in timed}


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_what_was_complete_stays(weights_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(weights_file, out, limit=14_000)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("error: cannot write ")
    kept = finished(out)
    assert not list(out.rglob("*.tmp"))
    errors = complete(weights_file, out)
    assert sum(": current" in line for line in errors.splitlines()) == len({name.split("/")[0] for name in kept})
    assert kept.items() <= finished(out).items()


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(weights_file: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    complete(weights_file, whole)
    for stages in (1, 4):  # killed once early and once late
        process = start(weights_file, cut)
        while process.poll() is None and len({name.split("/")[0] for name in finished(cut)}) < stages:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    complete(weights_file, cut)
    assert finished(cut) == finished(whole)
    assert len({name.split("/")[0] for name in finished(whole)}) == STAGES
