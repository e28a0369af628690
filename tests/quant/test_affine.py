"""The affine grid: what it can represent, how far a round trip moves a value, which range a search keeps."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from cachequant.errors import UserError
from cachequant.quant.affine import (
    SEARCHES,
    SHRINK_RATIOS,
    dequantize,
    fake_quantize,
    grid_from_range,
    quantize,
    search_grid,
)

SEEDS = st.integers(0, 2**31 - 1)
BITS = st.integers(2, 8)
KINDS = ("two-sided", "positive", "negative", "constant", "zero", "heavy tail")


def row(kind: str, seed: int, unit: float = 1.0, size: int = 200) -> Tensor:
    """[1, n] values of one kind."""
    x = torch.randn(1, size, generator=torch.Generator().manual_seed(seed))
    if kind == "positive":
        x = x.abs() + 0.5
    elif kind == "negative":
        x = -x.abs() - 0.5
    elif kind == "constant":
        x = x[:, :1].expand(1, size).clone()
    elif kind == "zero":
        x = torch.zeros(1, size)
    elif kind == "heavy tail":
        x = x**5
    return x * unit


def score(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, power: float = 2.4) -> Tensor:
    """[R] mean |x - x_q|^power in float64."""
    error = fake_quantize(x.double(), scale.double()[:, None], zero_point.double()[:, None], bits) - x.double()
    return error.abs().pow(power).mean(1)


@settings(deadline=None, max_examples=80)
@given(st.sampled_from(KINDS), st.sampled_from(SEARCHES), SEEDS, BITS, st.sampled_from([1e-6, 1e-2, 1.0, 1e6]))
def test_every_grid_holds_zero_and_has_integer_parameters(
    kind: str, search: str, seed: int, bits: int, unit: float
) -> None:
    scale, zero_point = search_grid(row(kind, seed, unit), bits, search)
    assert scale.shape == zero_point.shape == (1,)
    assert float(scale) > 0
    assert 0 <= float(zero_point) <= 2**bits - 1 and float(zero_point) == round(float(zero_point))
    assert float(fake_quantize(torch.zeros(1), scale, zero_point, bits)) == 0.0


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KINDS), SEEDS, BITS, st.sampled_from([1e-4, 1.0, 1e4]))
def test_a_round_trip_moves_a_value_of_the_range_by_half_a_step_at_most(
    kind: str, seed: int, bits: int, unit: float
) -> None:
    x = row(kind, seed, unit)
    scale, zero_point = grid_from_range(x.amin(1), x.amax(1), bits)
    moved = (fake_quantize(x, scale, zero_point, bits) - x).abs().max()
    assert float(moved) <= 0.5 * float(scale) * (1 + 1e-4)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KINDS), st.sampled_from(SEARCHES), SEEDS, BITS)
def test_a_second_round_trip_changes_nothing(kind: str, search: str, seed: int, bits: int) -> None:
    x = row(kind, seed)
    scale, zero_point = search_grid(x, bits, search)
    q = quantize(x, scale, zero_point, bits)
    assert torch.equal(quantize(dequantize(q, scale, zero_point), scale, zero_point, bits), q)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(KINDS), SEEDS, BITS)
def test_larger_values_get_integers_that_are_not_smaller(kind: str, seed: int, bits: int) -> None:
    x = row(kind, seed)
    scale, zero_point = search_grid(x, bits)
    q = quantize((2 * x).sort(dim=1).values, scale, zero_point, bits)  # beyond the range as well
    assert torch.all(q.diff(dim=1) >= 0)
    assert float(q.min()) >= 0 and float(q.max()) <= 2**bits - 1
    assert torch.equal(q, q.round())


@settings(deadline=None, max_examples=30)
@given(BITS, st.floats(1e-3, 1e3), st.integers(0, 255))
def test_integers_survive_the_round_trip_through_real_numbers(bits: int, unit: float, zero: int) -> None:
    q = torch.arange(2**bits).float()
    scale, zero_point = torch.tensor(unit), torch.tensor(float(min(zero, 2**bits - 1)))
    assert torch.equal(quantize(dequantize(q, scale, zero_point), scale, zero_point, bits), q)


def test_quantisation_leaves_its_input_alone() -> None:
    x = row("two-sided", 0)
    before = x.clone()
    for search in SEARCHES:
        scale, zero_point = search_grid(x, 4, search)
        fake_quantize(x, scale, zero_point, 4)
    assert torch.equal(x, before)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_sided_and_constant_ranges_are_stretched_to_zero(bits: int) -> None:
    levels = 2**bits - 1
    low, high = torch.tensor([1.0, -3.0, 0.0, 2.0, -2.0]), torch.tensor([3.0, -1.0, 0.0, 2.0, -2.0])
    scale, zero_point = grid_from_range(low, high, bits)
    torch.testing.assert_close(scale, torch.tensor([3 / levels, 3 / levels, 1.0, 2 / levels, 2 / levels]))
    assert zero_point.tolist() == [0, levels, 0, 0, levels]


@pytest.mark.parametrize("value", [2.5, -2.5, 0.0, 1e-6])
@pytest.mark.parametrize("search", SEARCHES)
def test_a_constant_row_is_kept(search: str, value: float) -> None:
    x = torch.full((1, 50), value)
    scale, zero_point = search_grid(x, 8, search)
    torch.testing.assert_close(fake_quantize(x, scale, zero_point, 8), x)


# Range searches


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KINDS), SEEDS, BITS, st.sampled_from([1.0, 2.0, 2.4]))
def test_the_search_never_scores_worse_than_the_whole_range(kind: str, seed: int, bits: int, power: float) -> None:
    x = row(kind, seed)
    whole = score(x, *search_grid(x, bits, "minmax"), bits, power)
    found = score(x, *search_grid(x, bits, "mse", power), bits, power)
    assert float(found) <= float(whole) * (1 + 1e-4) + 1e-12


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.sampled_from([2, 3, 4]))
def test_the_search_finds_the_best_of_its_candidates(seed: int, bits: int) -> None:
    x = row("heavy tail", seed)
    best = min(float(score(x, *grid_from_range(x.amin(1) * r, x.amax(1) * r, bits), bits)) for r in SHRINK_RATIOS)
    assert float(score(x, *search_grid(x, bits), bits)) == pytest.approx(best, rel=1e-4)


def test_the_candidates_are_the_forty_of_the_released_scripts() -> None:
    assert len(SHRINK_RATIOS) == 40
    assert SHRINK_RATIOS[0] == 1.0 and SHRINK_RATIOS[-1] == pytest.approx(0.22)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(KINDS), SEEDS, BITS, st.integers(2, 30_000))
def test_percentiles_never_widen_the_range(kind: str, seed: int, bits: int, size: int) -> None:
    x = row(kind, seed, size=size)
    cut, whole = (search_grid(x, bits, s)[0] for s in ("percentile", "minmax"))
    assert float(cut) <= float(whole)


def test_percentiles_ignore_a_lone_outlier_and_a_small_sample_loses_nothing() -> None:
    x = torch.linspace(-1, 1, 20_001)[None]
    spiked = x.clone()
    spiked[0, 0], spiked[0, -1] = -50.0, 80.0
    scale, _ = search_grid(spiked, 8, "percentile")
    assert float(scale) == pytest.approx(2 / 255, rel=1e-3)
    short = torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
    assert search_grid(short, 8, "percentile") == search_grid(short, 8, "minmax")


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(SEARCHES), SEEDS, BITS)
def test_rows_are_searched_independently(search: str, seed: int, bits: int) -> None:
    x = torch.cat([row(kind, seed + i) for i, kind in enumerate(KINDS)])
    scale, zero_point = search_grid(x, bits, search)
    for i in range(len(x)):
        alone = search_grid(x[i : i + 1], bits, search)
        assert float(scale[i]) == pytest.approx(float(alone[0]), rel=1e-6)
        assert float(zero_point[i]) == float(alone[1])


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(SEARCHES), SEEDS, BITS, st.sampled_from([0.25, 4.0, 1024.0]))
def test_scale_follows_the_unit_and_the_zero_point_does_not(search: str, seed: int, bits: int, unit: float) -> None:
    x = row("two-sided", seed)
    plain, changed = search_grid(x, bits, search), search_grid(x * unit, bits, search)
    if search == "mse":  # powers are rounded, so equal candidates may swap: compare what they achieve
        scores = score(x * unit, *changed, bits), score(x * unit, plain[0] * unit, plain[1], bits)
        assert float(scores[0]) == pytest.approx(float(scores[1]), rel=1e-3)
        return
    assert float(changed[0]) == float(plain[0]) * unit and float(changed[1]) == float(plain[1])


def test_an_unknown_search_is_refused() -> None:
    with pytest.raises(UserError, match=r"'entropy'.*minmax, mse, percentile"):
        search_grid(torch.zeros(1, 4), 8, "entropy")


# Against the original


def golden_rows(x: Tensor, kind: str) -> Tensor:
    return x.flatten(1) if kind == "weight" else x.flatten()[None]


def test_two_sided_grids_are_the_originals_and_one_sided_ones_keep_zero(golden_folder: Path) -> None:
    folder = golden_folder / "method_quant"
    record, tensors = json.loads((folder / "case.json").read_text()), load_file(folder / "case.safetensors")
    compared = 0
    for case in record["cases"]:
        if case["kind"] not in ("weight", "act"):
            continue  # moving averages over mini-batches: here a step's batches are pooled
        name, bits = f"case{case['id']:02d}", case["bits"]
        x = golden_rows(tensors[f"{name}_x"], case["kind"])
        scale, zero_point = search_grid(x, bits)
        two_sided = (x.amin(1) < 0) & (x.amax(1) > 0)
        expected_scale = tensors[f"{name}_scale"].flatten()
        expected_zero = tensors[f"{name}_zero_point"].flatten()
        assert float((expected_zero - expected_zero.round()).abs().max()) < 1e-3
        torch.testing.assert_close(scale[two_sided], expected_scale[two_sided], rtol=1e-5, atol=0)
        assert torch.equal(zero_point[two_sided], expected_zero[two_sided].round())
        # The original's grid of a one-sided row need not hold zero; ours does, so padding stays exact.
        assert torch.all((zero_point >= 0) & (zero_point <= 2**bits - 1))
        moved = fake_quantize(torch.zeros(len(x), 1), scale[:, None], zero_point[:, None], bits)
        assert not moved.any()
        if two_sided.all():
            found = fake_quantize(x, scale[:, None], zero_point[:, None], bits)
            difference = (found - golden_rows(tensors[f"{name}_fakequant"], case["kind"])).abs()
            apart = difference > 1e-5 * (x.amax() - x.amin())  # a tie may fall to the other side
            assert float(apart.float().mean()) < 1e-3
            assert torch.all(difference <= scale[:, None] * (1 + 1e-4))
        compared += int(two_sided.sum())
    assert compared > 20
