"""Fixtures of every test."""

import os
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels run on the CPU; read when it is first imported

import pytest
import torch

torch.set_num_threads(1)  # the tensors are tiny: threads cost more than they bring


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Reference values made with other programs; CACHEQUANT_GOLDEN names the folder."""
    default = Path(__file__).resolve().parents[2] / "shared" / "golden"
    folder = Path(os.environ.get("CACHEQUANT_GOLDEN", default))
    if not folder.is_dir():
        pytest.skip(f"no golden data in {folder}; set CACHEQUANT_GOLDEN to its folder")
    return folder
