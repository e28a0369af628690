"""The operators' kernels for GPUs on CPU tensors, in Triton's interpreter, with a stand-in for the card."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cachequant.kernels.cuda import dispatch, ops, step_ops


class FirstKernel:
    """A tuning table that measures nothing."""

    def run(self, key: str, names: tuple[str, ...], call: Any, may_measure: bool) -> Any:
        """The first kernel's result."""
        return call(names[0])


def gpu_operators(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Name -> the function that a GPU would run, of every operator; products run on Triton's first tile."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(dispatch, "built", lambda capability: ())
    monkeypatch.setattr(dispatch, "table", lambda device: FirstKernel())
    definitions = [d for module in (ops, step_ops) for d in vars(module).values() if hasattr(d, "_backend_fns")]
    return SimpleNamespace(**{d._name: d._backend_fns["cuda"] for d in definitions})
