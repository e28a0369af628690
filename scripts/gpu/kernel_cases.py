"""What every check of a kernel is made of: random integers, poisoned memory, the comparison and its limits.

Tensors are made on torch's default device, which `check_kernels.py` sets to the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor


@dataclass
class Case:
    """One comparison: `error` is ‖out - ref‖ / ‖ref‖, or the share of integers that are off by one."""

    kernel: str
    case: str
    error: float
    limit: float
    ok: bool


def integers(*shape: int, low: int = -128, high: int = 128) -> Tensor:
    """Random int8 of the whole range, or of [low, high)."""
    return torch.randint(low, high, shape, dtype=torch.int8)


def poison(out: Tensor) -> Tensor:
    """The same tensor full of what no kernel may leave behind."""
    return out.fill_(float("nan") if out.is_floating_point() else -77 if out.dtype is torch.int8 else 77)


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, all memory that operators allocate starts poisoned: outputs, sums, workspaces."""

    def full(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: poison(allocate(*args, **kwargs))

    with (
        mock.patch.object(torch, "empty", full(torch.empty)),
        mock.patch.object(torch, "empty_like", full(torch.empty_like)),
    ):
        yield


def compare(kernel: str, case: str, found: Tensor, expected: Tensor, limit: float) -> Case:
    """Floating point by relative norm; integers may be off by one where rounding before them differs, rarely."""
    if found.dtype is torch.int8:
        gap = (found.int() - expected.int()).abs()
        share = float((gap > 0).float().mean())
        return Case(kernel, case, share, limit, bool(gap.max() <= 1) and share <= limit)
    wrong = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    return Case(kernel, case, float(wrong), limit, bool(wrong <= limit))  # NaN never passes


def worst(cases: list[Case]) -> Case:
    """The one of several results of a kernel that counts."""
    return max(cases, key=lambda case: (not case.ok, case.error))


LIMITS = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6, torch.int8: 0.01}


def attempt(kernel: str, case: str, check: Callable[..., Case], *arguments: Any) -> Case:
    """A check in poisoned memory; a kernel that raises fails its case, and the others go on."""
    try:
        with poisoned():
            made = check(*arguments)
        torch.cuda.synchronize()
        return made
    except Exception as error:  # Triton's errors share no base with torch's
        return Case(kernel, f"{case}: {type(error).__name__} {str(error)[:150]}", float("inf"), 0.0, False)


def grid(zero: float, step: float = 0.03) -> Tensor:
    """[4] inverse scale, zero, low, high of an int8 grid."""
    return torch.tensor([1 / step, zero, -128.0, 127.0])
