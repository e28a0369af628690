"""Errors by step against their definitions on the tensors themselves."""

from __future__ import annotations

import pytest
import torch

from cachequant.correction import Moments
from cachequant.evaluation.errors import path_error, relative_errors


def test_relative_errors_are_those_of_the_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(6, 3, 5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    y = 1.5 * x + 0.3 + 0.2 * noise
    sums = Moments()
    sums.update((x,), y)
    before, after = relative_errors({4: sums}, 0.0)
    assert set(before) == set(after) == {4}
    assert before[4] == pytest.approx(float((y - x).norm() / y.norm()))
    fitted = sums.solve().apply(x.float()).double()
    assert after[4] == pytest.approx(float((y - fitted).norm() / y.norm()), rel=1e-5)
    assert after[4] < before[4]


def test_path_error_is_relative_at_each_step() -> None:
    exact = torch.ones(3, 2, 1, 4, 4)
    path = exact * torch.tensor([1.0, 1.1, 0.5]).view(3, 1, 1, 1, 1)
    torch.testing.assert_close(path_error(path, exact), torch.tensor([0.0, 0.1, 0.5]))
