"""A batch in chunks gives what the whole batch gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cachequant.config import RunConfig
from cachequant.pipeline.calibrate import gather
from cachequant.pipeline.chunks import Chunks
from cachequant.pipeline.context import Context
from cachequant.pipeline.dec_cache import solve_maps
from cachequant.pipeline.dec_quant import fit_quantised
from cachequant.pipeline.features import gather_moments
from cachequant.pipeline.hook import Call
from cachequant.pipeline.quant_params import calibrate_quantisers
from cachequant.schedule import uniform_schedule
from cachequant.types import AffineMap, Correction

Configure = Callable[..., RunConfig]


def close(one: AffineMap, other: AffineMap, step: int) -> bool:
    """Equal at the first two steps; later, but for activations that rounding has moved over a border of their grid."""
    columns = (getattr(m, name) for m in (one, other) for name in ("scale", "shift", "previous"))
    values = [torch.zeros(1) if c is None else c for c in columns]
    slack = 1e-4 if step < 2 else 2e-2
    return all(torch.allclose(a, b, rtol=1e-3, atol=slack) for a, b in zip(values[:3], values[3:], strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_parts_are_the_rows_in_order_with_their_own_conditioning(count: int) -> None:
    class Echo:
        """Output and feature name the row, its timestep and its label."""

        def full(self, x: torch.Tensor, timestep: Any, cond: Any = None, **kwargs: Any) -> Any:
            return x + timestep.view(-1, 1) + kwargs["labels"].view(-1, 1) + kwargs["offset"], x

        def cached(self, x: torch.Tensor, timestep: Any, cond: Any, feature: torch.Tensor, **kwargs: Any) -> Any:
            return feature + kwargs["labels"].view(-1, 1)

    x, timestep, labels = torch.arange(5.0)[:, None], torch.arange(5) * 10, torch.arange(5) * 100
    call = Call(x, timestep, {"labels": labels, "offset": torch.tensor(0.5), "none": None})
    network: Any = Chunks(Echo(), count)  # type: ignore[arg-type]
    output, feature = network.full(call)
    assert torch.equal(output, 111 * x + 0.5) and torch.equal(feature, x)
    assert torch.equal(network.cached(call, 1000 * x), 1100 * x)


@pytest.mark.parametrize(("layers", "held_out"), [("none", False), ("consumers", False), ("consumers", True)])
def test_free_running_fits_in_chunks_are_those_of_one_batch(
    pipe: Any, configure: Configure, layers: str, held_out: bool
) -> None:
    common = (
        "method=best", f"correction.layers={layers}", f"correction.held_out={str(held_out).lower()}",
        "correction.inflation=0", "correction.output=none",
        "quant.activation_search=minmax",
    )  # fmt: skip
    whole = Context.of(pipe, configure(*common, "calibration.batch_size=4"))
    parts = Context.of(pipe, configure(*common, "calibration.batch_size=1"))
    schedule = uniform_schedule(whole.num_steps, 2)
    moments = [gather_moments(context, schedule) for context in (whole, parts)]
    assert set(moments[0]) == set(moments[1]) == {1, 3, 5}
    maps = [solve_maps(sums, 1e-4) for sums in moments]
    assert all(close(maps[0][step], maps[1][step], 0) for step in maps[0])  # nothing is rounded here
    calibration = gather(whole)
    state = calibrate_quantisers(whole, calibration, schedule, Correction(maps[0]))
    fits = [
        fit_quantised(context, schedule, Correction(maps[0]), state, calibration.spread) for context in (whole, parts)
    ]
    assert all(close(fits[0].cache[step], fits[1].cache[step], step) for step in (1, 3, 5))
    assert set(fits[0].layers) == set(fits[1].layers)
    for name, by_step in fits[0].layers.items():
        assert set(by_step) == set(range(6))
        assert all(close(by_step[step], fits[1].layers[name][step], step) for step in by_step), name


def test_a_fit_of_every_layer_needs_each_before_the_next_and_ignores_the_batch_size(
    pipe: Any, configure: Configure
) -> None:
    common = ("method=best", "correction.layers=all", "schedule.kind=uniform")
    whole = Context.of(pipe, configure(*common, "calibration.batch_size=4"))
    parts = Context.of(pipe, configure(*common, "calibration.batch_size=1"))
    schedule = uniform_schedule(whole.num_steps, 2)
    calibration = gather(whole)
    state = calibrate_quantisers(whole, calibration, schedule, Correction())
    fits = [fit_quantised(context, schedule, Correction(), state, calibration.spread) for context in (whole, parts)]
    for name, by_step in fits[0].layers.items():
        assert all(torch.equal(by_step[s].scale, fits[1].layers[name][s].scale) for s in by_step), name
        deep = name not in whole.adapter.shallow_names()
        assert set(by_step) == ({0, 2, 4} if deep else set(range(6)))
