"""What is imported and built once, so that processes forked for each case begin at once and write nothing else."""

from __future__ import annotations

from pathlib import Path

import torch

from cachequant.kernels.backend import choose_backend
from tests.toys import save_toy


def ready_model(root: Path) -> Path:
    """A toy model below `root`, with this process ready for all commands on it."""
    import matplotlib.pyplot  # noqa: F401

    import cachequant.pipeline.report
    import cachequant.pipeline.sampling  # noqa: F401

    torch.set_num_threads(1)
    choose_backend("auto", torch.device("cpu"))
    return save_toy("pixels", root / "model")
