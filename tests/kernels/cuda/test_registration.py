"""Kernels for GPUs run on the card of their operands."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cachequant.kernels.cuda.registration import contiguous, gpu_kernel


@pytest.mark.parametrize("several", [False, True])
def test_a_kernel_runs_on_the_card_of_its_first_operand(monkeypatch: pytest.MonkeyPatch, several: bool) -> None:
    current: list[Any] = []

    class Card:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            current.append(self.device)

        def __exit__(self, *_: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Card)
    registered: dict[str, Any] = {}
    operator: Any = SimpleNamespace(register_kernel=lambda kind: lambda kernel: registered.setdefault(kind, kernel))

    @gpu_kernel(operator)
    def _(first: Any, second: int, third: int = 3) -> tuple[Any, ...]:
        return current[-1], second, third

    x = torch.empty(2, device="meta")
    assert registered["cuda"]([x, x] if several else x, 2) == (x.device, 2, 3) and not current


def test_operands_that_a_kernel_would_misread_are_refused() -> None:
    contiguous(None, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"shape \[3, 2\] is not contiguous"):
        contiguous(torch.ones(3, 2), torch.ones(2, 3).T)
