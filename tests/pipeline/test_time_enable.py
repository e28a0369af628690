"""The script that times a user's own call, on a toy pipeline."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cachequant.api import find
from cachequant.config import RunConfig, repository_folder
from cachequant.errors import UserError
from cachequant.pipeline.context import Context

Configure = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(repository_folder() / "scripts" / "gpu" / "time_enable.py"))


def test_the_first_call_does_not_count(script: dict[str, Any]) -> None:
    calls: list[list[int]] = []
    assert len(script["seconds_of"](calls.append, [3, 4], 2)) == 2
    assert calls == [[3, 4]] * 3


def test_rows_are_of_the_pipeline_without_and_with_a_plan(
    script: dict[str, Any], pipe: Any, configure: Configure
) -> None:
    context = Context.of(pipe, configure("cache.interval=2", "sample.batch_size=3", "backend=simulated"))
    before = {name: value.clone() for name, value in context.adapter.denoiser.state_dict().items()}
    plain, enabled = script["measure"](context, 3)
    assert (plain["row"], enabled["row"]) == ("plain", "enabled")
    for row in (plain, enabled):
        assert row["seconds"] == sorted(row["runs"])[1] > 0
        assert row["images_per_second"] == pytest.approx(3 / row["seconds"])
    assert find(pipe) is None
    assert all(torch.equal(before[name], value) for name, value in context.adapter.denoiser.state_dict().items())
    with pytest.raises(UserError, match="--rounds is 0, expected at least 1"):
        script["measure"](context, 0)
