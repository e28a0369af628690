"""Stand between a pipeline and its denoiser: the pipeline's own loop drives every stage and every accelerated run.

So classifier-free guidance, any scheduler (PLMS evaluates twice) and any conditioning work as they do without us.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.errors import UserError
from cachequant.models.adapter import Adapter
from cachequant.pipeline.linear_sampler import LinearSampler


@dataclass(frozen=True)
class Call:
    """One denoiser call that the pipeline made.

    Attributes:
        x: the sample x_t [B, C, H, W] (both guidance halves where the pipeline doubles the batch).
        timestep: training timestep, one number or one per row.
        kwargs: conditioning and everything else, by the names of the denoiser's forward.
        context: whose call it is, where a pipeline makes several for one evaluation: a name, or its place among them.
        opens: whether it is the first of its evaluation.
    """

    x: Tensor
    timestep: Any
    kwargs: dict[str, Any]
    context: Hashable = 0
    opens: bool = True

    def rows(self, index: Tensor | slice) -> Call:
        """Some rows of the batch, with their timesteps and conditioning; what is not per row stays as it is."""
        kwargs = {name: self._cut(value, index) for name, value in self.kwargs.items()}
        return replace(self, x=self._cut(self.x, index), timestep=self._cut(self.timestep, index), kwargs=kwargs)

    def _cut(self, value: Any, index: Tensor | slice) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or len(value) != len(self.x):
            return value
        return value[index.to(value.device) if isinstance(index, Tensor) else index]


StepFunction = Callable[[Call], Tensor]
SCHEDULER_CALLS = ("set_timesteps", "step")
"""What is listened to on the scheduler."""


class RunFinished(Exception):
    """Leaves a pipeline behind its last scheduler step; whoever asked for that catches it."""


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
    evaluation is looked up once (an image-to-image run starts later than 0); from there the counter counts evaluations.
    An evaluation ends with `scheduler.step`: all calls before it belong to the same one, each with a context of its own
    (condition and no condition, one after the other). A timestep that the scheduler visits twice, as PLMS does, has two
    scheduler steps and is two evaluations. In a loop without it, another timestep begins another evaluation. Contexts are
    told apart by the name that the pipeline gives them through diffusers' `cache_context`, else by their order.

    Args:
        pipe: the pipeline; changed only through instance attributes that `remove` deletes.
        adapter: its denoiser's adapter.
        cache: holds the step counter.
        step: takes the call, returns the denoiser's output [B, C, H, W].
        expected: timesteps that the run must have, or None to accept any.
        check: called at the first evaluation of each run; may refuse it.
        leave: raise `RunFinished` behind the last scheduler step, so that nothing is decoded.
        sampler: takes the scheduler's steps where it can.
    """

    def __init__(
        self,
        pipe: Any,
        adapter: Adapter,
        cache: FeatureCache,
        step: StepFunction,
        expected: tuple[int, ...] | None = None,
        check: Callable[[Call], None] | None = None,
        leave: bool = False,
        sampler: LinearSampler | None = None,
    ) -> None:
        self.pipe, self.adapter, self.cache, self.step = pipe, adapter, cache, step
        self.expected, self.check, self.leave, self.sampler = expected, check, leave, sampler
        self.scheduler = pipe.scheduler
        self._signature = inspect.signature(type(adapter.denoiser).forward)
        self._names = [p.name for p in self._signature.parameters.values() if p.kind is not p.VAR_KEYWORD][1:]
        self._known = frozenset(self._names)
        self._fresh = self._begun = self._refreshed = False
        self._calls: Counter[Hashable] = Counter()  # of the current evaluation, by the name of their context
        self._name: Hashable = None
        self._timestep: Any = None  # of the current evaluation
        self._ours: dict[str, Any] = {}  # what stands on the scheduler, and what stood there
        self._theirs: dict[str, Any] = {}

    def install(self) -> DenoiserHook:
        """Take the pipeline's calls from now on.

        Raises:
            UserError: it is taken already.
        """
        denoiser, scheduler = self.adapter.denoiser, self.scheduler
        refuse_taken(denoiser)
        self._begun = False
        self._theirs = {name: vars(scheduler)[name] for name in SCHEDULER_CALLS if name in vars(scheduler)}
        begin, move = scheduler.set_timesteps, scheduler.step

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        @functools.wraps(begin)  # pipelines look at its signature
        def set_timesteps(*args: Any, **kwargs: Any) -> Any:
            result = begin(*args, **kwargs)
            self._begin()
            return result

        @functools.wraps(move)
        def step(*args: Any, **kwargs: Any) -> Any:
            """One scheduler step, from the table where there is one; it ends the evaluation."""
            moved = None if self.sampler is None else self.sampler.move(self.cache.step, args, kwargs)
            result = move(*args, **kwargs) if moved is None else moved
            self._end_evaluation()
            if self.leave and self.cache.step >= self.cache.schedule.num_steps:
                raise RunFinished
            return result

        forward.cachequant_hook = self  # type: ignore[attr-defined]
        denoiser.forward = forward  # type: ignore[method-assign]
        self._ours = dict(zip(SCHEDULER_CALLS, (set_timesteps, step), strict=True))
        vars(scheduler).update(self._ours)
        if hasattr(type(denoiser), "cache_context"):
            denoiser.cache_context = self._named_context  # type: ignore[assignment]
        return self

    def remove(self) -> None:
        """Give the pipeline back as it was; what somebody put over ours in the meantime stays."""
        self._end_evaluation()
        for name in ("forward", "cache_context"):
            vars(self.adapter.denoiser).pop(name, None)
        for name, ours in self._ours.items():
            if vars(self.scheduler).get(name) is ours:
                del vars(self.scheduler)[name]
                vars(self.scheduler).update({name: self._theirs[name]} if name in self._theirs else {})
        self._ours = {}

    def __enter__(self) -> DenoiserHook:
        return self.install()

    def __exit__(self, *_: object) -> None:
        self.remove()

    @contextmanager
    def _named_context(self, name: Hashable, **kwargs: Any) -> Iterator[None]:
        """Calls inside belong to the context called `name`; the class's own manager is entered too."""
        self._name = name
        try:
            with type(self.adapter.denoiser).cache_context(self.adapter.denoiser, name, **kwargs):  # type: ignore[attr-defined]
                yield
        finally:
            self._name = None

    def _begin(self) -> None:
        """A pipeline call starts: nothing of the one before may leak into it."""
        found = tuple(int(t) for t in self.scheduler.timesteps)
        if self.expected is not None and found != self.expected:
            raise UserError(
                f"this run has {len(found)} evaluations from timestep {found[0]}, the plan expects {len(self.expected)} "
                f"from {self.expected[0]}: use the plan's number of steps and scheduler, or calibrate for these"
            )
        self._end_evaluation()
        self.cache.reset()
        if self.sampler is not None:
            self.sampler.begin()
        self._fresh = self._begun = True

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        bound, names = self._bound(args, kwargs), self._names[:2]
        conditioning = {k: v for k, v in bound.items() if k != "return_dict" and k not in names}
        timestep = bound[names[1]]
        if self._calls.total() and not self._same_entry(timestep):
            self._end_evaluation()
        context = self._name, self._calls[self._name]
        call = Call(bound[names[0]], timestep, conditioning, context, opens=not self._calls.total())
        if call.opens:
            self._open_evaluation(call)
        self._calls[self._name] += 1
        self.cache.context = call.context
        output = self.step(call)
        return self.adapter.pack(output, bound.get("return_dict", True))

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the denoiser's forward by name, as `Signature.bind` finds them, which takes a tenth of a step's time.

        Raises:
            TypeError: they do not fit the forward.
        """
        given = dict(zip(self._names, args, strict=False))
        if len(args) > len(self._names) or given.keys() & kwargs.keys() or not kwargs.keys() <= self._known:
            found = self._signature.bind(self.adapter.denoiser, *args, **kwargs).arguments
            rest = found.pop("kwargs", {})
            return {name: value for name, value in (found | rest).items() if name != "self"}
        given |= kwargs
        if not all(name in given for name in self._names[:2]):
            self._signature.bind(self.adapter.denoiser, *args, **kwargs)
        return given

    def _open_evaluation(self, call: Call) -> None:
        """The first call of an evaluation: is it one of a run that was begun, and the first of that run?"""
        ended = self.cache.step >= self.cache.schedule.num_steps
        if not self._begun or self.pipe.scheduler is not self.scheduler or (ended and not self._fresh):
            raise UserError(
                f"evaluation {self.cache.step} of {self.cache.schedule.num_steps} without a start: call "
                "scheduler.set_timesteps before every run, on the scheduler that was enabled"
            )
        if self._fresh:
            self._first_call(call)
        self._timestep = call.timestep
        self.cache.context = call.context
        self._refreshed = self.cache.must_refresh

    def _first_call(self, call: Call) -> None:
        """Find where in the sampler this run starts, once, and let `check` refuse it."""
        first = _first(call.timestep).to(self.scheduler.timesteps.device)
        position = (self.scheduler.timesteps == first).nonzero()
        if self.check is not None:
            self.check(call)
        self.cache.reset(int(position[0]) if len(position) else 0)
        self._fresh = False

    def _same_entry(self, timestep: Any) -> bool:
        """Whether a timestep is the current evaluation's: the same entry of the scheduler's table, or an equal value."""
        known, table = self._timestep, self.scheduler.timesteps
        if known is timestep:
            return True
        if _shares_memory(known, table) and _shares_memory(timestep, table):
            return bool(known.data_ptr() == timestep.data_ptr())  # PLMS repeats a value in another entry
        return bool(_first(known).cpu() == _first(timestep).cpu())

    def _end_evaluation(self) -> None:
        """Count the evaluation that is open, if one is: the next call opens another."""
        if not self._calls.total():
            return
        self._calls.clear()
        self.cache.advance(self._refreshed)
        if self.cache.step >= self.cache.schedule.num_steps:
            self.cache.clear()  # the run is over: nothing to hold memory for


def _shares_memory(value: Any, table: Tensor) -> bool:
    """Whether a value is a view into a table; the device is not waited for."""
    return isinstance(value, Tensor) and value.untyped_storage().data_ptr() == table.untyped_storage().data_ptr()


def _first(timestep: Any) -> Tensor:
    """The timestep of the first row: []."""
    return torch.as_tensor(timestep).flatten()[0]
