"""Fréchet distance and inception score: closed forms, and reference values."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from cachequant.errors import UserError
from cachequant.evaluation.frechet import (
    FeatureStatistics,
    ScoreSums,
    frechet_distance,
    inception_score,
)


def statistics(features: Tensor, batch_size: int = 7) -> FeatureStatistics:
    result = FeatureStatistics(features.shape[1])
    for batch in features.split(batch_size):
        result.update(batch)
    return result


def distance(a: Tensor, b: Tensor) -> float:
    first, second = statistics(a), statistics(b)
    return frechet_distance(first.mean, first.covariance, second.mean, second.covariance)


def cases(folder: Path, kind: str) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """The golden cases of one kind, each with its tensors under their names without the case's prefix."""
    case = json.loads((folder / "method_eval" / "case.json").read_text())
    tensors = load_file(folder / "method_eval" / "case.safetensors")
    chosen = [c for c in case["cases"] if c["kind"] == kind]
    return [(c, {k.removeprefix(c["id"]): v for k, v in tensors.items() if k.startswith(c["id"])}) for c in chosen]


@given(size=st.integers(2, 60), batch_size=st.integers(1, 61), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_streamed_statistics_are_numpys(size: int, batch_size: int, seed: int) -> None:
    features = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed)).double() + 3
    streamed = statistics(features, batch_size)
    np.testing.assert_allclose(streamed.mean, features.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(streamed.covariance, np.cov(features.numpy(), rowvar=False), atol=1e-11)


def test_merge_is_the_statistics_of_both_and_changes_neither() -> None:
    features = torch.randn(30, 5, dtype=torch.float64)
    first, second, whole = statistics(features[:11]), statistics(features[11:]), statistics(features)
    merged = first.merge(second)
    assert (merged.count, first.count, second.count) == (30, 11, 19)
    torch.testing.assert_close(merged.covariance, whole.covariance)
    torch.testing.assert_close(first.covariance, statistics(features[:11]).covariance)


def test_statistics_accumulate_in_float64() -> None:
    features = 1e4 + torch.randn(500, 3, generator=torch.Generator().manual_seed(0))  # float32
    expected = np.cov(features.double().numpy(), rowvar=False)
    np.testing.assert_allclose(statistics(features).covariance, expected, atol=1e-5)


@given(st.lists(st.tuples(*[st.floats(-3, 3)] * 2, *[st.floats(0, 4)] * 2), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_diagonal_gaussians_have_a_closed_form(channels: list[tuple[float, float, float, float]]) -> None:
    mu1, mu2, std1, std2 = torch.tensor(channels, dtype=torch.float64).T
    expected = float(((mu1 - mu2) ** 2 + (std1 - std2) ** 2).sum())
    measured = frechet_distance(mu1, torch.diag(std1**2), mu2, torch.diag(std2**2))
    assert measured == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_distance_of_commuting_covariances_ignores_a_rotation() -> None:
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator)).Q
    std1, std2 = torch.rand(2, 6, dtype=torch.float64, generator=generator)
    cov1, cov2 = (rotation @ torch.diag(std**2) @ rotation.T for std in (std1, std2))
    zero = torch.zeros(6)
    assert frechet_distance(zero, cov1, zero, cov2) == pytest.approx(float((std1 - std2).square().sum()))


def test_distance_is_symmetric_and_zero_for_the_same_set() -> None:
    a, b = torch.randn(40, 6, dtype=torch.float64), 1 + 2 * torch.randn(50, 6, dtype=torch.float64)
    assert distance(a, b) == pytest.approx(distance(b, a))
    assert distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_rank_deficient_covariances_stay_finite_and_right() -> None:
    line = torch.linspace(-1, 1, 9, dtype=torch.float64).unsqueeze(1)
    narrow = torch.cat([line, torch.zeros(9, 3, dtype=torch.float64)], dim=1)  # rank 1 of 4
    variance = float(line.var())
    assert distance(narrow, 3 * narrow) == pytest.approx(4 * variance)  # (3 - 1)² variance


def test_statistics_that_make_no_sense_are_refused() -> None:
    eye, zero = torch.eye(3), torch.zeros(3)
    with pytest.raises(UserError, match="shapes"):
        frechet_distance(zero, eye, torch.zeros(4), torch.eye(4))
    with pytest.raises(UserError, match="not finite"):
        frechet_distance(zero, eye * float("nan"), zero, eye)
    with pytest.raises(UserError, match="2 or more"):
        _ = statistics(torch.ones(1, 3)).covariance
    with pytest.raises(UserError, match=r"\[N, 3\]"):
        FeatureStatistics(3).update(torch.ones(2, 4))
    with pytest.raises(UserError, match="channels"):
        FeatureStatistics(3).merge(FeatureStatistics(4))


def test_inception_score_runs_from_one_to_the_number_of_classes() -> None:
    assert inception_score(torch.full((50, 10), 0.1)) == pytest.approx(1.0)
    assert inception_score(torch.eye(10).repeat(5, 1)) == pytest.approx(10.0)


def test_inception_score_is_the_mean_over_splits() -> None:
    one_class, all_classes = torch.eye(4)[:1].repeat(4, 1), torch.eye(4)
    assert inception_score(torch.cat([one_class, all_classes]), split_size=4) == pytest.approx((1 + 4) / 2)
    with pytest.raises(UserError, match="expected"):
        inception_score(torch.zeros(0, 4))


@given(size=st.integers(1, 40), batch=st.integers(1, 41), split=st.integers(1, 41), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_streamed_inception_score_is_the_definition(size: int, batch: int, split: int, seed: int) -> None:
    """mean over splits of exp(mean Σ p (log p - log q)), whatever the batches and their order."""
    probs = torch.randn(size, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(1)
    expected = []
    for part in probs.split(split):
        divergence = (part * (part.log() - part.mean(0).log())).sum(1).mean()
        expected.append(float(divergence.exp()))
    sums = ScoreSums(size, 5, split)
    for start in reversed(range(0, size, batch)):
        sums.update(start, probs[start : start + batch])
    assert sums.value == pytest.approx(sum(expected) / len(expected), rel=1e-12)


def test_golden_frechet_distances(golden_folder: Path) -> None:
    for case, tensors in cases(golden_folder, "fid_or_sfid"):
        for name in ("ref", "sample"):
            mine = statistics(tensors[f"acts_{name}"])
            torch.testing.assert_close(mine.mean, tensors[f"mu_{name}"])
            torch.testing.assert_close(mine.covariance, tensors[f"sigma_{name}"])
        measured = distance(tensors["acts_ref"], tensors["acts_sample"])
        assert measured == pytest.approx(case["value"], rel=1e-3 if case["rank_deficient"] else 1e-5)


def test_golden_inception_scores(golden_folder: Path) -> None:
    for case, tensors in cases(golden_folder, "inception_score"):
        assert inception_score(tensors["probs"], case["split_size"]) == pytest.approx(case["value"], rel=1e-5)
