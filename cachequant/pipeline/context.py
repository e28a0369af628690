"""What every stage is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm import tqdm

from cachequant.cache.feature_cache import FeatureCache
from cachequant.config import RunConfig
from cachequant.errors import UserError
from cachequant.models.adapter import Adapter, adapter, device_of, on_card
from cachequant.models.loading import Generator, identify
from cachequant.models.prompts import read_prompts, refuse_shared_prompts
from cachequant.pipeline.hook import Call, DenoiserHook, RunFinished, StepFunction, refuse_taken
from cachequant.pipeline.linear_sampler import LinearSampler
from cachequant.plan import ModelIdentity
from cachequant.schedule import num_groups

FRESH, HELD_OUT, ROUNDING, JUDGING = 1_000_000, 2_000_000, 3_000_000, 4_000_000
"""Offsets of the seeds of stage 2's fresh trajectories, the schedule's held-out noise, the rounding's trajectories and the
noise on which studies judge."""


@dataclass(frozen=True)
class Context:
    """A pipeline, its configuration, and what follows from the two.

    Attributes:
        pipe: the diffusers pipeline; every stage leaves it as it found it.
        config: the resolved configuration.
        adapter: structural view of the denoiser.
        identity: exact names of model, scheduler and guidance.
        timesteps: timestep of each evaluation; their number is T (PLMS has one more than the sampler's steps).
    """

    pipe: Any
    config: RunConfig
    adapter: Adapter
    identity: ModelIdentity
    timesteps: tuple[int, ...]

    @staticmethod
    def of(pipe: Any, config: RunConfig) -> Context:
        """Look at a pipeline.

        Raises:
            UserError: unsupported model, impossible branch, more steps than the scheduler has, or a pipeline in use.
        """
        structure = adapter(pipe, config.cache.branch, config.cache.span)
        refuse_taken(structure.denoiser)
        scheduler = getattr(pipe, "scheduler", None)
        if scheduler is None or not hasattr(scheduler, "alphas_cumprod"):
            raise UserError(
                f"{type(pipe).__name__} has scheduler {type(scheduler).__name__}, expected a discrete one with "
                "alphas_cumprod such as DDIMScheduler or PNDMScheduler: set pipe.scheduler to one"
            )
        available = int(scheduler.config.num_train_timesteps)
        if config.sampler.steps > available:
            raise UserError(f"sampler.steps is {config.sampler.steps}, expected at most {available} for this scheduler")
        pipe.scheduler.set_timesteps(config.sampler.steps)
        timesteps = tuple(int(t) for t in pipe.scheduler.timesteps)
        return Context(pipe, config, structure, identify(pipe, config.sampler.guidance_scale), timesteps)

    @property
    def num_steps(self) -> int:
        """T, the evaluations of one run."""
        return len(self.timesteps)

    @property
    def refreshes(self) -> int:
        """K, the full steps of one run: `cache.refreshes`, or ceil(steps / N), as the released scripts count them.

        A sampler may evaluate more often than it has steps (PLMS once more). With N = 1 nothing is cached all the same.
        """
        cache = self.config.cache
        if cache.refreshes is not None:
            return cache.refreshes
        return self.num_steps if cache.interval == 1 else num_groups(self.config.sampler.steps, cache.interval)

    def generator(self, sampling: bool = False) -> Generator:
        """Calls the pipeline by seeds, on the calibration's prompts or, `sampling`, on the sampler's.

        Raises:
            UserError: a list that cannot be read, or one that shares prompts with the calibration's.
        """
        sampler, own = self.config.sampler, self.config.calibration.prompts
        if own is None or sampling:
            prompts = read_prompts(sampler.prompts)
            refuse_shared_prompts(read_prompts(own), prompts)
        else:
            prompts = read_prompts(own)
        return Generator(self.pipe, sampler, prompts)

    def seeds(self, offset: int = 0, count: int | None = None) -> list[int]:
        """Seeds of calibration trajectories; other offsets give other noise."""
        first = self.config.calibration.seed + offset
        return list(range(first, first + (count or self.config.calibration.samples)))

    @property
    def fresh_seeds(self) -> list[int]:
        """Seeds of the trajectories of stage 2, and of stage 5 in full precision."""
        return self.seeds(FRESH, self.config.calibration.dec_samples)

    @property
    def paired_seeds(self) -> list[int]:
        """Seeds of stage 1, in whole batches, on which stage 5 free-runs: its noise has been seen in full precision."""
        settings = self.config.calibration
        batches = -(-(settings.dec_samples or settings.samples) // settings.batch_size)
        return self.seeds()[: batches * settings.batch_size]

    def run(
        self,
        step: StepFunction,
        cache: FeatureCache,
        seeds: list[int],
        label: str,
        batch_size: int | None = None,
        sampling: bool = False,
        sampler: LinearSampler | None = None,
    ) -> Iterator[Tensor]:
        """Drive the pipeline's own loop through `step`, batch by batch, with a progress bar: images [B, C, H, W].

        Args:
            step: called for every denoiser call.
            cache: step counter and features.
            seeds: one image each.
            label: text of the progress bar.
            batch_size: images at once, default calibration.batch_size.
            sampling: for the images themselves, not for calibration: another list of prompts.
            sampler: of `DenoiserHook`.
        """
        yield from self._drive(step, cache, seeds, label, batch_size, self.generator(sampling), True, sampler)

    def trajectories(
        self,
        step: StepFunction,
        cache: FeatureCache,
        seeds: list[int],
        label: str,
        batch_size: int | None = None,
        sampler: LinearSampler | None = None,
    ) -> None:
        """As `run`, for what `step` gathers on the way: the pipeline is left behind its last step, nothing is decoded."""
        for _ in self._drive(step, cache, seeds, label, batch_size, self.generator(), False, sampler):
            pass

    def _drive(
        self,
        step: StepFunction,
        cache: FeatureCache,
        seeds: list[int],
        label: str,
        batch_size: int | None,
        generator: Generator,
        decode: bool,
        sampler: LinearSampler | None,
    ) -> Iterator[Tensor]:
        size = batch_size or self.config.calibration.batch_size
        shown = dict(getattr(self.pipe, "_progress_bar_config", {}))
        self.pipe.set_progress_bar_config(disable=True)
        batches = [seeds[i : i + size] for i in range(0, len(seeds), size)]
        with tqdm(total=len(batches) * self.num_steps, desc=label, unit="step", leave=False, disable=None) as bar:

            def counted(call: Call) -> Tensor:
                bar.update(call.opens)
                return step(call)

            try:
                for batch in batches:
                    hook = DenoiserHook(
                        self.pipe, self.adapter, cache, counted, self.timesteps, leave=not decode, sampler=sampler
                    )
                    images = None
                    with on_card(device_of(self.adapter.denoiser)), hook, suppress(RunFinished):
                        images = generator(batch)
                    if images is not None:
                        yield images
            finally:
                self.pipe.set_progress_bar_config(**shown)
