"""The script that holds real integers against their simulation, on the CPU's integers and few steps."""

from __future__ import annotations

import runpy
from typing import Any

import pytest
import torch

from cachequant.config import load_config, repository_folder
from cachequant.kernels.cpu import unavailable
from cachequant.models.loading import load_pipeline
from cachequant.pipeline.context import Context
from cachequant.pipeline.hook import Call
from cachequant.pipeline.stages import Stages

ROOT = repository_folder()
SETTINGS = (
    "sampler.steps=4", "cache.interval=2", "calibration.samples=2", "calibration.batch_size=2", "method=naive",
    "quant.attention_bits=null", "sample.batch_size=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "gpu" / "check_models.py"))


def test_distance_is_relative_over_all_evaluations(script: dict[str, Any]) -> None:
    theirs = [torch.full((2, 3), 3.0), torch.full((2, 3), 4.0)]
    assert script["apart"](theirs, theirs) == 0.0
    assert script["apart"]([theirs[0], theirs[1] + 1.0], theirs) == pytest.approx((6 / (6 * 9 + 6 * 16)) ** 0.5)


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_evaluations_of_a_run_are_computed_again_from_the_same_samples(script: dict[str, Any], tmp_path: Any) -> None:
    config = load_config(ROOT / "configs" / "fashion.yaml", [*SETTINGS, "backend=simulated"])
    pipe = load_pipeline(config.model, "cpu")
    context = Context.of(pipe, config)
    plan, _ = Stages.at(context, tmp_path, quiet=True).plan()
    seen = script["evaluations"](context, plan, [0, 1])
    assert [evaluation.step for evaluation in seen] == [0, 1, 2, 3]
    outputs = [evaluation.output for evaluation in seen]
    assert (
        script["apart"](script["again"](context, plan, seen), outputs) < 1e-6
    )  # cached steps have their features again
    exact = script["again"](context, None, seen)
    assert script["apart"](outputs, exact) > 1e-3
    integers = Context.of(pipe, load_config(ROOT / "configs" / "fashion.yaml", [*SETTINGS, "backend=cpu-int8"]))
    assert script["apart"](script["again"](integers, plan, seen), outputs) < 0.5 * script["apart"](outputs, exact)


def test_integers_are_right_that_differ_by_no_more_than_rounding_does(script: dict[str, Any]) -> None:
    right = script["right"]
    assert right(1.0, 1.0, 0.69, 0.0)  # nearer to the simulation than this is to full precision
    assert right(1.0, 1.0, 0.8, 0.85)  # a network that amplifies roundings: its own answers differ by as much
    assert not right(1.0, 1.0, 0.8, 0.75)
    assert not right(1.0, 1.2, 0.8, 0.85)  # as near as rounding explains, yet farther from full precision


def test_a_nudge_is_as_large_as_a_rounding_and_leaves_everything_else(script: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 8, 8)
    given = script["Evaluation"](3, Call(x.clone(), 7, {"class_labels": torch.tensor([1])}), x)
    nudged = script["nudged"](given)
    change = (nudged.call.x / x - 1).abs()
    assert 0.9 * 2.0**-11 < change.max() <= 1.01 * 2.0**-11 and change.mean() == pytest.approx(2.0**-12, rel=0.2)
    assert nudged.step == 3 and nudged.output is x and nudged.call.timestep == 7
    assert nudged.call.kwargs is given.call.kwargs and given.call.x.equal(x)
    assert script["nudged"](given).call.x.equal(nudged.call.x)
