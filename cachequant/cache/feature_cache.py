"""The one mutable thing at run time: which step it is and which features are kept."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cachequant.errors import UserError
from cachequant.types import AffineMap, Schedule


@dataclass(frozen=True)
class HeldFeature:
    """A feature in 8 bits, on a grid of its own for every image and channel; what a refresh stored is never changed.

    Attributes:
        values: uint8 of the feature's shape.
        low: value of 0, of the feature's type, broadcastable to it.
        step: distance of two neighbours, at least in float32: half precision would miss by a step at the other end.
    """

    values: Tensor
    low: Tensor
    step: Tensor

    @staticmethod
    def of(feature: Tensor, channel_dim: int) -> HeldFeature:
        """Round a feature [B, ..., C at channel_dim, ...]; each value moves by at most half a step."""
        over = [d for d in range(1, feature.dim()) if d != channel_dim]
        wide = feature.to(torch.promote_types(feature.dtype, torch.float32))
        low, high = wide.amin(over, keepdim=True), wide.amax(over, keepdim=True)
        step = ((high - low) / 255).clamp(min=torch.finfo(wide.dtype).tiny)
        values = ((wide - low) / step).round_().clamp_(0, 255).to(torch.uint8)
        return HeldFeature(values, low.to(feature.dtype), step)

    def feature(self) -> Tensor:
        """The feature, in the type that it had."""
        return torch.addcmul(self.low.to(self.step), self.values.to(self.step), self.step).to(self.low.dtype)

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return sum(tensor.nbytes for tensor in (self.values, self.low, self.step))


@dataclass
class FeatureCache:
    """Step counter and reused features of one pipeline call.

    The counter is advanced by evaluations and reset at the start of every pipeline call. Features are kept raw: every
    cached step corrects from the raw one, corrections never chain. `keep` is how many refreshes are remembered (2 with
    a forecast), `channel_dim` where a feature has its channels. `context` says whose features are meant: a pipeline that
    calls its denoiser once for the condition and once without it has two contexts that must never read each other.
    With `bits` 8 features are held as integers, a quarter of float32's memory, and read anew at every cached step.
    """

    schedule: Schedule
    keep: int = 1
    channel_dim: int = 1
    bits: int | None = None
    step: int = 0
    context: Hashable = 0
    full_steps: int = 0
    cached_steps: int = 0
    _held: dict[Hashable, list[Tensor | HeldFeature]] = field(default_factory=dict)

    def reset(self, first_step: int = 0) -> None:
        """Forget everything; the next denoiser call is evaluation `first_step`."""
        self.step, self.context = first_step, 0
        self.clear()

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Inside, the counter stands at a step; afterwards it is where it was."""
        kept, self.step = self.step, step
        try:
            yield
        finally:
            self.step = kept

    def clear(self) -> None:
        """Let go of the features of every context."""
        self._held.clear()

    @property
    def features(self) -> list[Tensor | HeldFeature]:
        """The current context's features as they are held, newest first."""
        return self._held.setdefault(self.context, [])

    @property
    def nbytes(self) -> int:
        """Memory of the features of all contexts."""
        return sum(feature.nbytes for held in self._held.values() for feature in held)

    @property
    def must_refresh(self) -> bool:
        """Whether this call runs the whole network: the step is scheduled, or nothing is cached yet."""
        return not self.features or self.schedule.is_refresh(self.step)

    def store(self, feature: Tensor) -> None:
        """Keep the feature of a refresh [..., C at channel_dim, ...]."""
        self.features.insert(0, feature if self.bits is None else HeldFeature.of(feature, self.channel_dim))
        del self.features[self.keep :]

    @property
    def readable(self) -> tuple[Tensor, ...]:
        """The current context's features as cached steps read them, newest first; () before the first refresh."""
        return tuple(item.feature() if isinstance(item, HeldFeature) else item for item in self.features)

    @property
    def regressors(self) -> tuple[Tensor, ...]:
        """Newest feature first; without an earlier one the newest stands in for it."""
        if not self.features:
            raise UserError("a cached step ran before any refresh: start each run with scheduler.set_timesteps")
        found = self.readable
        return (*found, *(found[-1:] * (self.keep - len(found))))

    def reuse(self, correction: AffineMap | None) -> Tensor:
        """The feature of this step, shaped as it was stored: the raw one, or its correction."""
        if correction is None:
            return self.regressors[0]
        regressors = self.regressors
        previous = regressors[1] if correction.previous is not None else None
        return correction.apply(regressors[0], previous, self.channel_dim)

    def advance(self, refreshed: bool) -> None:
        """Count the step that was just taken."""
        self.step += 1
        if refreshed:
            self.full_steps += 1
        else:
            self.cached_steps += 1
