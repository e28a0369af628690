"""The cached, corrected network on the calibration inputs, step by step: what stage 4 looks at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from tqdm import tqdm

from cachequant.cache.feature_cache import FeatureCache
from cachequant.pipeline.calibrate import Calibration
from cachequant.pipeline.chunks import Chunks
from cachequant.pipeline.context import Context
from cachequant.pipeline.features import calibration_cache
from cachequant.pipeline.hook import Call
from cachequant.pipeline.inputs import spread
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
        return calibration_cache(self.context, self.schedule)

    def call(self, step: int, limit: int | None = None) -> Call:
        """The inputs of one step on the network's device, as many as its kind of step keeps, at most `limit`."""
        settings = self.context.config.calibration
        count = settings.refresh_inputs if self.schedule.is_refresh(step) else settings.cached_inputs
        device = next(self.context.adapter.denoiser.parameters()).device
        rows = self.calibration.inputs[step].rows(min(count, limit or count), device)
        return Call(rows.x, rows.timestep, dict(rows.kwargs))

    def evaluate(self, call: Call, cache: FeatureCache) -> Tensor:
        """The prediction [n, C, H, W] of one step's call, at the cache's step."""
        network = Chunks.of(self.context, len(call.x))
        if cache.must_refresh:
            output, feature = network.full(call)
            cache.store(feature)
            return output
        affine = self.correction.cache.get(cache.step)
        reused = cache.reuse(None if affine is None else affine.to(call.x.device, call.x.dtype))
        return network.cached(call, reused[spread(len(reused), len(call.x)).to(reused.device)])

    def run(
        self, cache: FeatureCache, label: str, steps: Sequence[int] | None = None, limit: int | None = None
    ) -> Iterator[int]:
        """Run steps in order; each is yielded behind its evaluation.

        Args:
            cache: of `fresh_cache`.
            label: text of the progress bar.
            steps: all by default; a cached one needs the refreshes before it.
            limit: of `call`.
        """
        wanted = range(self.schedule.num_steps) if steps is None else steps
        for step in tqdm(wanted, desc=label, unit="step", leave=False, disable=None):
            cache.step = step
            self.evaluate(self.call(step, limit), cache)
            yield step
