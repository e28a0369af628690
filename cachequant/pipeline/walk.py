"""The cached, corrected network on the calibration inputs, step by step: what stage 4 looks at."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import Tensor
from tqdm import tqdm

from cachequant.cache.feature_cache import FeatureCache
from cachequant.pipeline.calibrate import Calibration
from cachequant.pipeline.chunks import Chunks
from cachequant.pipeline.context import Context
from cachequant.pipeline.hook import Call
from cachequant.pipeline.inputs import StepInput, spread
from cachequant.types import Correction, Schedule


@dataclass(frozen=True)
class Walk:
    """What determines the inputs of every layer at every step.

    Attributes:
        context: pipeline and configuration.
        calibration: inputs of every step.
        schedule: which steps run the whole network.
        correction: of the cached feature.
    """

    context: Context
    calibration: Calibration
    schedule: Schedule
    correction: Correction

    def fresh_cache(self) -> FeatureCache:
        """A cache for one walk: the clock of layers that are quantised."""
        keep = 2 if self.context.config.correction.forecast else 1
        return FeatureCache(self.schedule, keep, self.context.adapter.channel_dim)

    def steps(self, every: int = 1) -> list[int]:
        """Every refresh step and every `every`-th cached one between two of them."""
        return [t for t in range(self.schedule.num_steps) if (t - self.schedule.source(t)) % every == 0]

    def rows(self, step: int) -> StepInput:
        """The inputs of one step on the network's device, as many as its kind of step keeps."""
        settings = self.context.config.calibration
        count = settings.refresh_inputs if self.schedule.is_refresh(step) else settings.cached_inputs
        return self.calibration.inputs[step].rows(count, next(self.context.adapter.denoiser.parameters()).device)

    def run(
        self, cache: FeatureCache, label: str, steps: Collection[int] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Run each step; yields it behind its evaluation, with the prediction [n, C, H, W].

        Args:
            cache: of `fresh_cache`.
            label: text of the progress bar.
            steps: only these, which must hold every refresh step; all by default.
        """
        for step in tqdm(
            range(self.schedule.num_steps) if steps is None else steps,
            desc=label, unit="step", leave=False, disable=None,
        ):  # fmt: skip
            cache.step, rows = step, self.rows(step)
            yield step, self._evaluate(Chunks.of(self.context, len(rows.x)), cache, rows)

    def _evaluate(self, network: Chunks, cache: FeatureCache, rows: StepInput) -> Tensor:
        call = Call(rows.x, rows.timestep, dict(rows.kwargs))
        if cache.must_refresh:
            output, feature = network.full(call)
            cache.store(feature)
            return output
        affine = self.correction.cache.get(cache.step)
        reused = cache.reuse(None if affine is None else affine.to(rows.x.device, rows.x.dtype))
        return network.cached(call, reused[spread(len(reused), len(rows.x)).to(reused.device)])
