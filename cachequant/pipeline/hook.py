"""Stand between a pipeline and its denoiser: the pipeline's own loop drives every stage and every accelerated run.

So classifier-free guidance, any scheduler (PLMS evaluates twice) and any conditioning work as they do without us.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.errors import UserError
from cachequant.models.adapter import Adapter


@dataclass(frozen=True)
class Call:
    """One evaluation that the pipeline asked for.

    Attributes:
        x: the sample x_t [B, C, H, W] (both guidance halves where the pipeline doubles the batch).
        timestep: training timestep.
        kwargs: conditioning and everything else, by the names of the denoiser's forward.
    """

    x: Tensor
    timestep: Any
    kwargs: dict[str, Any]


StepFunction = Callable[[Call], Tensor]


class DenoiserHook:
    """Routes every denoiser call of a pipeline through `step`, and resets the cache at every pipeline call.

    The start of a pipeline call is `scheduler.set_timesteps`, which every diffusers pipeline calls once. Its first
    evaluation is looked up once (an image-to-image run starts later than 0); from there the counter counts calls.

    Args:
        pipe: the pipeline; changed only through instance attributes that `remove` deletes.
        adapter: its denoiser's adapter.
        cache: holds the step counter.
        step: takes the call, returns the denoiser's output [B, C, H, W].
        expected: timesteps that the run must have, or None to accept any.
        check: called at the first evaluation of each run; may refuse it.
    """

    def __init__(
        self,
        pipe: Any,
        adapter: Adapter,
        cache: FeatureCache,
        step: StepFunction,
        expected: tuple[int, ...] | None = None,
        check: Callable[[Call], None] | None = None,
    ) -> None:
        self.pipe, self.adapter, self.cache, self.step = pipe, adapter, cache, step
        self.expected, self.check = expected, check
        self.scheduler = pipe.scheduler
        self._signature = inspect.signature(type(adapter.denoiser).forward)
        self._fresh = False

    def install(self) -> DenoiserHook:
        """Take the pipeline's calls from now on.

        Raises:
            UserError: it is taken already.
        """
        if "forward" in vars(self.adapter.denoiser) and hasattr(self.adapter.denoiser.forward, "cachequant_hook"):
            raise UserError("this pipeline is enabled already: call cachequant.disable(pipe) first")

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            result = type(self.scheduler).set_timesteps(self.scheduler, *args, **kwargs)
            self._begin()
            return result

        forward.cachequant_hook = self  # type: ignore[attr-defined]
        self.adapter.denoiser.forward = forward  # type: ignore[method-assign]
        self.scheduler.set_timesteps = set_timesteps
        return self

    def remove(self) -> None:
        """Give the pipeline back as it was."""
        vars(self.adapter.denoiser).pop("forward", None)
        vars(self.scheduler).pop("set_timesteps", None)

    def __enter__(self) -> DenoiserHook:
        return self.install()

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _begin(self) -> None:
        """A pipeline call starts: nothing of the one before may leak into it."""
        found = tuple(int(t) for t in self.scheduler.timesteps)
        if self.expected is not None and found != self.expected:
            raise UserError(
                f"this run has {len(found)} evaluations from timestep {found[0]}, the plan expects {len(self.expected)} "
                f"from {self.expected[0]}: use the plan's number of steps and scheduler, or calibrate for these"
            )
        self.cache.reset()
        self._fresh = True

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(self.adapter.denoiser, *args, **kwargs).arguments
        names = list(self._signature.parameters)[1:3]
        extra = {k: v for k, v in bound.items() if k not in ("self", "return_dict", "kwargs", *names)}
        call = Call(bound[names[0]], bound[names[1]], {**extra, **bound.get("kwargs", {})})
        if self._fresh:
            self._first_call(call)
        elif self.cache.step >= self.cache.schedule.num_steps:
            raise UserError(
                f"evaluation {self.cache.step} of a plan for {self.cache.schedule.num_steps}: "
                "call scheduler.set_timesteps at the start of every run, on the scheduler that was enabled"
            )
        refreshed = self.cache.must_refresh
        output = self.step(call)
        self.cache.advance(refreshed)
        return self.adapter.pack(output, bound.get("return_dict", True))

    def _first_call(self, call: Call) -> None:
        """Find where in the sampler this run starts, once, and let `check` refuse it."""
        first = torch.as_tensor(call.timestep).flatten()[0].to(self.scheduler.timesteps.device)
        position = (self.scheduler.timesteps == first).nonzero()
        if self.check is not None:
            self.check(call)
        self.cache.reset(int(position[0]) if len(position) else 0)
        self._fresh = False
