"""DEC against float64 least squares and normal equations."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cachequant.correction import Moments, fit_affine, fold_into_epilogue
from cachequant.kernels.reference import Geometry, epilogue, product
from cachequant.types import AffineMap, Correction

SEEDS = st.integers(0, 2**31 - 1)


def pair(seed: int, shape: tuple[int, ...], channel_dim: int = 1, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """x and y = a·x + b + noise with another scale and offset per channel."""
    generator = torch.Generator().manual_seed(seed)
    column = [1] * len(shape)
    column[channel_dim] = shape[channel_dim]
    mean, spread, a, b = (torch.randn(column, generator=generator) for _ in range(4))
    x = mean + (spread.abs() + 0.1) * torch.randn(shape, generator=generator)
    return x, a * x + b + noise * torch.randn(shape, generator=generator)


def columns(x: Tensor, channel_dim: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[C, n] in float64."""
    return x.movedim(channel_dim, 0).flatten(1).double().numpy()


def squared_error(target: Tensor, prediction: Tensor) -> Tensor:
    """[C] with channels at dimension 1."""
    return (target.double() - prediction.double()).square().transpose(0, 1).flatten(1).sum(1)


# The map


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 7, 5), (5,)])
def test_a_map_acts_on_each_channel_alone(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, older = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    channel_dim = shape.index(5)
    fit = AffineMap(*(torch.randn(5, generator=generator) for _ in range(3)))
    assert fit.previous is not None
    for dim in (channel_dim, channel_dim - len(shape)):
        y = fit.apply(x, older, channel_dim=dim)
        for c in range(5):
            here = (x.select(channel_dim, c), older.select(channel_dim, c))
            expected = fit.scale[c] * here[0] + fit.shift[c] + fit.previous[c] * here[1]
            torch.testing.assert_close(y.select(channel_dim, c), expected)


def test_the_identity_map_changes_no_bit() -> None:
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(AffineMap.identity(3).apply(x), x)


def test_a_forecast_without_the_older_feature_is_refused() -> None:
    fit = AffineMap(torch.ones(2), torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="x_previous"):
        fit.apply(torch.zeros(1, 2, 3))


def test_a_map_moves_to_another_precision_whole() -> None:
    moved = AffineMap(torch.ones(2), torch.zeros(2), torch.ones(2)).to("cpu", torch.float64)
    assert moved.previous is not None
    assert {moved.scale.dtype, moved.shift.dtype, moved.previous.dtype} == {torch.float64}


def test_a_correction_knows_whether_it_forecasts() -> None:
    plain, forecast = AffineMap.identity(2), AffineMap(torch.ones(2), torch.zeros(2), torch.zeros(2))
    maps = Correction({1: plain}, {"layer": {0: plain}})
    assert not maps.uses_forecast
    assert maps.with_cache({1: plain, 2: forecast}).uses_forecast
    assert maps.with_cache({}).layers is maps.layers


# One regressor


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.lists(st.integers(2, 5), min_size=2, max_size=4), st.integers(0, 3), st.booleans())
def test_the_fit_is_least_squares_in_every_channel(seed: int, sizes: list[int], position: int, negative: bool) -> None:
    shape = tuple(sizes)
    channel_dim = position % len(shape)
    x, y = pair(seed, shape, channel_dim)
    fit = fit_affine(x, y, channel_dim - len(shape) if negative else channel_dim)
    assert fit.previous is None
    predicted = columns(fit.apply(x, channel_dim=channel_dim), channel_dim)
    for c, (u, v) in enumerate(zip(columns(x, channel_dim), columns(y, channel_dim), strict=True)):
        design = np.stack([u, np.ones_like(u)], axis=1)
        exact = design @ np.linalg.lstsq(design, v, rcond=None)[0]
        np.testing.assert_allclose(predicted[c], exact, rtol=1e-4, atol=1e-4 * np.abs(v).max())


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.floats(0, 10))
def test_no_channel_gets_worse_than_without_a_correction(seed: int, ridge: float) -> None:
    x, y = pair(seed, (3, 6, 4, 4), noise=1.0)
    moments = Moments()
    moments.update((x,), y)
    before = squared_error(y, x)
    assert torch.all(squared_error(y, moments.solve(ridge).apply(x)) <= before * (1 + 1e-5) + 1e-9)


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_the_residual_has_no_mean_and_no_correlation_with_the_regressor(seed: int) -> None:
    x, y = pair(seed, (3, 6, 4, 4))
    u, residual = columns(x, 1), columns(y - fit_affine(x, y).apply(x), 1)
    assert np.all(np.abs(residual.mean(1)) < 1e-5)
    assert np.all(np.abs(((u - u.mean(1, keepdims=True)) * residual).mean(1)) < 1e-4)


def test_an_exact_relation_is_recovered() -> None:
    x, y = pair(0, (4, 3, 8, 8), noise=0.0)
    torch.testing.assert_close(fit_affine(x, y).apply(x), y, rtol=1e-5, atol=1e-5)


def test_the_order_of_the_pairs_does_not_matter() -> None:
    x, y = pair(0, (64, 3))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    one, other = fit_affine(x, y), fit_affine(x[order], y[order])
    torch.testing.assert_close(one.scale, other.scale)
    torch.testing.assert_close(one.shift, other.shift)


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.floats(0.5, 4), st.floats(-3, 3))
def test_the_fit_follows_a_change_of_units(seed: int, unit: float, offset: float) -> None:
    x, y = pair(seed, (4, 3, 4, 4))
    plain, changed = fit_affine(x, y), fit_affine(x * unit + offset, y)
    torch.testing.assert_close(changed.scale * unit, plain.scale, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(changed.apply(x * unit + offset), plain.apply(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-3, 1e4])
def test_a_constant_channel_keeps_its_scale_and_moves_by_the_mean_difference(value: float) -> None:
    x, y = pair(0, (4, 3, 8, 8))
    x[:, 1] = value
    fit = fit_affine(x, y)
    assert float(fit.scale[1]) == 1.0
    assert float(fit.shift[1]) == pytest.approx(float(y[:, 1].double().mean()) - value, rel=1e-5, abs=1e-5)
    assert torch.isfinite(fit.scale).all() and torch.isfinite(fit.shift).all()
    alone = fit_affine(x[:, [0, 2]], y[:, [0, 2]])  # the other channels do not notice
    torch.testing.assert_close(fit.scale[[0, 2]], alone.scale)


@pytest.mark.parametrize("regressors", [1, 2])
def test_a_variance_that_is_rounding_noise_counts_as_none(regressors: int) -> None:
    """The noise follows the target, so that any weight given to it would show."""
    _, y = pair(0, (4, 3, 8, 8))
    noise = 1e4 + 1e-2 * y.double()
    moments = Moments()
    moments.update((noise, noise)[:regressors], y.double())
    fit = moments.solve()
    assert fit.scale.tolist() == [1.0] * 3
    assert fit.previous is None or fit.previous.tolist() == [0.0] * 3


def test_one_pair_per_channel_moves_by_the_difference() -> None:
    fit = fit_affine(torch.tensor([[2.0, -1.0]]), torch.tensor([[5.0, 1.0]]))
    assert fit.scale.tolist() == [1.0, 1.0] and fit.shift.tolist() == [3.0, 2.0]


def test_different_shapes_and_empty_moments_are_refused() -> None:
    with pytest.raises(ValueError, match="must agree"):
        fit_affine(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="no pairs"):
        Moments().solve()


# Streaming


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(1, 2), st.lists(st.integers(1, 7), min_size=0, max_size=4))
def test_chunks_give_what_one_shot_gives(seed: int, regressors: int, cuts: list[int]) -> None:
    x, y = pair(seed, (8, 3, 4, 4))
    features = (x, pair(seed + 1, (8, 3, 4, 4))[0])[:regressors]
    whole, parts = Moments(), Moments()
    whole.update(features, y)
    bounds = sorted({0, 8, *cuts})
    for start, end in itertools.pairwise(bounds):
        parts.update(tuple(f[start:end] for f in features), y[start:end])
    assert whole.gram is not None and parts.gram is not None
    torch.testing.assert_close(parts.gram, whole.gram, rtol=1e-12, atol=1e-12)
    resumed = Moments(parts.gram).solve()
    torch.testing.assert_close(resumed.scale, whole.solve().scale, rtol=1e-6, atol=1e-6)


def test_memory_does_not_grow_with_the_pairs() -> None:
    moments = Moments()
    for seed in range(3):
        x, y = pair(seed, (4, 3, 8, 8))
        moments.update((x, x.square()), y)
        assert moments.gram is not None and moments.gram.shape == (3, 4, 4)


def test_moments_carry_no_gradient() -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert not fit_affine(x, x.detach() * 2).scale.requires_grad


# Two regressors: the forecast


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_two_regressors_are_least_squares(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = pair(seed, (4, 3, 4, 4))
    older = 0.6 * x + torch.randn(x.shape, generator=generator)
    y = y + 0.5 * older
    moments = Moments()
    moments.update((x, older), y)
    predicted = columns(moments.solve().apply(x, older), 1)
    for c in range(3):
        design = np.stack([columns(x, 1)[c], columns(older, 1)[c], np.ones(64)], axis=1)
        exact = design @ np.linalg.lstsq(design, columns(y, 1)[c], rcond=None)[0]
        np.testing.assert_allclose(predicted[c], exact, rtol=1e-4, atol=1e-4 * np.abs(exact).max())


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.sampled_from([1e-4, 1e-2, 1.0]), st.integers(1, 2))
def test_the_ridge_solves_its_normal_equations_and_shrinks_towards_no_change(
    seed: int, ridge: float, regressors: int
) -> None:
    x, y = pair(seed, (4, 3, 4, 4))
    older = 0.6 * x + pair(seed + 1, (4, 3, 4, 4))[0]
    features = (x, older)[:regressors]
    moments = Moments()
    moments.update(features, y)
    fit = moments.solve(ridge)
    for c in range(3):
        u = np.stack([columns(f, 1)[c] for f in features])  # [F, n]
        v = columns(y, 1)[c]
        covariance = np.atleast_2d(np.cov(u, bias=True))
        damped = covariance + ridge * np.diag(np.diag(covariance))
        start = np.eye(regressors)[0]
        cross = (u - u.mean(1, keepdims=True)) @ (v - v.mean()) / v.size
        theta = start + np.linalg.solve(damped, cross - covariance @ start)
        found = [float(fit.scale[c])] + ([] if fit.previous is None else [float(fit.previous[c])])
        np.testing.assert_allclose(found, theta, rtol=1e-4, atol=1e-5)
        shift = v.mean() - theta @ u.mean(1)
        assert float(fit.shift[c]) == pytest.approx(shift, rel=1e-3, abs=1e-4)


def test_an_endless_ridge_changes_nothing_but_the_mean() -> None:
    x, y = pair(0, (4, 3, 8, 8))
    moments = Moments()
    moments.update((x, x.square()), y)
    fit = moments.solve(1e12)
    assert fit.previous is not None
    torch.testing.assert_close(fit.scale, torch.ones(3))
    torch.testing.assert_close(fit.previous, torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(fit.shift, (y - x).transpose(0, 1).flatten(1).mean(1), rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.sampled_from([0.0, 1e-4]))
def test_a_second_regressor_never_predicts_worse_than_one(seed: int, ridge: float) -> None:
    x, y = pair(seed, (4, 3, 4, 4))
    older = pair(seed + 1, (4, 3, 4, 4))[0]
    one, two = Moments(), Moments()
    one.update((x,), y)
    two.update((x, older), y)
    single = squared_error(y, one.solve().apply(x))
    double = squared_error(y, two.solve(ridge).apply(x, older))
    assert torch.all(double <= single * (1 + 1e-4 + ridge) + 1e-6)


@pytest.mark.parametrize("ridge", [0.0, 1e-4])
@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_dependent_features_predict_as_well_as_one_of_them(factor: float, ridge: float) -> None:
    x, y = pair(0, (4, 3, 8, 8))
    moments = Moments()
    moments.update((x, factor * x), y)
    fit = moments.solve(ridge)
    assert fit.previous is not None
    assert torch.isfinite(fit.scale).all() and fit.scale.abs().max() < 100
    torch.testing.assert_close(fit.apply(x, factor * x), fit_affine(x, y).apply(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_a_constant_second_regressor_is_ignored(value: float) -> None:
    x, y = pair(0, (4, 3, 8, 8))
    older = pair(1, (4, 3, 8, 8))[0]
    older[:, 2] = value
    moments = Moments()
    moments.update((x, older), y)
    fit, alone = moments.solve(), fit_affine(x, y)
    assert fit.previous is not None and float(fit.previous[2]) == 0.0
    torch.testing.assert_close(fit.scale[2], alone.scale[2])
    torch.testing.assert_close(fit.shift[2], alone.shift[2])


def test_with_two_constant_regressors_only_the_mean_moves() -> None:
    _, y = pair(0, (4, 3, 8, 8))
    moments = Moments()
    moments.update((torch.full_like(y, 2.0), torch.full_like(y, -1.0)), y)
    fit = moments.solve()
    assert fit.previous is not None
    assert fit.scale.tolist() == [1.0] * 3 and fit.previous.tolist() == [0.0] * 3
    torch.testing.assert_close(fit.shift, y.transpose(0, 1).flatten(1).mean(1) - 2.0)


# Errors from the sums


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.integers(1, 2), st.floats(-2, 2))
def test_the_error_from_the_sums_is_that_of_the_prediction(seed: int, regressors: int, factor: float) -> None:
    x, y = pair(seed, (4, 3, 4, 4))
    features = (x, pair(seed + 1, (4, 3, 4, 4))[0])[:regressors]
    moments = Moments()
    moments.update(features, y)
    fit = moments.solve()
    other = AffineMap(fit.scale * factor, fit.shift + factor)
    expected = [squared_error(y, prediction) / 64 for prediction in (x, fit.apply(*features), other.apply(x))]
    for found, direct in zip((moments.error(m) for m in (None, fit, other)), expected, strict=True):
        torch.testing.assert_close(found, direct, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments.target_power, squared_error(y, torch.zeros_like(y)) / 64)


# The epilogue


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_map", [False, True])
def test_the_folded_epilogue_is_the_correction_before_the_bias(with_bias: bool, with_map: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(4, 5, 3, padding=1)
    integers = torch.randint(-128, 128, (2, 4, 6, 6), generator=generator).float()
    weight = torch.randint(-128, 128, (5, 4, 3, 3), generator=generator).float()
    p = product(integers, weight, Geometry.of(layer))
    scale = torch.rand(5, generator=generator) * 1e-3
    bias = torch.randn(5, generator=generator) if with_bias else None
    fit = AffineMap(torch.randn(5, generator=generator), torch.randn(5, generator=generator)) if with_map else None
    expected = p * scale[:, None, None]
    expected = expected if fit is None else fit.apply(expected)
    expected = expected if bias is None else expected + bias[:, None, None]
    folded = epilogue(p, *fold_into_epilogue(scale, bias, fit), 1)
    torch.testing.assert_close(folded, expected, rtol=1e-5, atol=1e-5)


# Inflation


@pytest.mark.parametrize("features", [1, 2])
def test_inflation_one_restores_the_targets_variance_and_keeps_its_mean(features: int) -> None:
    generator = torch.Generator().manual_seed(features)
    xs = tuple(torch.randn(4, 3, 50, generator=generator, dtype=torch.float64) for _ in range(features))
    target = sum(xs) + 0.5 * torch.randn(4, 3, 50, generator=generator, dtype=torch.float64) + 2.0
    moments = Moments()
    moments.update(xs, target)
    for inflation in (0.0, 1.0, 2.0):
        fitted = moments.solve(inflation=inflation).to("cpu", torch.float64)
        made = fitted.apply(xs[0], xs[1] if features == 2 else None)
        least = moments.solve().to("cpu", torch.float64).apply(xs[0], xs[1] if features == 2 else None)
        variance, smallest = made.var(dim=(0, 2), correction=0), least.var(dim=(0, 2), correction=0)
        factor = 1 + inflation * ((target.var(dim=(0, 2), correction=0) / smallest).sqrt() - 1)
        assert torch.allclose(variance, smallest * factor.square(), rtol=1e-5)
        assert torch.allclose(made.mean(dim=(0, 2)), target.mean(dim=(0, 2)), atol=1e-5)


def test_inflation_leaves_a_constant_channel_alone() -> None:
    moments = Moments()
    moments.update((torch.ones(2, 1, 8),), torch.randn(2, 1, 8))
    assert moments.solve(inflation=2.0).scale.item() == 1.0


@pytest.mark.parametrize("shape", [(7, 5, 3, 4), (6, 8, 5), (40, 5), (5, 9)])
def test_sums_taken_piece_by_piece_are_the_sums(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    channel_dim = shape.index(5)
    x, y = pair(3, shape, channel_dim)
    whole, pieces = Moments(), Moments()
    whole.update((x,), y, channel_dim)
    monkeypatch.setattr("cachequant.correction.PIECE", 30)
    pieces.update((x,), y, channel_dim - len(shape))
    assert whole.gram is not None and pieces.gram is not None
    torch.testing.assert_close(pieces.gram, whole.gram, rtol=1e-12, atol=1e-12)
