"""The library: calibrate a diffusers pipeline, enable a plan on it, look at it, and take it off again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cachequant.cache.feature_cache import FeatureCache
from cachequant.config import RunConfig
from cachequant.errors import UserError
from cachequant.kernels.backend import Backend, choose_backend
from cachequant.lock import writer_lock
from cachequant.models.adapter import Adapter, adapter, denoiser_of, device_of
from cachequant.models.cost import float_bytes, plan_bytes
from cachequant.models.loading import identify
from cachequant.models.skeleton import build_pipeline, is_skeleton
from cachequant.pipeline.context import Context
from cachequant.pipeline.graphed_step import deployed_sampler, deployed_step
from cachequant.pipeline.hook import Call, DenoiserHook, StepFunction
from cachequant.pipeline.stages import Stages
from cachequant.pipeline.step import cache_of
from cachequant.plan import Plan
from cachequant.quant.convert import QuantizedNetwork
from cachequant.quant.deploy import Deployment, attach


@dataclass
class Acceleration:
    """A plan at work in a pipeline; found again through the pipeline's denoiser."""

    plan: Plan
    pipe: Any
    adapter: Adapter
    cache: FeatureCache
    hook: DenoiserHook
    network: QuantizedNetwork | Deployment | None
    backend: Backend


def calibrate(pipe: Any, config: RunConfig, folder: str | Path | None = None, quiet: bool = False) -> Plan:
    """Stages 1 to 5 for a pipeline object: schedule, corrections and quantisation in one plan.

    Args:
        pipe: a diffusers pipeline with a supported denoiser; it is left as it was.
        config: of `load_config`.
        folder: where stage outputs are kept, so that a second call resumes; default `config.output/model.name`.
        quiet: no progress lines.

    Raises:
        UserError: unsupported pipeline, impossible configuration, one that is enabled already, or a folder in use.
    """
    stages = Stages.at(Context.of(pipe, config), Path(folder) if folder else None, quiet=quiet)
    with writer_lock(stages.store.root):
        return stages.plan()[0]


def enable(pipe: Any, plan: Plan | str | Path, backend: str = "auto") -> Any:
    """Accelerate a pipeline in place until `disable`; prints what runs where. Returns the pipeline.

    Args:
        pipe: the pipeline that the plan was made for.
        plan: a plan or its folder.
        backend: "cpu-int8" runs real integers on oneDNN, "cuda-int8" on a GPU; "simulated" computes them in floating point,
            on any device; "torch_quantizer" runs the layers within its limits on that package's modules, on a GPU, and
            simulates the others; "auto" takes the fastest of ours that is exact here.

    Raises:
        UserError: enabled already, another model or scheduler, an unknown backend, nothing to replace, a damaged plan. The
            pipeline is then as it was.
    """
    chosen = choose_backend(backend, device_of(denoiser_of(pipe)))
    if find(pipe) is not None:
        raise UserError("this pipeline is enabled already, expected a plain one: call cachequant.disable(pipe) first")
    plan = plan if isinstance(plan, Plan) else Plan.load(plan)
    plan.identity.refuse_other(identify(pipe, plan.config.sampler.guidance_scale))
    structure = adapter(pipe, plan.config.cache.branch, plan.config.cache.span)
    cache = cache_of(plan, structure)
    network, step = _install(structure, plan, cache, chosen)

    def check(call: Call) -> None:
        _check_guidance(pipe, plan, structure, call)

    try:
        sampler = deployed_sampler(pipe.scheduler, network)
        hook = DenoiserHook(pipe, structure, cache, step, plan.timesteps, check, sampler=sampler)
        hook.install()
    except BaseException:
        _uninstall(structure, network)
        raise
    state = Acceleration(plan, pipe, structure, cache, hook, network, chosen)
    object.__setattr__(structure.denoiser, "_cachequant", state)
    print(report(pipe))
    return pipe


def load_quantized(plan: str | Path, backend: str = "auto") -> Any:
    """A pipeline with the plan enabled, from the plan's folder: the full-precision denoiser is neither read nor needed.

    Only its integers, what stays in float32 and one layer at a time on the way are ever in memory. Other parts of a
    pipeline (text encoder, autoencoder) are loaded from where the model is.

    Raises:
        UserError: as `enable`, or the plan holds no quantised denoiser.
    """
    loaded = Plan.load(plan, lazy=True)
    return enable(build_pipeline(loaded), loaded, backend)


def disable(pipe: Any) -> Any:
    """Put every layer back and let the pipeline's calls through untouched; bit-exactly what it was.

    Raises:
        UserError: the pipeline is not enabled, or was loaded from its plan and has no full-precision weights.
    """
    state = _require(pipe)
    if is_skeleton(state.adapter.denoiser):
        raise UserError(
            "this denoiser was loaded from its plan, so there is no full-precision model to go back to: load it"
        )
    state.hook.remove()
    _uninstall(state.adapter, state.network)
    object.__delattr__(state.adapter.denoiser, "_cachequant")
    return pipe


@contextmanager
def bypass(pipe: Any) -> Iterator[Any]:
    """Inside, the pipeline is the untouched original; afterwards it is accelerated again.

    Raises:
        UserError: the pipeline is not enabled.
    """
    state = _require(pipe)
    disable(pipe)
    try:
        yield pipe
    finally:
        if find(pipe) is not None:
            raise UserError("a plan was enabled inside cachequant.bypass, expected none: enable it outside")
        state.network, state.hook.step = _install(state.adapter, state.plan, state.cache, state.backend)
        state.hook.install()
        object.__setattr__(state.adapter.denoiser, "_cachequant", state)


def report(pipe: Any) -> str:
    """Schedule, counted steps, layers by backend with the reason of every exception, and bytes.

    Raises:
        UserError: the pipeline is not enabled.
    """
    state = _require(pipe)
    plan, cache = state.plan, state.cache
    total = _original_bytes(state)
    lines = [
        plan.summary(),
        f"backend      {state.backend.name}: {state.backend.note}",
        *_layer_lines(state),
        f"bytes        {plan_bytes(total, plan):,} of {total:,} in float32",
        f"ran so far   {cache.full_steps} full and {cache.cached_steps} cached steps",
    ]
    return "\n".join(lines)


def find(pipe: Any) -> Acceleration | None:
    """The acceleration at work in a pipeline, or None."""
    return vars(denoiser_of(pipe)).get("_cachequant")


def _require(pipe: Any) -> Acceleration:
    state = find(pipe)
    if state is None:
        raise UserError("this pipeline is not enabled: call cachequant.enable(pipe, plan) first")
    return state


def _install(
    structure: Adapter, plan: Plan, cache: FeatureCache, backend: Backend
) -> tuple[QuantizedNetwork | Deployment | None, StepFunction]:
    """Swap the plan's layers in, all of them or none; the step that runs them, and no others."""
    network = None
    if plan.quant is not None:
        shallow = structure.shallow_names()
        network = attach(structure.denoiser, plan.quant, cache, plan.correction, backend, shallow, plan.timesteps)
        structure.rebuild()
    try:
        return network, deployed_step(structure, cache, plan.correction, network)
    except BaseException:
        _uninstall(structure, network)
        raise


def _uninstall(structure: Adapter, network: QuantizedNetwork | Deployment | None) -> None:
    """Put the original layers back."""
    if network is not None:
        network.remove()
    structure.rebuild()


def _check_guidance(pipe: Any, plan: Plan, structure: Adapter, call: Call) -> None:
    """Refuse a run in another guidance mode than the plan's, at its first evaluation."""
    guided = getattr(pipe, "do_classifier_free_guidance", None)
    if guided is None:
        guided = structure.guided(call.kwargs)
    found = None if guided is None else ("cfg" if guided else "none")
    if found is not None and found != plan.identity.guidance:
        raise UserError(
            f"this run has guidance {found}, the plan was made for {plan.identity.guidance}: "
            "set guidance_scale accordingly, or calibrate for it"
        )


def _layer_lines(state: Acceleration) -> list[str]:
    """How many layers run in integers, what is simulated and what stays in full precision, each with its reason."""
    network = state.network
    simulated = network.reasons if isinstance(network, Deployment) else {}
    lines = [
        f"layers       {len(network.replaced) if network else 0} quantised; in full precision: {_float_layers(state)}"
    ]
    if isinstance(network, Deployment):
        lines.append(f"integers     {len(network.integer)} layers, {len(network.fused)} blocks fused around them")
        lines += _slower_lines(state, network)
    lines += [f"simulated    {name}: {reason}" for name, reason in simulated.items()]
    return lines


def _slower_lines(state: Acceleration, network: Deployment) -> list[str]:
    """On a GPU, what takes a slower path and why: layers on Triton, kernels that failed here, products in plain torch."""
    denoiser: Any = state.adapter.denoiser
    device = device_of(denoiser)
    if device.type != "cuda" or network.tables is None:  # our own kernels are what such a deployment lacks
        return []
    from cachequant.kernels.cuda.dispatch import table

    slower, tuned = network.not_compiled(torch.cuda.get_device_capability(device), denoiser.dtype), table(device)
    return [
        *(f"on Triton    {name}: {reason}" for name, reason in slower.items()),
        *(f"left out     {reason}, for {key.partition(' ')[2]}" for key, reason in tuned.failures.items()),
        *(f"in torch     {key}: every kernel failed" for key in tuned.unserved),
    ]


def _float_layers(state: Acceleration) -> str:
    """Convolutions and linear layers that stay as they are, with the reason."""
    quant = state.plan.config.quant
    if state.network is None:
        return "all (quant.enabled is false)"
    reasons = []
    if quant.ends_bits is None:
        reasons.append("first and last convolution (quant.ends_bits is null)")
    if not quant.time_embedding:
        reasons.append("time embedding (quant.time_embedding is false)")
    if quant.attention_bits is None:
        reasons.append("attention operands (quant.attention_bits is null)")
    if "float" in quant.bits_map.values():
        reasons.append("layers that are float in quant.bits_map")
    return "; ".join(reasons) or "none"


def _original_bytes(state: Acceleration) -> int:
    """Float32 bytes of the denoiser as it was, counting the layers that were replaced."""
    replaced = state.network.replaced.values() if state.network else ()
    return float_bytes(state.adapter.denoiser) + sum(float_bytes(layer) for layer in replaced)
