"""The one mutable thing at run time: which step it is and which features are kept."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor

from cachequant.errors import UserError
from cachequant.types import AffineMap, Schedule


@dataclass
class FeatureCache:
    """Step counter and reused features of one pipeline call.

    The counter is advanced by evaluations and reset at the start of every pipeline call. Features are kept raw: every
    cached step corrects from the raw one, corrections never chain. `keep` is how many refreshes are remembered (2 with
    a forecast), `channel_dim` where a feature has its channels. `context` says whose features are meant: a pipeline that
    calls its denoiser once for the condition and once without it has two contexts that must never read each other.
    """

    schedule: Schedule
    keep: int = 1
    channel_dim: int = 1
    step: int = 0
    context: Hashable = 0
    full_steps: int = 0
    cached_steps: int = 0
    _held: dict[Hashable, list[Tensor]] = field(default_factory=dict)

    def reset(self, first_step: int = 0) -> None:
        """Forget everything; the next denoiser call is evaluation `first_step`."""
        self.step, self.context = first_step, 0
        self.clear()

    def clear(self) -> None:
        """Let go of the features of every context."""
        self._held.clear()

    @property
    def features(self) -> list[Tensor]:
        """The current context's features, newest first."""
        return self._held.setdefault(self.context, [])

    @property
    def must_refresh(self) -> bool:
        """Whether this call runs the whole network: the step is scheduled, or nothing is cached yet."""
        return not self.features or self.schedule.is_refresh(self.step)

    def store(self, feature: Tensor) -> None:
        """Keep the feature of a refresh [..., C at channel_dim, ...]."""
        self.features.insert(0, feature)
        del self.features[self.keep :]

    @property
    def regressors(self) -> tuple[Tensor, ...]:
        """Newest feature first; without an earlier one the newest stands in for it."""
        if not self.features:
            raise UserError("a cached step ran before any refresh: start each run with scheduler.set_timesteps")
        padding = (self.features[-1],) * (self.keep - len(self.features))
        return (*self.features, *padding)

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
