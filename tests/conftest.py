"""Fixtures of every test."""

import os
import threading
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels run on the CPU; read when it is first imported

import pytest
import torch
from tqdm import tqdm

# Tests kill forked processes at random moments. tqdm's own lock is a semaphore that all of them share: one that dies with it
# would leave every other waiting for ever.
tqdm.monitor_interval = 0
tqdm.set_lock(threading.RLock())

torch.set_num_threads(1)  # the tensors are tiny: threads cost more than they bring


def _make_torchvision_importable() -> list[torch.library.Library]:
    """torchvision from the package index is built for CUDA: beside a CPU torch its operators are missing.

    Nothing here calls them, but the import asks for their schemas. In an environment without torchvision, or with one
    that fits its torch, nothing is done.
    """
    if find_spec("torchvision") is None:
        return []
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return [library]
    return []


_OPERATORS = _make_torchvision_importable()  # held, or they would be gone again


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Reference values made with other programs; CACHEQUANT_GOLDEN names the folder."""
    default = Path(__file__).resolve().parents[2] / "shared" / "golden"
    folder = Path(os.environ.get("CACHEQUANT_GOLDEN", default))
    if not folder.is_dir():
        pytest.skip(f"no golden data in {folder}; set CACHEQUANT_GOLDEN to its folder")
    return folder
