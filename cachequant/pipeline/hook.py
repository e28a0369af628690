"""Stand between a pipeline and its denoiser: the pipeline's own loop drives every stage and every accelerated run.

So classifier-free guidance, any scheduler (PLMS evaluates twice) and any conditioning work as they do without us.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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


def refuse_taken(denoiser: nn.Module) -> None:
    """Raise if somebody already stands before this denoiser's forward.

    Raises:
        UserError: a plan is enabled on it, or another library wrapped it (CPU offload does).
    """
    forward = vars(denoiser).get("forward")
    if forward is None:
        return
    if hasattr(forward, "cachequant_hook"):
        raise UserError("this pipeline is enabled already, expected a plain one: call cachequant.disable(pipe) first")
    raise UserError(
        "another library wraps this denoiser's forward (CPU offload does), expected a plain one: remove that hook first"
    )


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
        self._fresh = self._begun = False

    def install(self) -> DenoiserHook:
        """Take the pipeline's calls from now on.

        Raises:
            UserError: it is taken already.
        """
        refuse_taken(self.adapter.denoiser)
        self._begun = False

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        @functools.wraps(self.scheduler.set_timesteps)  # pipelines look at its signature
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
        self._fresh = self._begun = True

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(self.adapter.denoiser, *args, **kwargs).arguments
        names = list(self._signature.parameters)[1:3]
        extra = {k: v for k, v in bound.items() if k not in ("self", "return_dict", "kwargs", *names)}
        call = Call(bound[names[0]], bound[names[1]], {**extra, **bound.get("kwargs", {})})
        ended = self.cache.step >= self.cache.schedule.num_steps
        if not self._begun or self.pipe.scheduler is not self.scheduler or (ended and not self._fresh):
            raise UserError(
                f"evaluation {self.cache.step} of {self.cache.schedule.num_steps} without a start: call "
                "scheduler.set_timesteps before every run, on the scheduler that was enabled"
            )
        if self._fresh:
            self._first_call(call)
        refreshed = self.cache.must_refresh
        output = self.step(call)
        self.cache.advance(refreshed)
        if self.cache.step >= self.cache.schedule.num_steps:
            self.cache.features.clear()  # the run is over: nothing to hold memory for
        return self.adapter.pack(output, bound.get("return_dict", True))

    def _first_call(self, call: Call) -> None:
        """Find where in the sampler this run starts, once, and let `check` refuse it."""
        first = torch.as_tensor(call.timestep).flatten()[0].to(self.scheduler.timesteps.device)
        position = (self.scheduler.timesteps == first).nonzero()
        if self.check is not None:
            self.check(call)
        self.cache.reset(int(position[0]) if len(position) else 0)
        self._fresh = False
