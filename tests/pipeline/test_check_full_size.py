"""The script that holds integers of full-size networks against their simulation, on a toy network and the CPU's integers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from cachequant.config import RunConfig, repository_folder
from cachequant.kernels.cpu import unavailable
from cachequant.pipeline.context import Context
from cachequant.pipeline.hook import Call

Configure = Callable[..., RunConfig]
QUIET = {"simulated_to_full": 1.0, "integers_to_full": 1.0, "integers_to_simulated": 0.8, "nudged_to_simulated": 0.0}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(repository_folder() / "scripts" / "gpu")
    return importlib.import_module("check_full_size")


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_integers_of_a_toy_are_right(script: ModuleType, pipe: Any, configure: Configure) -> None:
    context = Context.of(pipe, configure("cache.interval=2", "sample.batch_size=2", "quant.weight_symmetric=true"))
    found = script.compare(context, "cpu-int8", torch.float32)
    assert found["ok"] and found["half_to_simulated"] == 0.0  # the same simulation in the same precision
    assert 0 < found["integers_to_simulated"] < 0.7 * found["simulated_to_full"]


def test_integers_may_differ_by_what_half_precision_moves_the_simulation_by(script: ModuleType) -> None:
    assert script.is_right(QUIET, 0.75)
    assert not script.is_right(QUIET, 0.7)
    assert not script.is_right(QUIET | {"integers_to_full": 1.2}, 0.75)
    assert script.is_right(QUIET | {"integers_to_simulated": 0.6}, 0.0)


def test_a_call_is_cast_where_it_is_floating_point(script: ModuleType) -> None:
    x, labels = torch.rand(2, 3, 4, 4), torch.tensor([1, 2])
    call = Call(x, 5, {"class_labels": labels, "encoder_hidden_states": x, "return_dict": False})
    cast = script.rounded(script.Evaluation(0, call, x), torch.float16).call
    assert cast.x.dtype == cast.kwargs["encoder_hidden_states"].dtype == torch.float16
    assert cast.kwargs["class_labels"] is labels and cast.timestep == 5 and not cast.kwargs["return_dict"]
