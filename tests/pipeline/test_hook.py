"""Arguments of a denoiser's call by name, against Python's own binding of a signature."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from cachequant.cache.feature_cache import FeatureCache
from cachequant.pipeline.hook import Call, DenoiserHook
from cachequant.schedule import uniform_schedule


class Denoiser(torch.nn.Module):
    def forward(self, sample: Any, timestep: Any, context: Any = None, return_dict: bool = True, **kwargs: Any) -> Any:
        """The usual names."""


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((1, 2), {}),
        ((1, 2, 3, False), {}),
        ((1,), {"timestep": 2, "context": 3}),
        ((), {"timestep": 2, "sample": 1}),
        ((1, 2), {"other": 5, "return_dict": False}),
        ((), {}),
        ((1,), {"context": 3}),
        ((1, 2), {"timestep": 3}),
        ((1, 2, 3, True, 5), {}),
    ],
)
def test_a_call_is_bound_as_its_signature_binds_it(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    denoiser, calls = Denoiser(), list[Call]()
    adapter: Any = SimpleNamespace(denoiser=denoiser, pack=lambda output, packed: (output, packed))
    pipe = SimpleNamespace(scheduler=DDIMScheduler())
    hook = DenoiserHook(pipe, adapter, FeatureCache(uniform_schedule(4, 2)), lambda call: calls.append(call))  # type: ignore[arg-type, func-returns-value]
    with hook:
        pipe.scheduler.set_timesteps(4)
        try:
            expected = inspect.signature(Denoiser.forward).bind(denoiser, *args, **kwargs).arguments
        except TypeError:
            with pytest.raises(TypeError):
                denoiser(*args, **kwargs)
            return
        _, packed = denoiser(*args, **kwargs)
    (call,) = calls
    rest = {name: expected[name] for name in expected.keys() - {"self", "sample", "timestep", "return_dict", "kwargs"}}
    assert (call.x, call.timestep, call.kwargs) == (1, 2, rest | expected.get("kwargs", {}))
    assert packed is expected.get("return_dict", True)
