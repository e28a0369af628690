"""What the GPU bench compares: each mode sets a denoiser up for whole sampling runs and takes everything back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch

from cachequant.cache.feature_cache import FeatureCache
from cachequant.kernels.backend import CUDA_INT8, Backend, choose_backend
from cachequant.models.adapter import device_of
from cachequant.pipeline import bench_peers
from cachequant.pipeline.compiled import Compile, CompiledAdapter, Whole, inductor
from cachequant.pipeline.context import Context
from cachequant.pipeline.graphed_step import graphed_step
from cachequant.pipeline.graphs import Body, CudaRecorder, GraphedAdapter, Replay, capturable
from cachequant.pipeline.hook import StepFunction
from cachequant.pipeline.linear_sampler import LinearSampler
from cachequant.pipeline.step import accelerated_step, cache_of
from cachequant.plan import Plan
from cachequant.quant.convert import QuantizedNetwork
from cachequant.quant.deploy import Deployment, attach
from cachequant.schedule import uniform_schedule
from cachequant.types import Correction, Schedule


@dataclass(frozen=True)
class Running:
    """A mode at work.

    Attributes:
        step: evaluates the denoiser.
        cache: counts the steps.
        holds: objects whose memory is the denoiser's.
        graphs: whether its steps are CUDA graphs.
        simulated: layer -> why it is simulated, which keeps a plan's steps from being graphs.
        sampler: takes the scheduler's steps, as where `enable` runs graphs.
    """

    step: StepFunction
    cache: FeatureCache
    holds: tuple[Any, ...]
    graphs: bool = False
    simulated: Mapping[str, str] = field(default_factory=dict)
    sampler: LinearSampler | None = None


@dataclass
class Setup:
    """What modes are made of; the defaults are the GPU's.

    Attributes:
        context: pipeline and configuration.
        plan: makes the plan of "int8" and "cachequant", once, when the first of the two asks for it.
        half: precision of everything but the fp32 modes.
        record: makes a recorder of graphs.
        compile: makes a compiled function of a function.
        backend: gives the backend of integers, or raises a UserError.
    """

    context: Context
    plan: Callable[[], Plan]
    half: torch.dtype = torch.float16
    record: Callable[[], Callable[[Body], Replay]] = CudaRecorder
    compile: Compile = inductor
    backend: Callable[[Context], Backend] = field(default=lambda context: _integers(context))
    _compiled: tuple[CompiledAdapter, ExitStack] | None = None

    def compiled(self) -> CompiledAdapter:
        """The compiled steps, which consecutive modes share: compiling takes minutes."""
        if self._compiled is None:
            stack = ExitStack()
            self._compiled = CompiledAdapter(self.context.adapter, stack, self.compile), stack
        return self._compiled[0]

    def release(self) -> None:
        """Let go of the compiled steps and of what they installed in the network."""
        if self._compiled is not None:
            self._compiled[1].close()
        self._compiled = None

    def running(self, adapter: Any, schedule: Schedule, graphs: bool) -> Running:
        """The accelerated step of an adapter without corrections, as graphs or operator by operator."""
        cache = FeatureCache(schedule, channel_dim=self.context.adapter.channel_dim)
        if graphs:
            adapter = GraphedAdapter(adapter, cache, None, self.record())
        return Running(accelerated_step(adapter, cache, Correction()), cache, (self.context.adapter.denoiser,), graphs)

    @property
    def every(self) -> Schedule:
        """All steps in full."""
        return uniform_schedule(self.context.num_steps, 1)

    @property
    def some(self) -> Schedule:
        """Every so-many-th step in full."""
        return uniform_schedule(self.context.num_steps, self.context.config.cache.interval)


Make = Callable[[Setup], AbstractContextManager[Running]]


@dataclass(frozen=True)
class Mode:
    """One way to run a model.

    Attributes:
        note: what it is, for people.
        make: sets it up and takes it down.
        full_precision: float32 weights instead of half.
        tf32: let products of float32 round their operands to TF32.
        shares: keeps the compiled steps for the mode behind it.
        package: must be installed.
        needs: attribute that the denoiser must have.
    """

    note: str
    make: Make
    full_precision: bool = False
    tf32: bool = False
    shares: bool = False
    package: str | None = None
    needs: str | None = None

    def absent(self, context: Context) -> str | None:
        """Why this cannot run here, or None."""
        if self.package is not None and find_spec(self.package) is None:
            return f"the package {self.package} is not installed"
        if self.needs is not None and not hasattr(context.adapter.denoiser, self.needs):
            return f"{type(context.adapter.denoiser).__name__} is of another kind than this takes"
        return None


@contextmanager
def _eager(setup: Setup) -> Iterator[Running]:
    yield setup.running(Whole(setup.context.adapter.denoiser), setup.every, graphs=False)


@contextmanager
def _graph(setup: Setup) -> Iterator[Running]:
    yield setup.running(Whole(setup.context.adapter.denoiser), setup.every, graphs=True)


@contextmanager
def _compile(setup: Setup) -> Iterator[Running]:
    yield setup.running(setup.compiled(), setup.every, graphs=True)


@contextmanager
def _compile_cache(setup: Setup) -> Iterator[Running]:
    yield setup.running(setup.compiled(), setup.some, graphs=True)


@contextmanager
def _deepcache(setup: Setup) -> Iterator[Running]:
    cache = setup.context.config.cache
    with bench_peers.deepcache(setup.context.adapter, cache.interval, cache.branch, setup.compile) as adapter:
        yield setup.running(adapter, setup.some, graphs=True)


@contextmanager
def _cache_dit(setup: Setup) -> Iterator[Running]:
    with bench_peers.cache_dit(setup.context, setup.context.config.cache.interval, setup.compile) as (step, cache):
        yield Running(step, cache, (setup.context.adapter.denoiser,))


@contextmanager
def _torchao(setup: Setup) -> Iterator[Running]:
    with bench_peers.torchao(setup.context) as network:
        running = setup.running(Whole(network, setup.compile), setup.every, graphs=True)
        yield replace(running, holds=(network,))


@contextmanager
def _int8(setup: Setup) -> Iterator[Running]:
    yield from _integer_steps(setup, replace(setup.plan(), schedule=setup.every, correction=Correction()))


@contextmanager
def _cachequant(setup: Setup) -> Iterator[Running]:
    yield from _integer_steps(setup, setup.plan())


def _integer_steps(setup: Setup, plan: Plan) -> Iterator[Running]:
    """A plan at work as `enable` puts it to work."""
    adapter = setup.context.adapter
    cache = cache_of(plan, adapter)
    assert plan.quant is not None
    backend, shallow = setup.backend(setup.context), adapter.shallow_names()
    handle = attach(adapter.denoiser, plan.quant, cache, plan.correction, backend, shallow, setup.context.timesteps)
    adapter.rebuild()
    try:
        tables = capturable(handle)
        holds, simulated, sampler = (adapter.denoiser, handle), simulated_layers(handle), None
        if tables is None:
            step = accelerated_step(adapter, cache, plan.correction)
        else:
            context = getattr(handle, "context", None)
            step = graphed_step(adapter, cache, plan.correction, tables, setup.record(), context)
            sampler = LinearSampler(setup.context.pipe.scheduler)
        yield Running(step, cache, holds, tables is not None, simulated, sampler)
    finally:
        handle.remove()
        adapter.rebuild()


def simulated_layers(handle: QuantizedNetwork | Deployment) -> dict[str, str]:
    """Layer -> why it is simulated, of what `attach` returned."""
    if isinstance(handle, Deployment):
        return handle.reasons
    return dict.fromkeys([*handle.layers, *handle.attentions], "the backend simulates every layer")


def _integers(context: Context) -> Backend:
    wanted = context.config.backend
    return choose_backend(CUDA_INT8 if wanted == "auto" else wanted, device_of(context.adapter.denoiser))


MODES: dict[str, Mode] = {
    "fp32": Mode("float32, operator by operator, TF32 off", _eager, full_precision=True),
    "fp32-tf32": Mode("float32, operator by operator, TF32 on", _eager, full_precision=True, tf32=True),
    "fp16": Mode("float16, operator by operator", _eager),
    "fp16-graph": Mode("float16, a CUDA graph", _graph),
    "fp16-compile": Mode("float16, torch.compile in a CUDA graph", _compile, shares=True),
    "fp16-compile-cache": Mode(
        "the same with cached steps, uniform and uncorrected", _compile_cache, shares=True
    ),
    "deepcache": Mode(
        "DeepCache's wrappers in float16, both steps torch.compile in a CUDA graph", _deepcache, package="DeepCache",
        needs="up_blocks",
    ),
    "cache-dit": Mode(
        "cache-dit in float16, blocks by torch.compile", _cache_dit, package="cache_dit", needs="transformer_blocks"
    ),
    "torchao": Mode(
        "torchao's dynamic INT8 linear layers, torch.compile in a CUDA graph", _torchao, package="torchao"
    ),
    "int8": Mode("INT8, every step in full, CUDA graphs where no layer is simulated", _int8),
    "cachequant": Mode(
        "INT8 and cached steps with all corrections, CUDA graphs where no layer is simulated", _cachequant
    ),
}  # fmt: skip
"""Name -> mode, in the order in which they run."""
