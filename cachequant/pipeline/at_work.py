"""A plan at work on a context's denoiser, by the backend that the configuration asks for, and taken off again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cachequant.cache.feature_cache import FeatureCache
from cachequant.kernels.backend import Backend, choose_backend
from cachequant.models.adapter import device_of
from cachequant.pipeline.context import Context
from cachequant.pipeline.graphed_step import deployed_step
from cachequant.pipeline.hook import StepFunction
from cachequant.pipeline.step import cache_of
from cachequant.plan import Plan
from cachequant.quant.convert import QuantizedNetwork
from cachequant.quant.deploy import Deployment, attach
from cachequant.schedule import uniform_schedule
from cachequant.types import Correction


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
