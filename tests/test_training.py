"""The training script on random images: it trains, resumes, exports a pipeline that loads, and says what is missing."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cachequant.config import repository_folder
from cachequant.models.loading import load_pipeline

SCRIPT = repository_folder() / "scripts" / "train" / "train_ddpm.py"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Random images in the idx format, as many as the data set has."""
    folder = tmp_path / "data"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 60_000), ("t10k", 10_000)):
        pixels = torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8, generator=generator).numpy().tobytes()
        labels = bytes(i % 10 for i in range(count))
        (folder / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels)
    return folder


def train(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    fixed = ["--batch-size", "2", "--samples", "0", "--device", "cpu", "--checkpoint-every", "1"]
    places = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *fixed, *places, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_trains_resumes_and_exports(tmp_path: Path, images: Path) -> None:
    first = train(tmp_path, "--data", str(images), "--steps", "1")
    assert first.returncode == 0, first.stderr[-800:]
    second = train(tmp_path, "--data", str(images), "--steps", "2", "--resume")
    assert second.returncode == 0, second.stderr[-800:]
    assert json.loads((tmp_path / "out" / "training.json").read_text())["steps"] == 2
    pipe = load_pipeline(tmp_path / "out", "cpu")
    assert pipe.scheduler.config.clip_sample is False
    weights = tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 16 * 2**20


def test_a_missing_data_set_is_one_line(tmp_path: Path) -> None:
    done = train(tmp_path, "--data", str(tmp_path / "absent"), "--steps", "1")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "fashion" in done.stderr.lower()
