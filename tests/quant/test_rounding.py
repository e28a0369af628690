"""Compensated rounding against the quadratic form that it minimises, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cachequant.errors import UserError
from cachequant.quant import rounding
from cachequant.quant.affine import grid_from_range, quantize
from cachequant.quant.rounding import (
    BLOCK,
    DAMPINGS,
    RATIOS,
    Factor,
    RowGrids,
    best_damping,
    best_rounding,
    candidate_grids,
    compensated,
    rounding_error,
)

SEEDS = st.integers(0, 2**31 - 1)


def problem(seed: int, rows: int = 5, columns: int = 12) -> tuple[Tensor, Tensor]:
    """Weights [R, n] and the second moment [n, n] of strongly correlated inputs."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=random, dtype=torch.float64)
    mixing = mixing @ torch.diag(torch.logspace(0, -1.5, columns, dtype=torch.float64))
    inputs = torch.randn(50 * columns, columns, generator=random, dtype=torch.float64) @ mixing.T
    return torch.randn(rows, columns, generator=random, dtype=torch.float64), inputs.T @ inputs / len(inputs)


def whole_range(weight: Tensor, bits: int = 4) -> RowGrids:
    return candidate_grids(weight, torch.zeros(weight.shape[1], dtype=torch.int64), bits)[0]


def nearest(weight: Tensor, grids: RowGrids) -> Tensor:
    return quantize(weight, grids.scale, grids.zero_point, grids.bits)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_the_factors_multiply_to_the_damped_moment(seed: int) -> None:
    _, moment = problem(seed)
    factor = Factor.of(moment, 0.1)
    made = (factor.upper * factor.pivots) @ factor.upper.T
    damped = moment + 0.1 * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    torch.testing.assert_close(made, damped[factor.order][:, factor.order], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(factor.upper, factor.upper.triu(), rtol=0, atol=0)
    assert (factor.upper.diagonal() == 1).all() and (factor.pivots > 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_its_error_is_the_quadratic_form_and_less_than_that_of_the_nearest(seed: int) -> None:
    weight, moment = problem(seed, rows=200)
    whole = whole_range(weight)
    grids = RowGrids(1.25 * whole.scale, whole.zero_point, whole.segment, 4)  # room for what is compensated
    integers, error = compensated(weight, Factor.of(moment, 0.0), grids)
    torch.testing.assert_close(error, rounding_error(weight, moment, integers, grids), rtol=1e-8, atol=1e-12)
    assert error.median() < 0.5 * rounding_error(weight, moment, nearest(weight, grids), grids).median()
    assert integers.min() >= 0 and integers.max() <= 15 and (integers == integers.round()).all()


def test_independent_inputs_leave_nothing_to_compensate() -> None:
    weight, _ = problem(1)
    grids = whole_range(weight)
    integers, _ = compensated(weight, Factor.of(torch.diag(torch.linspace(1, 3, 12, dtype=torch.float64)), 0.0), grids)
    assert torch.equal(integers, nearest(weight, grids))


def test_two_columns_are_rounded_as_well_as_by_trying_everything() -> None:
    """With two columns compensation is exact: given the first integer, the best second one is taken."""
    weight, moment = torch.tensor([[0.3, 0.4]]).double(), torch.tensor([[1.0, 0.9], [0.9, 1.0]]).double()
    grids = RowGrids(torch.ones(1, 1).double(), torch.full((1, 1), 8.0).double(), torch.zeros(2, dtype=torch.int64), 4)
    integers, error = compensated(weight, Factor.of(moment, 0.0), grids)
    first = integers[0, 0]
    tried = [rounding_error(weight, moment, torch.tensor([[first, k]]).double(), grids) for k in range(16)]
    assert error == pytest.approx(float(torch.stack(tried).min()))
    assert error < rounding_error(weight, moment, nearest(weight, grids), grids)


def test_blocks_of_columns_change_nothing() -> None:
    weight, moment = problem(2, rows=3, columns=BLOCK + 9)
    factor, grids = Factor.of(moment, 0.01), whole_range(weight)
    made, _ = compensated(weight, factor, grids)
    target, error, expected = weight[:, factor.order], torch.zeros_like(weight), torch.empty_like(weight)
    for k in range(weight.shape[1]):  # the definition, column by column
        goal = target[:, k] + error @ factor.upper[:, k]
        expected[:, k] = nearest(goal[:, None], grids)[:, 0]
        error[:, k] = target[:, k] - (expected[:, k] - grids.zero_point[:, 0]) * grids.scale[:, 0]
    assert torch.equal(made[:, factor.order], expected)


def test_the_best_candidate_is_taken_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moment = problem(3, rows=30)
    segment = (torch.arange(12) >= 7).long()
    candidates, factor = candidate_grids(weight, segment, 3), Factor.of(moment, 0.01)
    integers, grids, error = best_rounding(weight, factor, candidates)
    alone = torch.stack([compensated(weight, factor, one)[1] for one in candidates])
    torch.testing.assert_close(error, alone.amin(0))
    assert len(set(alone.argmin(0).tolist())) > 1
    monkeypatch.setattr(rounding, "PIECE", 7 * 12 * len(candidates))  # seven rows at once
    for found, whole in zip(best_rounding(weight, factor, candidates), (integers, grids, error), strict=True):
        pairs = [(found, whole)] if isinstance(found, Tensor) else [(found.scale, whole.scale)]
        assert all(torch.equal(*pair) for pair in pairs)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(error, rounding_error(weight, damped, integers, grids), rtol=1e-8, atol=1e-12)


def test_candidates_shrink_the_range_of_every_segment() -> None:
    weight, _ = problem(4)
    segment = (torch.arange(12) >= 7).long()
    for ratio, grids in zip(RATIOS, candidate_grids(weight, segment, 4), strict=True):
        for s, part in enumerate((weight[:, :7], weight[:, 7:])):
            scale, zero = grid_from_range(ratio * part.amin(1), ratio * part.amax(1), 4)
            assert torch.equal(grids.scale[:, s], scale) and torch.equal(grids.zero_point[:, s], zero)
    around_zero = candidate_grids(weight, segment, 4, symmetric=True)
    assert all((grids.zero_point == 8).all() for grids in around_zero)


def test_columns_without_input_do_no_harm() -> None:
    weight, moment = problem(5)
    moment[3], moment[:, 3] = 0, 0
    integers, error = compensated(weight, Factor.of(moment, 0.0), whole_range(weight))
    assert error.isfinite().all() and integers.isfinite().all()
    assert Factor.of(torch.zeros(4, 4), 0.0).pivots.isfinite().all()


@pytest.mark.parametrize("rows", [[[1.0, 2.0], [2.0, 1.0]], [[-1.0, 0.0], [0.0, -1.0]]])
def test_an_indefinite_moment_is_damped_no_more_than_twice_what_it_needs(rows: list[list[float]]) -> None:
    """The least eigenvalue of both is -1, the mean magnitude of their diagonals 1."""
    moment = torch.tensor(rows, dtype=torch.float64)
    factor = Factor.of(moment, 0.0)
    made = (factor.upper * factor.pivots) @ factor.upper.T
    added = made - moment[factor.order][:, factor.order]
    assert 1 < added[0, 0] <= 2
    torch.testing.assert_close(added, added[0, 0] * torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite_is_refused(value: float) -> None:
    _, moment = problem(8)
    moment[3, 4] = moment[4, 3] = value
    with pytest.raises(UserError, match="hold NaN or infinity, expected finite ones"):
        Factor.of(moment, 0.1)


def test_damping_is_the_one_that_errs_least_on_unseen_inputs() -> None:
    weight, moment = problem(6, rows=20)
    few = problem(7, columns=12)[1] * 0.3 + moment  # what a few samples would show
    grids = whole_range(weight)
    errors = {
        d: float(rounding_error(weight, moment, compensated(weight, Factor.of(few, d), grids)[0], grids).sum())
        for d in DAMPINGS
    }
    assert best_damping(weight, (few, moment), grids) == min(errors, key=lambda d: errors[d])
    assert len(set(errors.values())) > 1
