"""The residual of a correction from streaming sums, against least squares on stored features in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cachequant.costs import rounding
from cachequant.residual import ResidualBand

SEEDS = st.integers(0, 2**31 - 1)


def walk(seed: int, steps: int, shape: tuple[int, ...] = (2, 3, 4, 4)) -> Tensor:
    """A random walk [T, B, C, H, W] around another mean in each channel."""
    generator = torch.Generator().manual_seed(seed)
    start = 3 * torch.randn(1, 1, shape[1], *[1] * (len(shape) - 2), generator=generator)
    return start + torch.randn(steps, *shape, generator=generator).cumsum(0)


def left(target: Tensor, regressors: list[Tensor], channel_dim: int = 1) -> float:
    """Σ over channels of the squares that least squares with a constant leaves, by SVD in float64.

    Directions that the regressors hardly span are left out: features on a coarse grid may depend on one another.
    """
    total = 0.0
    for channel in range(target.shape[channel_dim]):
        y = target.select(channel_dim, channel).double().flatten()
        columns = [x.select(channel_dim, channel).double().flatten() for x in regressors]
        design = torch.stack([torch.ones_like(y), *columns], dim=1)
        basis, sizes, _ = torch.linalg.svd(design, full_matrices=False)
        basis = basis[:, sizes > 1e-6 * sizes.max()]
        total += float((y - basis @ (basis.T @ y)).square().sum())
    return total


def stream(band: ResidualBand, features: Tensor) -> ResidualBand:
    for feature in features:
        band.update(feature)
    return band


@settings(deadline=None, max_examples=25)
@given(SEEDS, st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_the_streamed_residual_is_that_of_least_squares(seed: int, steps: int, interval: int, rounded: bool) -> None:
    interval, features = min(interval, steps), walk(seed, steps)
    hold = rounding(3) if rounded else None
    values = stream(ResidualBand(steps, interval, hold=hold), features).values
    assert values.shape == (steps, min(2 * interval, steps)) and not values[:, 0].any()
    for t, d in itertools.product(range(steps), range(1, values.shape[1])):
        if d <= t:
            reused = features[t - d] if hold is None else hold(features[t - d])
            assert float(values[t, d]) == pytest.approx(left(features[t], [reused]), rel=1e-6)


@settings(deadline=None, max_examples=15)
@given(SEEDS, st.integers(3, 9), st.integers(1, 3), st.booleans())
def test_the_forecasts_residual_is_that_of_two_regressors(seed: int, steps: int, interval: int, rounded: bool) -> None:
    features, hold = walk(seed, steps), rounding(3) if rounded else None
    values = stream(ResidualBand(steps, interval, reach=2, hold=hold), features).values
    length = min(2 * interval, steps)
    alone = stream(ResidualBand(steps, interval, hold=hold), features).values
    assert values.shape == (steps, length, length + 1)
    torch.testing.assert_close(values[:, :, 0], alone)
    held = features if hold is None else torch.stack([hold(x) for x in features])
    for t, d, p in itertools.product(range(steps), range(1, length), range(1, length + 1)):
        if t - d - p >= 0:
            expected = left(features[t], [held[t - d], held[t - d - p]])
            assert float(values[t, d, p]) == pytest.approx(expected, rel=1e-6)
        elif d <= t:
            assert values[t, d, p] == torch.inf
    assert not values[:, 0].any()


@pytest.mark.parametrize("reach", [1, 2])
def test_batches_and_contexts_are_pooled_into_one_fit(reach: int) -> None:
    first, second = walk(1, 6), walk(2, 6)
    joint = stream(ResidualBand(6, 2, reach=reach), torch.cat([first, second], dim=1)).values
    passes = stream(stream(ResidualBand(6, 2, reach=reach), first), second)
    merged = stream(ResidualBand(6, 2, reach=reach), first)
    merged.merge(stream(ResidualBand(6, 2, reach=reach), second))
    torch.testing.assert_close(passes.values, joint)
    torch.testing.assert_close(merged.values, joint)


def test_channels_may_be_last() -> None:
    features = walk(3, 5)
    last = stream(ResidualBand(5, 2, channel_dim=2), features.flatten(3).transpose(2, 3)).values
    torch.testing.assert_close(last, stream(ResidualBand(5, 2), features).values)


@pytest.mark.parametrize("reach", [1, 2])
def test_an_affine_copy_leaves_nothing_and_a_constant_explains_nothing(reach: int) -> None:
    base = walk(4, 1)[0]
    features = torch.stack([(1 + t) * base + t for t in range(6)])
    power = float((features[5] - features[5].mean(dim=(0, 2, 3), keepdim=True)).square().sum())
    values = stream(ResidualBand(6, 2, reach=reach), features).values
    assert float(values[values.isfinite()].abs().max()) < 1e-6 * power
    features[:3] = 7.0  # steps 0 to 2 are constant in every channel
    values = stream(ResidualBand(6, 2, reach=reach), features).values
    expected = left(features[3], [])
    alone = values if reach == 1 else values[:, :, 0]
    assert float(alone[3, 1]) == pytest.approx(expected, rel=1e-6)
    if reach == 2:
        assert float(values[3, 1, 1]) == pytest.approx(expected, rel=1e-6)


def test_memory_of_features_depends_on_the_interval_alone() -> None:
    for steps in (40, 200):
        band = stream(ResidualBand(steps, 3), torch.zeros(steps, 1, 2, 3, 3))
        assert band.peak_bytes == 6 * 18 * 4
