"""Shrinkage of a fit by what held-out samples confirm."""

import pytest
import torch
from torch import Tensor

from cachequant.correction import Moments, fit_affine, solve_held_out


def halves_of(x: Tensor, y: Tensor) -> tuple[Moments, Moments]:
    made = (Moments(), Moments())
    for half, moments in enumerate(made):
        moments.update((x[half::2],), y[half::2])
    return made


def test_held_out_shrinkage_is_the_factor_with_the_least_held_out_error() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, 5, generator=random).double()
    y = x + torch.tensor([0.0, 0.05, 0.3, 2.0]).view(1, 4, 1) * (x + 1) + torch.randn(6, 4, 5, generator=random)
    halves = halves_of(x, y)
    found, fits = solve_held_out(halves), [half.solve() for half in halves]

    def held_out_error(factor: float) -> Tensor:
        total = torch.zeros(4)
        for fit, unseen in zip(fits, (slice(1, None, 2), slice(0, None, 2)), strict=True):
            change = fit.apply(x[unseen]) - x[unseen]
            total = total + (x[unseen] + factor * change - y[unseen]).square().sum((0, 2))
        return total

    grid = torch.linspace(0, 1, 1001)
    best = grid[torch.stack([held_out_error(float(f)) for f in grid]).argmin(0)]
    whole = fit_affine(x, y)
    torch.testing.assert_close(found.scale, 1 + best * (whole.scale - 1), rtol=0, atol=2e-3)
    torch.testing.assert_close(found.shift, best * whole.shift, rtol=0, atol=2e-3)
    assert best[0] < 0.5 and best[3] > 0.9


def test_what_the_other_half_contradicts_is_left_alone() -> None:
    x = torch.randn(8, 2, 50, generator=torch.Generator().manual_seed(1)).double()
    y = x.clone()
    y[0::2] += 1.0
    y[1::2] -= 1.0
    found = solve_held_out(halves_of(x, y))
    assert torch.equal(found.scale, torch.ones(2)) and torch.equal(found.shift, torch.zeros(2))


def test_equal_halves_confirm_everything_and_a_single_sample_nothing() -> None:
    random = torch.Generator().manual_seed(2)
    x, noise = torch.randn(2, 3, 2, 30, generator=random).double()
    y = 1.5 * x + 0.2 * noise + 0.5
    doubled = halves_of(x.repeat_interleave(2, dim=0), y.repeat_interleave(2, dim=0))
    torch.testing.assert_close(solve_held_out(doubled).scale, fit_affine(x, y).scale)
    alone = solve_held_out(halves_of(x[:1], y[:1]))
    assert torch.equal(alone.scale, torch.ones(2))
    with pytest.raises(ValueError, match="no pairs"):
        solve_held_out((Moments(), Moments()))
