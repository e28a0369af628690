"""Step logic of the feature cache: when it refreshes, what it remembers, what a cached step reads."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.errors import UserError
from cachequant.types import AffineMap, Schedule

SCHEDULE = Schedule((0, 3, 4, 8), num_steps=10, interval=3)


def feature(step: int) -> Tensor:
    """A feature [1, 2, 1, 1] that names the step it was made at."""
    return torch.full((1, 2, 1, 1), float(step))


def run(cache: FeatureCache, steps: int, first: int = 0) -> list[tuple[float, ...]]:
    """What each step could read, oldest last, after its refresh if it had one."""
    seen = []
    for step in range(first, first + steps):
        refreshed = cache.must_refresh
        if refreshed:
            cache.store(feature(step))
        seen.append(tuple(float(f.flatten()[0]) for f in cache.regressors))
        cache.advance(refreshed)
    return seen


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.sets(st.integers(1, 29)), st.integers(1, 2))
def test_every_step_reads_the_features_of_its_sources(steps: int, refreshes: set[int], keep: int) -> None:
    schedule = Schedule((0, *sorted(s for s in refreshes if s < steps)), steps, 1)
    cache = FeatureCache(schedule, keep=keep)
    for step, seen in enumerate(run(cache, steps)):
        newest = schedule.source(step)
        older = schedule.previous_source(step)
        expected = (newest, newest if older is None else older)[:keep]
        assert seen == expected
    assert cache.full_steps == len(schedule.refresh_steps)
    assert cache.cached_steps == steps - cache.full_steps
    assert cache.step == steps


def test_the_first_group_pads_the_missing_feature_with_its_own() -> None:
    cache = FeatureCache(SCHEDULE, keep=2)
    cache.store(feature(0))
    newest, older = cache.regressors
    assert newest is older


@pytest.mark.parametrize("keep", [1, 2])
def test_only_as_many_features_are_kept_as_are_read(keep: int) -> None:
    cache = FeatureCache(SCHEDULE, keep=keep)
    for step in range(5):
        cache.store(feature(step))
        assert len(cache.features) == min(step + 1, keep)
    assert [float(f.flatten()[0]) for f in cache.features] == [4.0, 3.0][:keep]


@pytest.mark.parametrize("first", [1, 2, 5, 9])
def test_a_run_that_starts_inside_a_group_refreshes_at_once(first: int) -> None:
    cache = FeatureCache(SCHEDULE)
    cache.reset(first)
    assert cache.step == first and cache.must_refresh
    seen = run(cache, 10 - first, first)
    for step, (source,) in zip(range(first, 10), seen, strict=True):
        assert source == max(SCHEDULE.source(step), first)


def test_a_new_run_starts_without_the_features_of_the_last() -> None:
    cache = FeatureCache(SCHEDULE, keep=2)
    first = run(cache, 10)
    cache.reset()
    assert cache.step == 0 and cache.features == [] and cache.must_refresh
    assert run(cache, 10) == first


def test_two_caches_share_nothing() -> None:
    one, other = FeatureCache(SCHEDULE), FeatureCache(SCHEDULE)
    one.store(feature(0))
    assert other.features == []


def test_a_cached_step_before_any_refresh_is_refused() -> None:
    cache = FeatureCache(SCHEDULE)
    with pytest.raises(UserError, match="before any refresh"):
        _ = cache.regressors
    with pytest.raises(UserError, match="before any refresh"):
        cache.reuse(None)


def test_without_a_map_the_raw_feature_is_reused() -> None:
    cache = FeatureCache(SCHEDULE)
    raw = feature(5)
    cache.store(raw)
    assert cache.reuse(None) is raw


def test_corrections_start_from_the_raw_feature_every_time() -> None:
    cache = FeatureCache(SCHEDULE)
    raw = feature(5)
    cache.store(raw)
    fit = AffineMap(torch.tensor([2.0, 3.0]), torch.tensor([1.0, -1.0]))
    first, second = cache.reuse(fit), cache.reuse(fit)
    assert first.flatten().tolist() == second.flatten().tolist() == [11.0, 14.0]
    assert torch.equal(cache.features[0], feature(5))


@pytest.mark.parametrize("refreshes", [1, 2])
def test_a_forecast_reads_both_features(refreshes: int) -> None:
    cache = FeatureCache(SCHEDULE, keep=2)
    for step in itertools.islice(SCHEDULE.refresh_steps, refreshes):
        cache.store(feature(step + 1))
    fit = AffineMap(torch.tensor([2.0, 2.0]), torch.tensor([0.5, 0.5]), torch.tensor([10.0, -10.0]))
    newest, older = ((1, 1), (4, 1))[refreshes - 1]
    expected = [2 * newest + 0.5 + 10 * older, 2 * newest + 0.5 - 10 * older]
    assert cache.reuse(fit).flatten().tolist() == expected


def test_a_map_without_forecast_ignores_the_older_feature() -> None:
    cache = FeatureCache(SCHEDULE, keep=2)
    cache.store(torch.full((1, 2, 1, 1), torch.nan))
    cache.store(feature(1))
    assert cache.reuse(AffineMap.identity(2)).flatten().tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("shape", "channel_dim"), [((2, 5, 24, 23), 1), ((3, 60, 7), 2), ((1, 1, 1, 1), 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_held_integers_are_within_half_a_step_of_the_feature(
    shape: tuple[int, ...], channel_dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    feature = (torch.randn(shape) * torch.rand(shape) * 9 + 3).to(dtype)
    cache = FeatureCache(Schedule((0,), 4, 4), channel_dim=channel_dim, bits=8)
    cache.store(feature)
    (found,) = cache.regressors
    over = [d for d in range(1, len(shape)) if d != channel_dim]
    exact, made = feature.double(), found.double()
    step = (exact.amax(over, keepdim=True) - exact.amin(over, keepdim=True)) / 255
    cast = made.abs() * torch.finfo(dtype).eps / 2
    arithmetic = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert found.dtype is dtype and found.shape == feature.shape
    assert ((made - exact).abs() <= step / 2 + cast + arithmetic).all()


def test_held_integers_take_a_quarter_and_constant_channels_are_kept() -> None:
    feature = torch.randn(2, 8, 32, 32)
    feature[:, 3] = -1.25
    plain, held = (FeatureCache(Schedule((0,), 4, 4), bits=bits) for bits in (None, 8))
    for cache in (plain, held):
        cache.store(feature)
    assert plain.nbytes == feature.nbytes and 0.25 <= held.nbytes / plain.nbytes < 0.26
    assert torch.equal(held.regressors[0][:, 3], feature[:, 3])
