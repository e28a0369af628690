"""The rows that stage 4 will see again: evenly spaced over all samples, whatever the batches, and no others are held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cachequant.config import RunConfig
from cachequant.errors import UserError
from cachequant.pipeline.calibrate import gather
from cachequant.pipeline.context import Context
from cachequant.pipeline.hook import Call
from cachequant.pipeline.inputs import KeptInputs, spread


def calls(batches: tuple[int, ...], rows_per_sample: int = 1) -> list[Call]:
    """One call for each batch; a row's values are its place among the rows of all batches."""
    rows = torch.arange(sum(batches) * rows_per_sample).float()
    parts = rows.split([size * rows_per_sample for size in batches])
    return [Call(part.view(-1, 1, 1, 1), torch.full((len(part),), 7), {"ids": part}) for part in parts]


@pytest.mark.parametrize("batches", [(12,), (5, 5, 2), (1,) * 12])
@pytest.mark.parametrize("rows_per_sample", [1, 2])
@pytest.mark.parametrize("wanted", [1, 5, 12, 100])
def test_kept_rows_are_evenly_spaced_over_all_batches(
    batches: tuple[int, ...], rows_per_sample: int, wanted: int
) -> None:
    kept = KeptInputs(2, 12, batches[0], wanted)
    for call in calls(batches, rows_per_sample):
        for step in range(2):
            kept.take(step, call)
    expected = spread(12 * rows_per_sample, wanted).float()
    for entry in kept.joined():
        assert torch.equal(entry.x.flatten(), expected) and torch.equal(entry.kwargs["ids"], expected)
        assert entry.timestep.shape == () and entry.timestep == 7


def test_no_more_rows_are_held_than_are_wanted() -> None:
    kept = KeptInputs(1, 12, 3, 4)
    for call in calls((3, 3, 3, 3)):
        kept.take(0, call)
    held = [part.x for parts in kept._parts[0].values() for part in parts]
    assert sum(len(x) for x in held) == 4
    assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in held)


def test_two_contexts_share_the_rows_and_what_is_not_per_row_is_left_out() -> None:
    kept = KeptInputs(1, 6, 3, 4)
    for part in calls((3, 3)):
        for context, offset in (("uncond", 0.0), ("cond", 100.0)):
            kept.take(0, Call(part.x + offset, torch.tensor(3), {"ids": part.kwargs["ids"], "scale": 2.0}, context))
    (entry,) = kept.joined()
    assert set(entry.kwargs) == {"ids"}
    assert (entry.x >= 100).sum() == 2


def test_nested_conditioning_is_refused() -> None:
    with pytest.raises(UserError, match="passes added as a dict"):
        KeptInputs(1, 1, 1, 1).take(0, Call(torch.zeros(1, 1, 1, 1), 0, {"added": {"a": torch.zeros(1)}}))


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_the_spread_is_that_of_all_paired_samples_whatever_the_batches(
    pipe: Any, configure: Callable[..., RunConfig], batch_size: int
) -> None:
    common = ("calibration.samples=3", "schedule.kind=uniform", "schedule.cost=l1")
    made, whole = (
        gather(Context.of(pipe, configure(*common, f"calibration.batch_size={size}"))).spread
        for size in (batch_size, 3)
    )
    assert torch.allclose(made, whole, rtol=1e-4)
