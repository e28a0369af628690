"""Swap a network's layers for deployed integer ones, fuse the blocks around them, and put everything back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.errors import UserError
from cachequant.host_memory import trim_heap
from cachequant.kernels import torch_quantizer
from cachequant.kernels.backend import CUDA_INT8, SIMULATED, TORCH_QUANTIZER, Backend
from cachequant.kernels.cpu import unsupported
from cachequant.kernels.reference import Geometry
from cachequant.quant.blocks import Fused, fuse, unfuse
from cachequant.quant.context import ContextOperands
from cachequant.quant.convert import QuantizedNetwork, fitting_layers, install, replace_module
from cachequant.quant.deployed import IntegerLayer
from cachequant.quant.formats import only_simulated
from cachequant.quant.step_tables import StepTables
from cachequant.quant.stepped_embedding import SteppedEmbedding, step_embedding
from cachequant.quant.time_projections import TimeProjections, share_time_projections
from cachequant.quant.torch_quantizer_layer import TorchQuantizerLayer
from cachequant.types import Correction, LayerQuant, QuantState

if TYPE_CHECKING:
    from cachequant.quant.adaptive_conditions import AdaptiveConditions

HOST = torch.device("cpu")


def move(layer: nn.Module, place: torch.device | None) -> nn.Module:
    """The same layer with the same parameters elsewhere, bit by bit; None, or without a weight to move: where it is."""
    if place is None or any(parameter.is_meta for parameter in layer.parameters()):
        return layer
    return layer.to(place)


@dataclass
class Deployment:
    """What runs in integers in a network, and what it replaced.

    Attributes:
        network: the denoiser.
        integer: name -> layer that was replaced by an integer one.
        reasons: name -> why something that the plan quantises is simulated instead.
        fused: name -> class of the blocks with a fused forward.
        simulation: the simulated layers and attention operands, or None.
        tables: the scales of every step, of a deployment on a GPU.
        time: joint or tabled projections of timestep and class.
        context: keys and values of cross-attention, of a deployment on a GPU that has any.
        home: where the replaced layers were; on a GPU they wait in the host's memory meanwhile.
    """

    network: nn.Module
    integer: dict[str, nn.Module] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)
    simulation: QuantizedNetwork | None = None
    tables: StepTables | None = None
    time: list[TimeProjections | AdaptiveConditions | SteppedEmbedding] = field(default_factory=list)
    context: ContextOperands | None = None
    home: torch.device | None = None

    @property
    def replaced(self) -> dict[str, nn.Module]:
        """Name -> original of every layer that is quantised."""
        return {**self.integer, **(self.simulation.replaced if self.simulation else {})}

    def replace(self, name: str, source: nn.Module, layer: nn.Module) -> None:
        """Put a deployed layer in the place of the network's own."""
        replace_module(self.network, name, layer)
        self.integer[name] = source

    def simulate(self, state: QuantState, clock: FeatureCache, correction: Correction | None) -> None:
        """Simulate the layers and attention operands that do not run in integers, if there are any."""
        if state.layers or state.operands:
            self.simulation = install(self.network, state, clock, correction=correction)
            self.reasons |= dict.fromkeys(self.simulation.attentions, "attention operands are simulated")

    @contextmanager
    def whole_or_not_at_all(self) -> Iterator[None]:
        """What fails inside leaves the network as it was."""
        try:
            yield
        except BaseException:
            self.remove()
            raise

    def not_compiled(self, capability: tuple[int, int], dtype: torch.dtype) -> dict[str, str]:
        """Layer -> why a card of this capability runs it by Triton's slower kernels; `dtype` is that of the activations.

        Layers whose outputs were tabled ran once, and do not count.
        """
        running = {name: module for name, module in self.network.named_modules() if hasattr(module, "not_compiled")}
        reasons = {name: module.not_compiled(capability, dtype) for name, module in running.items()}  # type: ignore[operator]
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def remove(self) -> None:
        """Put every original layer, processor and class back."""
        unfuse(self.network, [name for name, module in self.network.named_modules() if isinstance(module, Fused)])
        for joint in self.time:
            joint.release()
        for name, source in self.integer.items():
            replace_module(self.network, name, move(source, self.home))
        if self.simulation is not None:
            self.simulation.remove()


def deploy(
    network: nn.Module,
    state: QuantState,
    clock: FeatureCache,
    correction: Correction | None = None,
    timesteps: Sequence[int] | None = None,
) -> Deployment:
    """Deploy every layer that the CPU backend supports; the others, and attention operands, are simulated.

    Args:
        network: the denoiser; changed in place until `remove()`. Weights of its deployed layers are not read.
        state: weights and tables.
        clock: tells the step.
        correction: maps of the layers' products.
        timesteps: of all steps, where no step is ever run at another one: their embedding is then computed once a plan.

    Raises:
        UserError: of `fitting_layers`; the network is then as it was.
    """
    handle, others = Deployment(network), dict[str, LayerQuant]()
    with handle.whole_or_not_at_all():
        for name, source, layer, maps in fitting_layers(network, state, correction):
            reason = only_simulated(layer) or unsupported(layer.weights, Geometry.of(source))
            if reason is not None:
                handle.reasons[name], others[name] = reason, layer
                continue
            handle.replace(name, source, IntegerLayer(source, layer, clock, maps))
            if source.weight.is_meta:  # nothing else but the plan is in memory: keep it so
                trim_heap()
        handle.simulate(QuantState(others, state.operands), clock, correction)
        stepped = None if timesteps is None else step_embedding(network, clock, timesteps)
        handle.time += [] if stepped is None else [stepped]
        handle.fused = fuse(network)
    return handle


def deploy_on_device(
    network: nn.Module,
    state: QuantState,
    clock: FeatureCache,
    correction: Correction | None = None,
    device: torch.device | None = None,
    forwards: dict[str, type[Fused]] | None = None,
    shallow: Collection[str] = (),
    timesteps: Sequence[int] | None = None,
) -> Deployment:
    """Deploy every layer that the GPU's operators support; arguments and result as for `deploy`.

    GPU memory holds a layer's integers only: what was replaced waits in the host's memory until `remove()`.

    Args:
        network, state, clock, correction: of `deploy`.
        device: where the network is; None asks its parameters.
        forwards: diffusers' class -> fused forward; None is all of them.
        shallow: names of the modules that a cached step runs.
        timesteps: of all steps, where no step is ever run at another one: what they alone decide is computed here.

    Raises:
        UserError: of `deploy`.
    """
    from cachequant.kernels.cuda.packing import unsupported
    from cachequant.quant.adaptive_conditions import share_adaptive_conditions
    from cachequant.quant.device_blocks import FORWARDS, context_operands
    from cachequant.quant.device_layers import DeviceLayer, join

    handle, others = Deployment(network), dict[str, LayerQuant]()
    place = device or next(p.device for p in network.parameters() if not p.is_meta)
    handle.tables, handle.home = StepTables(clock.schedule.num_steps, place), place
    tables = handle.tables
    with handle.whole_or_not_at_all():
        for name, source, layer, maps in fitting_layers(network, state, correction):
            bits = tuple(table.bits for table in layer.inputs)
            reason = only_simulated(layer) or unsupported(layer.weights, bits, Geometry.of(source))
            if reason is not None:
                handle.reasons[name], others[name] = reason, layer
                continue
            handle.replace(name, source, DeviceLayer(source, layer, clock, tables, maps))
            move(source, HOST)
        handle.simulate(QuantState(others, state.operands), clock, correction)
        for module in network.modules():
            projections = [getattr(module, name, None) for name in ("to_q", "to_k", "to_v")]
            layers = [layer for layer in projections if isinstance(layer, DeviceLayer)]
            if len(layers) == len(projections) and not join(layers):
                join(layers[1:])
        tables.freeze(timesteps)
        chosen = FORWARDS if forwards is None else forwards
        if "ResnetBlock2D" in chosen:
            stepped = None if timesteps is None else step_embedding(network, clock, timesteps, tables)
            handle.time += share_time_projections(network, shallow) if stepped is None else [stepped]
        if "BasicTransformerBlock" in chosen:
            handle.time += share_adaptive_conditions(network, clock, tables, shallow, timesteps)
            handle.context = ContextOperands.of(network, context_operands)
        handle.fused = fuse(network, chosen)
    return handle


def deploy_on_torch_quantizer(
    network: nn.Module, state: QuantState, clock: FeatureCache, correction: Correction | None = None
) -> Deployment:
    """Deploy every layer that torch_quantizer supports on its modules; the others, and attention operands, are simulated.

    Corrections are folded into its buffers. What was replaced waits in the host's memory until `remove()`.

    Args:
        network, state, clock, correction: of `deploy`.

    Raises:
        UserError: of `fitting_layers`, or it supports no layer at all; the network is then as it was.
    """
    handle, others = Deployment(network), dict[str, LayerQuant]()
    place = next(p.device for p in network.parameters() if not p.is_meta)
    handle.home = place
    with handle.whole_or_not_at_all():
        for name, source, layer, maps in fitting_layers(network, state, correction):
            held = torch_quantizer.Held(layer, source.bias, maps or {})
            reason = torch_quantizer.unsupported(held, Geometry.of(source), clock.schedule.num_steps)
            if reason is not None:
                handle.reasons[name], others[name] = reason, layer
                continue
            handle.replace(name, source, TorchQuantizerLayer(source, held, clock, place))
            move(source, HOST)
        if not handle.integer:
            raise torch_quantizer.none_supported(handle.reasons.values())
        handle.simulate(QuantState(others, state.operands), clock, correction)
    return handle


def attach(
    network: nn.Module,
    state: QuantState,
    clock: FeatureCache,
    correction: Correction,
    backend: Backend,
    shallow: Collection[str] = (),
    timesteps: Sequence[int] | None = None,
) -> QuantizedNetwork | Deployment:
    """Quantise a network for sampling with the chosen backend; `remove()` of what is returned undoes it.

    Args:
        network, state, clock, correction: of `deploy`.
        backend: of `cachequant.kernels.backend.choose_backend`.
        shallow: names of the modules that a cached step runs, which a GPU's backend lays out together.
        timesteps: of all steps, of which backends make tables; None where steps may be run at others.

    Raises:
        UserError: the state or the correction is not of this network, which is then as it was.
    """
    if not state.layers:
        raise UserError(
            f"the plan quantises no layer at all, expected some of this {type(network).__name__}: calibrate for it"
        )
    if backend.name == SIMULATED:
        return install(network, state, clock, correction=correction)
    if backend.name == CUDA_INT8:
        return deploy_on_device(network, state, clock, correction, shallow=shallow, timesteps=timesteps)
    if backend.name == TORCH_QUANTIZER:
        return deploy_on_torch_quantizer(network, state, clock, correction)
    return deploy(network, state, clock, correction, timesteps)
