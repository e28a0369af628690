"""The map of the prediction, which may keep a spread, against closed forms."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cachequant.correction import Moments, fit_affine, solve_prediction

SEEDS = st.integers(0, 2**31 - 1)


def prediction_sums(seed: int) -> tuple[Tensor, Tensor, Tensor, Moments]:
    """x_t, an imperfect prediction, the exact one, and their sums."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)

    x = 0.3 + 2 * noise()
    exact = 0.1 + 0.8 * x + 0.5 * noise()
    made = 0.7 * exact + 0.2 * x + 0.3 * noise() - 0.2
    sums = Moments()
    sums.update((made, x), exact)
    return x, made, exact, sums


def rows(t: Tensor) -> Tensor:
    """[B, C, H, W] -> [C, n]."""
    return t.transpose(0, 1).flatten(1)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(0.8, 1.4))
def test_a_prediction_is_given_the_spread_that_was_asked_for(seed: int, factor: float) -> None:
    x, made, _, sums = prediction_sums(seed)
    p, q = 1.0, -0.9
    plain = solve_prediction(sums, 0.0)
    now = rows(p * x + q * plain.apply(made, x)).std(1, correction=0)
    mapped = solve_prediction(sums, 0.0, (p, q), factor * now).apply(made, x)
    least = rows(p * x + q * _explained(x, plain.apply(made, x))).std(1, correction=0)  # what x_t alone gives
    own = now**2 - least**2
    wanted = (factor * now).clamp((least**2 + own / 4).sqrt(), (least**2 + 4 * own).sqrt())  # k is in [1/2, 2]
    torch.testing.assert_close(rows(p * x + q * mapped).std(1, correction=0), wanted, rtol=1e-5, atol=1e-6)


def _explained(x: Tensor, y: Tensor) -> Tensor:
    """E[y | x] per channel, linear."""
    slope = fit_affine(x, y)
    return slope.apply(x)


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_a_spread_changes_neither_the_mean_nor_what_x_explains(seed: int) -> None:
    x, made, exact, sums = prediction_sums(seed)
    mapped = solve_prediction(sums, 0.0, (1.0, -0.9), torch.full((3,), 1.1)).apply(made, x)
    torch.testing.assert_close(rows(mapped).mean(1), rows(exact).mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(_explained(x, mapped), _explained(x, exact), rtol=1e-4, atol=1e-4)


def test_without_a_spread_the_prediction_is_fitted_by_least_squares() -> None:
    x, made, exact, sums = prediction_sums(0)
    fit = solve_prediction(sums, 0.0)
    for c in range(3):
        design = torch.stack([made[:, c].flatten(), x[:, c].flatten(), torch.ones(6 * 64, dtype=torch.float64)], dim=1)
        expected = torch.linalg.lstsq(design, exact[:, c].flatten()[:, None]).solution[:, 0]
        assert fit.previous is not None
        found = torch.stack([fit.scale[c], fit.previous[c], fit.shift[c]]).double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_exact_prediction_stays_as_it_is_bit_by_bit() -> None:
    x, _, exact, _ = prediction_sums(1)
    sums = Moments()
    sums.update((exact, x), exact)
    assert torch.equal(solve_prediction(sums, 1e-4).apply(exact, x), exact)


def test_a_constant_prediction_is_not_divided_by_zero() -> None:
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sums = Moments()
    sums.update((torch.ones_like(x), x), torch.zeros_like(x))
    fit = solve_prediction(sums, 0.0, (1.0, -1.0), torch.ones(1))
    assert all(torch.isfinite(t).all() for t in (fit.scale, fit.shift, fit.previous) if t is not None)
