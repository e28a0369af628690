"""The one mutable thing at run time: which step it is and which features are kept."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from cachequant.errors import UserError
from cachequant.types import AffineMap, Schedule


@dataclass
class FeatureCache:
    """Step counter and reused features of one pipeline call.

    The counter is advanced by denoiser calls and reset at the start of every pipeline call. Features are kept raw: every
    cached step corrects from the raw one, corrections never chain. `keep` is how many refreshes are remembered (2 with
    a forecast).
    """

    schedule: Schedule
    keep: int = 1
    step: int = 0
    features: list[Tensor] = field(default_factory=list)
    full_steps: int = 0
    cached_steps: int = 0

    def reset(self, first_step: int = 0) -> None:
        """Forget everything; the next denoiser call is evaluation `first_step`."""
        self.step = first_step
        self.features.clear()

    @property
    def must_refresh(self) -> bool:
        """Whether this step runs the whole network: it is scheduled, or nothing is cached yet."""
        return not self.features or self.schedule.is_refresh(self.step)

    def store(self, feature: Tensor) -> None:
        """Keep the feature of a refresh [B, C, H, W]."""
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
        """The feature of this step [B, C, H, W]: the raw one, or its correction."""
        if correction is None:
            return self.regressors[0]
        regressors = self.regressors
        previous = regressors[1] if correction.previous is not None else None
        return correction.apply(regressors[0], previous)

    def advance(self, refreshed: bool) -> None:
        """Count the step that was just taken."""
        self.step += 1
        if refreshed:
            self.full_steps += 1
        else:
            self.cached_steps += 1
