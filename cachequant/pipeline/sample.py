"""Images held in memory, with a plan or without, and what they cost; `sampling` is stage 6."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.kernels.backend import Backend, choose_backend
from cachequant.models.adapter import device_of
from cachequant.pipeline.context import Context
from cachequant.pipeline.graphed_step import deployed_sampler, deployed_step
from cachequant.pipeline.hook import Call, StepFunction
from cachequant.pipeline.step import cache_of
from cachequant.plan import Plan
from cachequant.quant.convert import QuantizedNetwork
from cachequant.quant.deploy import Deployment, attach
from cachequant.schedule import uniform_schedule
from cachequant.types import Correction


@dataclass(frozen=True)
class Samples:
    """Images and their trajectories.

    Attributes:
        images: [n, C, H, W] in [0, 1].
        trajectory: [T, n', C, H, W] x_t of the first batch, or None where it was not recorded.
        seconds: wall-clock time of the sampling.
    """

    images: Tensor
    trajectory: Tensor | None
    seconds: float


def backend_of(context: Context) -> Backend:
    """The backend that the configuration asks for, on the pipeline's device."""
    return choose_backend(context.config.backend, device_of(context.adapter.denoiser))


@dataclass(frozen=True)
class AtWork:
    """A plan on a context's denoiser.

    Attributes:
        step: one evaluation of the accelerated model.
        cache: its counter and features.
        network: what `attach` returned, None where nothing is quantised.
    """

    step: StepFunction
    cache: FeatureCache
    network: QuantizedNetwork | Deployment | None


@contextmanager
def at_work(context: Context, plan: Plan | None) -> Iterator[AtWork]:
    """Inside, a plan runs on the context's denoiser by the configuration's backend; None is the untouched model.

    Raises:
        UserError: the plan is not of this network, or the backend does not run here.
    """
    adapter = context.adapter
    correction, quant = (plan.correction, plan.quant) if plan else (Correction(), None)
    cache = cache_of(plan, adapter) if plan else FeatureCache(uniform_schedule(context.num_steps, 1))
    network = None
    if quant is not None:
        shallow, backend = adapter.shallow_names(), backend_of(context)
        network = attach(adapter.denoiser, quant, cache, correction, backend, shallow, context.timesteps)
    adapter.rebuild()
    try:
        yield AtWork(deployed_step(adapter, cache, correction, network), cache, network)
    finally:
        if network is not None:
            network.remove()
        adapter.rebuild()


def draw(context: Context, plan: Plan | None, seeds: list[int], label: str, record: bool = False) -> Samples:
    """Sample one image per seed; `plan` None is the untouched model.

    Args:
        context: pipeline and configuration (batch size from `sample.batch_size`, integers from `backend`).
        plan: what accelerates it.
        seeds: noise of each image; equal seeds give equal noise under every plan.
        label: text of the progress bar.
        record: keep x_t of the first batch.
    """
    path: list[Tensor] = []
    with at_work(context, plan) as running:

        def step(call: Call) -> Tensor:
            """The accelerated step, with x_t kept where asked."""
            if record and call.opens and len(path) < context.num_steps:
                path.append(call.x.detach().cpu().clone())
            return running.step(call)

        start, batch_size = time.perf_counter(), context.config.sample.batch_size
        sampler = deployed_sampler(context.pipe.scheduler, running.network)
        images = torch.cat(list(context.run(step, running.cache, seeds, label, batch_size, True, sampler)))
        seconds = time.perf_counter() - start
    return Samples(images, torch.stack(path) if path else None, seconds)
