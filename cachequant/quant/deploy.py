"""Swap a network's layers for deployed integer ones, fuse the blocks around them, and put everything back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.kernels.cpu import unsupported
from cachequant.kernels.reference import Geometry
from cachequant.quant.attention import QuantAttention
from cachequant.quant.blocks import fuse, unfuse
from cachequant.quant.convert import install, replace_module
from cachequant.quant.deployed import IntegerLayer
from cachequant.types import Correction, QuantState


@dataclass
class Deployment:
    """What runs in integers in a network, and what it replaced.

    Attributes:
        network: the denoiser.
        sources: name -> layer that was replaced.
        simulated: name -> reason, for what is quantised in the plan but computed in floating point.
        fused: name -> class of the blocks with a fused forward.
    """

    network: nn.Module
    sources: dict[str, nn.Module] = field(default_factory=dict)
    simulated: dict[str, str] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)
    rest: Any = None

    def remove(self) -> None:
        """Put every original layer, processor and class back."""
        unfuse(self.network, list(self.fused))
        for name, source in self.sources.items():
            replace_module(self.network, name, source)
        if self.rest is not None:
            self.rest.remove()


def deploy(
    network: nn.Module, state: QuantState, clock: FeatureCache, correction: Correction | None = None
) -> Deployment:
    """Deploy every layer that the CPU backend supports; the others, and attention operands, are simulated.

    Args:
        network: the denoiser; changed in place until `remove()`. Weights of its quantised layers are not read.
        state: weights and tables.
        clock: tells the step.
        correction: maps of the layers' products.
    """
    handle = Deployment(network)
    rest: dict[str, Any] = {}
    for name, layer in state.layers.items():
        source: Any = network.get_submodule(name)
        geometry = Geometry.of(source)
        reason = unsupported(layer.weights, geometry)
        if reason is not None:
            handle.simulated[name], rest[name] = reason, layer
            continue
        maps = correction.layers.get(name) if correction else None
        replace_module(network, name, IntegerLayer(geometry, layer, source.bias, clock, maps))
        handle.sources[name] = source
    if rest or state.operands:
        handle.rest = install(network, QuantState(rest, state.operands), clock, correction=correction)
        operands = "attention operands are quantised in the plan: this backend multiplies them in float32"
        handle.simulated |= {name: operands for name, a in handle.rest.attentions.items() if isinstance(a, QuantAttention)}
    handle.fused = fuse(network)
    return handle
