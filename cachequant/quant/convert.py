"""Swap a network's layers for quantised ones, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.errors import UserError
from cachequant.quant.attention import OPERANDS, QuantAttention
from cachequant.quant.formats import quantize_to_format
from cachequant.quant.layers import Layer, Mode, QuantLayer, quantize_weight
from cachequant.types import ActivationTable, AffineMap, Correction, LayerQuant, QuantState


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is to be quantised.

    `split`: channels of the h segment behind a decoder concat, 0 for none. `symmetric`: weight grids around zero.
    """

    weight_bits: int
    activation_bits: int
    split: int = 0
    weight_format: str = "int"
    activation_format: str = "int"
    symmetric: bool = False


@dataclass
class QuantizedNetwork:
    """The quantised layers that stand in a network, and what they replaced."""

    network: nn.Module
    layers: dict[str, QuantLayer] = field(default_factory=dict)
    attentions: dict[str, QuantAttention] = field(default_factory=dict)

    def set_mode(self, mode: Mode, names: Iterable[str] | None = None) -> None:
        """Set the mode of all layers and attentions, or of the named layers only."""
        if names is not None:
            for name in names:
                self.layers[name].mode = mode
            return
        for module in self._modules():
            module.mode = mode

    def finish_step(self, step: int) -> None:
        """Turn what was observed into the row of `step`."""
        for layer in self.layers.values():
            layer.finish_step(step)
        for attention in self.attentions.values():
            for quantizer in attention.quantizers.values():
                quantizer.finish_step(step)

    def set_clock(self, clock: FeatureCache) -> None:
        """Make every layer read its step from another cache."""
        for module in self._modules():
            module.clock = clock

    def _modules(self) -> list[QuantLayer | QuantAttention]:
        return [*self.layers.values(), *self.attentions.values()]

    @property
    def state(self) -> QuantState:
        """Weights and tables, ready to be saved."""
        operands = {
            f"{name}.{operand}": quantizer.table
            for name, attention in self.attentions.items()
            for operand, quantizer in attention.quantizers.items()
        }
        return QuantState({name: layer.state for name, layer in self.layers.items()}, operands)

    @property
    def replaced(self) -> dict[str, nn.Module]:
        """Name -> original of every layer that is quantised."""
        return {name: layer.source for name, layer in self.layers.items()}

    def remove(self) -> None:
        """Put every original layer and processor back."""
        for name, layer in self.layers.items():
            replace_module(self.network, name, layer.source)
        for name, attention in self.attentions.items():
            _attention(self.network, name).processor = attention.original
        self.layers.clear()
        self.attentions.clear()


def fresh_state(network: nn.Module, plans: dict[str, LayerPlan], weight_search: str) -> QuantState:
    """Integer weights of every planned layer, with input tables still empty."""
    layers = {}
    for name, plan in plans.items():
        weight = cast(Layer, network.get_submodule(name)).weight
        widths = (plan.split, weight.shape[1] - plan.split) if plan.split else (weight.shape[1],)
        parts = weight.split(widths, dim=1)
        if plan.weight_format == "int":
            grids = tuple(quantize_weight(w, plan.weight_bits, weight_search, plan.symmetric) for w in parts)
        else:
            grids = tuple(quantize_to_format(w, plan.weight_format, plan.weight_bits, weight_search) for w in parts)
        tables = tuple(empty_table(plan.activation_bits, plan.activation_format) for _ in widths)
        layers[name] = LayerQuant(grids, tables, widths)
    return QuantState(layers)


def empty_table(bits: int, kind: str = "int") -> ActivationTable:
    """A table without rows."""
    return ActivationTable(torch.zeros(0, dtype=torch.int32), torch.zeros(0), torch.zeros(0), bits, kind)


def fitting_layers(
    network: nn.Module, state: QuantState, correction: Correction | None = None
) -> Iterator[tuple[str, Any, LayerQuant, dict[int, AffineMap] | None]]:
    """Name, layer of the network, its state and the maps of its product, one by one: a plan is read once, also lazily.

    Raises:
        UserError: names the first layer that is missing, of another kind or of another shape, or corrected otherwise.
    """
    kind, modules = type(network).__name__, dict(network.named_modules())
    missing = [name for name in state.layers if name not in modules]
    if missing:
        what = f"{len(missing)} of its layers such as {missing[0][:80]}"
        raise UserError(f"the plan quantises {what} that this {kind} lacks: calibrate for it")
    for name, layer in state.layers.items():
        module: Any = modules[name]
        shape = tuple(module.weight.shape) if isinstance(module, nn.Conv2d | nn.Linear) else ()
        held = {(grid.values.shape[0], sum(layer.widths), *grid.values.shape[2:]) for grid in layer.weights}
        if held != {shape}:
            raise UserError(f"the plan's {name} is of shape {held.pop()}, this {kind}'s is {shape}: calibrate for it")
        maps = correction.layers.get(name) if correction else None
        if any(len(affine.scale) != shape[0] for affine in (maps or {}).values()):
            raise UserError(f"the plan corrects other channels of {name} than the {shape[0]} it has: calibrate for it")
        yield name, module, layer, maps


def install(
    network: nn.Module,
    state: QuantState,
    clock: FeatureCache,
    search: str = "mse",
    correction: Correction | None = None,
    attention_bits: int | None = None,
) -> QuantizedNetwork:
    """Replace the layers of `state` in `network` by quantised ones.

    Args:
        network: the denoiser; changed in place until `remove()`.
        state: weights and tables.
        clock: tells the step.
        search: range search for tables that are still empty.
        correction: maps of the layers' products.
        attention_bits: quantise attention operands; None leaves attention as it is unless `state` has operands.

    Raises:
        UserError: of `fitting_layers`; the network is then as it was.
    """
    handle = QuantizedNetwork(network)
    for name, source, layer_state, maps in fitting_layers(network, state, correction):
        handle.layers[name] = QuantLayer(source, layer_state, clock, maps, search)
    if attention_bits is not None or state.operands:
        for name, module in network.named_modules():
            if hasattr(module, "processor") and hasattr(module, "to_q"):
                tables = {o: state.operands[f"{name}.{o}"] for o in OPERANDS if f"{name}.{o}" in state.operands}
                handle.attentions[name] = QuantAttention(module.processor, tables, attention_bits or 8, search, clock)
    for name, layer in handle.layers.items():
        replace_module(network, name, layer)
    for name, attention in handle.attentions.items():
        _attention(network, name).processor = attention
    return handle


def _attention(network: nn.Module, name: str) -> Any:
    return network.get_submodule(name)


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module where the one called `name` stands."""
    parent, _, child = name.rpartition(".")
    network.get_submodule(parent)._modules[child] = module
