"""Precision and recall: brute force, known modes, duplicates, and reference values."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from cachequant.errors import UserError
from cachequant.evaluation import manifold
from cachequant.evaluation.manifold import precision_recall, squared_distances


def brute_force(reference: Tensor, samples: Tensor, k: int) -> tuple[float, float]:
    """The definition, point by point."""

    def inside(points: Tensor, centres: Tensor) -> float:
        radii = [sorted(float((c - o).norm()) for o in centres)[k] for c in centres]
        held = [any(float((p - c).norm()) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
        return sum(held) / len(held)

    return inside(samples, reference), inside(reference, samples)


@given(
    n=st.integers(4, 13), m=st.integers(4, 13), k=st.integers(1, 3), block=st.integers(1, 14), seed=st.integers(0, 99)
)
@settings(max_examples=30, deadline=None)
def test_blocks_of_any_size_give_brute_force(n: int, m: int, k: int, block: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    samples = 1.2 * torch.randn(m, 3, generator=generator, dtype=torch.float64) + 0.3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifold, "BLOCK", block)
        assert precision_recall(reference, samples, k) == brute_force(reference, samples, k)


def test_precision_and_recall_tell_a_missing_mode_from_a_false_one() -> None:
    generator = torch.Generator().manual_seed(0)
    mode = torch.randn(40, 3, generator=generator)
    both = torch.cat([mode, mode + 100])
    assert precision_recall(both, mode) == (1.0, 0.5)
    assert precision_recall(mode, both) == (0.5, 1.0)
    assert precision_recall(mode, mode + 100) == (0.0, 0.0)
    with pytest.raises(UserError, match="more than 3"):
        precision_recall(mode, mode[:3])


def test_equal_points_are_at_distance_zero_however_far_from_the_origin() -> None:
    """Balls of radius 0 around points that occur k + 1 times must hold exactly these points."""
    points = 1e3 + torch.randn(5, 2048, generator=torch.Generator().manual_seed(0))
    repeated = points.repeat_interleave(4, 0)
    assert precision_recall(repeated, points.repeat(4, 1)) == (1.0, 1.0)
    assert torch.equal(squared_distances(points.double(), points.double()).diagonal(), torch.zeros(5).double())


def test_golden_precision_and_recall(golden_folder: Path) -> None:
    folder = golden_folder / "method_eval"
    tensors = load_file(folder / "case.safetensors")
    cases = [c for c in json.loads((folder / "case.json").read_text())["cases"] if c["kind"] == "precision_recall"]
    assert cases
    for case in cases:
        name = case["id"]
        measured = precision_recall(tensors[f"{name}ref"], tensors[f"{name}sample"], case["nhood"])
        assert measured == (case["precision"], case["recall"])
