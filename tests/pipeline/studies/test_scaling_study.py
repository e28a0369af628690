"""Scaling: the laws that predict are those of the code, and the counts those of the networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cachequant.config import RunConfig
from cachequant.pipeline.context import Context
from cachequant.pipeline.stages import Stages
from cachequant.pipeline.studies import scaling as module
from cachequant.pipeline.studies.scaling import (
    REPEATS,
    TRANSFORMERS,
    Evaluated,
    Solved,
    Transformer,
    count,
    dps_bytes,
    dps_operations,
    measure_dps,
    measure_network,
    network_predictions,
    predicted_seconds,
    study,
)
from cachequant.pipeline.studies.subject import StudySubject
from cachequant.schedule import DistanceBand

Configure = Callable[..., RunConfig]
TINY = {"tiny": Transformer(4, 16, 2, 8), "wider": Transformer(4, 32, 2, 8)}


@pytest.mark.parametrize(("steps", "interval"), [(1, 1), (7, 2), (9, 5), (50, 3)])
def test_bytes_and_operations_are_those_of_the_band(steps: int, interval: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    distances = DistanceBand._distances
    monkeypatch.setattr(
        DistanceBand, "_distances", lambda s, x, past: (seen.append(past.shape[1]), distances(s, x, past))[1]
    )
    found = measure_dps(steps, interval, 5)
    assert (found.ring_bytes, found.band_bytes) == dps_bytes(steps, interval, 5)
    assert dps_operations(steps, interval, 5)[0] * REPEATS == 5 * sum(seen)
    assert found.groups == -(-steps // interval)


def test_predictions_are_linear_for_the_band_and_quadratic_for_the_programme() -> None:
    first = Solved(1000, 100, 2.0, 3.0, 0, 0)
    assert predicted_seconds(first, 1000, 10, 8) == (2.0, 3.0)
    band, solve = predicted_seconds(first, 10_000, 10, 8)
    assert band == pytest.approx(20.0, rel=0.02) and solve == pytest.approx(300.0, rel=0.002)


def test_the_largest_network_has_more_than_a_billion_parameters() -> None:
    parameters, flops, feature = count(TRANSFORMERS["DiT, width 1536"])
    blocks = 28 * (12 + 6) * 1536**2  # attention and MLP, modulation
    assert parameters > 1e9 and blocks < parameters < 1.15 * blocks
    tokens = 28 * 256 * (2 * 12 * 1536**2 + 4 * 256 * 1536)  # multiply and add
    assert flops == pytest.approx(tokens, rel=0.02) and feature == 256 * 1536
    sizes = [count(shape)[0] for shape in list(TRANSFORMERS.values())[:2]]
    assert sizes[0] < sizes[1] < parameters


def test_a_network_is_predicted_at_the_rate_of_the_one_before() -> None:
    networks = {name: Evaluated(1, flops, 1, seconds, 0.0, 4, 4) for name, flops, seconds in (
        ("a", 10.0, 1.0), ("b", 40.0, 8.0), ("c", 80.0, 1.0))}  # fmt: skip
    assert network_predictions(networks) == {"a": None, "b": 4.0, "c": 16.0}


def test_the_study_measures_each_once(
    pipe: Any, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TRANSFORMERS", TINY)
    monkeypatch.setattr(module, "STEPS", (20, 40))
    monkeypatch.setattr(module, "VALUES", 8)

    def subject() -> StudySubject:
        stages = Stages.at(Context.of(pipe, configure("cache.interval=3")), tmp_path, quiet=True)
        return StudySubject(stages, None, tmp_path)

    found = study(subject(), 1)
    networks, dps = found.numbers["networks"], found.numbers["dps"]
    for name, shape in TINY.items():
        parameters, flops, feature = count(shape)
        assert networks[name]["parameters"] == parameters and networks[name]["parameter_bytes"] == 4 * parameters
        assert networks[name]["flops"] == flops and networks[name]["seconds"] > networks[name]["band_seconds"] / 100 > 0
        assert networks[name]["feature"] == feature == 16 * shape.width
    assert dps["20"]["predicted"] == (dps["20"]["band_seconds"], dps["20"]["solve_seconds"])
    monkeypatch.setattr(module, "measure_dps", lambda *_: pytest.fail("measured twice"))
    monkeypatch.setattr(module, "measure_network", lambda *_: pytest.fail("measured twice"))
    assert study(subject(), 1).numbers == found.numbers


def test_memory_is_that_of_parameters_ring_and_activations(pipe: Any, configure: Configure) -> None:
    shape = Transformer(4, 512, 8, 16)  # 67 MB
    found = measure_network(shape, Context.of(pipe, configure("cache.interval=3")))
    assert found.predicted_peak_bytes == 4 * (found.parameters + 10 * found.feature) + found.ring_bytes
    assert found.parameter_bytes == 4 * found.parameters
    if found.peak_bytes is not None:
        assert 0.8 * found.parameter_bytes < found.peak_bytes < 2 * found.predicted_peak_bytes
