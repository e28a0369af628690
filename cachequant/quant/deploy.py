"""Swap a network's layers for deployed integer ones, fuse the blocks around them, and put everything back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.kernels.backend import CUDA_INT8, SIMULATED, Backend
from cachequant.kernels.cpu import trim_heap, unsupported
from cachequant.kernels.reference import Geometry
from cachequant.quant.blocks import Fused, fuse, unfuse
from cachequant.quant.convert import QuantizedNetwork, install, replace_module
from cachequant.quant.deployed import IntegerLayer
from cachequant.quant.formats import only_simulated
from cachequant.quant.step_tables import StepTables
from cachequant.types import Correction, LayerQuant, QuantState


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
    """

    network: nn.Module
    integer: dict[str, nn.Module] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)
    simulation: QuantizedNetwork | None = None
    tables: StepTables | None = None

    @property
    def replaced(self) -> dict[str, nn.Module]:
        """Name -> original of every layer that is quantised."""
        return {**self.integer, **(self.simulation.replaced if self.simulation else {})}

    def remove(self) -> None:
        """Put every original layer, processor and class back."""
        unfuse(self.network, list(self.fused))
        for name, source in self.integer.items():
            replace_module(self.network, name, source)
        if self.simulation is not None:
            self.simulation.remove()


def deploy(
    network: nn.Module, state: QuantState, clock: FeatureCache, correction: Correction | None = None
) -> Deployment:
    """Deploy every layer that the CPU backend supports; the others, and attention operands, are simulated.

    Args:
        network: the denoiser; changed in place until `remove()`. Weights of its deployed layers are not read.
        state: weights and tables.
        clock: tells the step.
        correction: maps of the layers' products.
    """
    handle = Deployment(network)
    others: dict[str, LayerQuant] = {}
    for name, layer in state.layers.items():
        source: Any = network.get_submodule(name)
        reason = only_simulated(layer) or unsupported(layer.weights, Geometry.of(source))
        if reason is not None:
            handle.reasons[name], others[name] = reason, layer
            continue
        maps = correction.layers.get(name) if correction else None
        replace_module(network, name, IntegerLayer(source, layer, clock, maps))
        handle.integer[name] = source
        if source.weight.is_meta:  # nothing else but the plan is in memory: keep it so
            trim_heap()
    if others or state.operands:
        handle.simulation = install(network, QuantState(others, state.operands), clock, correction=correction)
        handle.reasons |= dict.fromkeys(handle.simulation.attentions, "attention operands are simulated")
    handle.fused = fuse(network)
    return handle


def deploy_on_device(
    network: nn.Module,
    state: QuantState,
    clock: FeatureCache,
    correction: Correction | None = None,
    device: torch.device | None = None,
    forwards: dict[str, type[Fused]] | None = None,
) -> Deployment:
    """Deploy every layer that the GPU's operators support; arguments and result as for `deploy`.

    Args:
        network, state, clock, correction: of `deploy`.
        device: where the network is; None asks its parameters.
        forwards: diffusers' class -> fused forward; None is all of them.
    """
    from cachequant.kernels.cuda.packing import unsupported
    from cachequant.quant.device_blocks import FORWARDS
    from cachequant.quant.device_layers import DeviceLayer, join

    handle, others = Deployment(network), dict[str, LayerQuant]()
    place = device or next(p.device for p in network.parameters() if not p.is_meta)
    handle.tables = tables = StepTables(clock.schedule.num_steps, place)
    for name, layer in state.layers.items():
        source: Any = network.get_submodule(name)
        bits = tuple(table.bits for table in layer.inputs)
        reason = only_simulated(layer) or unsupported(layer.weights, bits, Geometry.of(source))
        if reason is not None:
            handle.reasons[name], others[name] = reason, layer
            continue
        maps = correction.layers.get(name) if correction else None
        replace_module(network, name, DeviceLayer(source, layer, clock, tables, maps))
        handle.integer[name] = source
    if others or state.operands:
        handle.simulation = install(network, QuantState(others, state.operands), clock, correction=correction)
        handle.reasons |= dict.fromkeys(handle.simulation.attentions, "attention operands are simulated")
    for module in network.modules():
        projections = [getattr(module, name, None) for name in ("to_q", "to_k", "to_v")]
        layers = [layer for layer in projections if isinstance(layer, DeviceLayer)]
        if len(layers) == len(projections) and not join(layers):
            join(layers[1:])
    tables.freeze()
    handle.fused = fuse(network, FORWARDS if forwards is None else forwards)
    return handle


def attach(
    network: nn.Module, state: QuantState, clock: FeatureCache, correction: Correction, backend: Backend
) -> QuantizedNetwork | Deployment:
    """Quantise a network for sampling with the chosen backend; `remove()` of what is returned undoes it."""
    if backend.name == SIMULATED:
        return install(network, state, clock, correction=correction)
    if backend.name == CUDA_INT8:
        return deploy_on_device(network, state, clock, correction)
    return deploy(network, state, clock, correction)
