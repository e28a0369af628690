"""Immutable values that the method computes and a plan holds."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """Which evaluations of the sampler run the whole network.

    Attributes:
        refresh_steps: sorted indices in [0, num_steps) that recompute the feature; the first is 0 (S in the paper).
        num_steps: number of network evaluations of the sampler (T).
        interval: average reuse length that was asked for (N).
        cost: objective of this schedule, None where no cost was measured.
        uniform_cost: objective of the uniform schedule on the same features.
    """

    refresh_steps: tuple[int, ...]
    num_steps: int
    interval: int
    cost: float | None = None
    uniform_cost: float | None = None

    def __post_init__(self) -> None:
        steps = self.refresh_steps
        if not all(isinstance(value, int) for value in (*steps, self.num_steps, self.interval)):
            raise ValueError(f"refresh_steps {steps[:8]}, num_steps and interval must be integers")
        ordered = all(a < b for a, b in itertools.pairwise(steps))
        if not steps or steps[0] != 0 or not ordered or steps[-1] >= self.num_steps:
            raise ValueError(
                f"refresh_steps {steps[:8]} must start at 0, rise strictly and stay below {self.num_steps}"
            )

    def is_refresh(self, step: int) -> bool:
        """Whether `step` runs the whole network."""
        return self.source(step) == step

    def source(self, step: int) -> int:
        """src(t): the last refresh step that is not after `step`."""
        return self.refresh_steps[bisect_right(self.refresh_steps, step) - 1]

    def previous_source(self, step: int) -> int | None:
        """The refresh step before src(t), or None in the first group."""
        position = bisect_right(self.refresh_steps, step) - 2
        return self.refresh_steps[position] if position >= 0 else None

    @property
    def full_step_share(self) -> float:
        """Share of evaluations that run the whole network."""
        return len(self.refresh_steps) / self.num_steps


@dataclass(frozen=True)
class AffineMap:
    """Per-channel map y ≈ scale·x + shift (+ previous·x_previous), the unit of every correction.

    Attributes:
        scale: [C] factor of the newest feature (a in the paper).
        shift: [C] offset (b in the paper).
        previous: [C] factor of a second regressor, or None: the feature refreshed one group earlier (forecast), or x_t.
    """

    scale: Tensor
    shift: Tensor
    previous: Tensor | None = None

    def apply(self, x: Tensor, x_previous: Tensor | None = None, channel_dim: int = 1) -> Tensor:
        """Correct `x` [..., C at channel_dim, ...]; `x_previous` has the shape of `x`.

        Raises:
            ValueError: the map has a forecast term and `x_previous` is missing.
        """
        shape = [1] * x.dim()
        shape[channel_dim] = -1
        y = x * self.scale.view(shape) + self.shift.view(shape)  # [..., C, ...]
        if self.previous is not None:
            if x_previous is None:
                raise ValueError("this map forecasts from two features, but x_previous is None")
            y = y + x_previous * self.previous.view(shape)
        return y

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> AffineMap:
        """The same map on another device and in another precision."""
        previous = None if self.previous is None else self.previous.to(device, dtype)
        return AffineMap(self.scale.to(device, dtype), self.shift.to(device, dtype), previous)

    @staticmethod
    def identity(channels: int) -> AffineMap:
        """The map that changes nothing: scale 1, shift 0."""
        return AffineMap(torch.ones(channels), torch.zeros(channels))


@dataclass(frozen=True)
class Correction:
    """All corrections of a plan, by executed step.

    Attributes:
        cache: step -> map of the reused feature (a₁, b₁ of the paper and the forecast term); absent steps reuse it raw.
        layers: layer name -> step -> map of the layer's integer product (a₂, b₂ of the paper).
        output: step -> map of the prediction, its second regressor being x_t (ours): ε ← scale·ε + previous·x_t + shift.
    """

    cache: dict[int, AffineMap] = field(default_factory=dict)
    layers: dict[str, dict[int, AffineMap]] = field(default_factory=dict)
    output: dict[int, AffineMap] = field(default_factory=dict)

    @property
    def uses_forecast(self) -> bool:
        """Whether any cache map reads the feature of the group before."""
        return any(m.previous is not None for m in self.cache.values())

    def with_cache(self, cache: dict[int, AffineMap]) -> Correction:
        """The same corrections with another cache part."""
        return replace(self, cache=cache)


@dataclass(frozen=True)
class ActivationTable:
    """Scale and zero point of one activation, one row per executed step (a temporal quantiser).

    Attributes:
        steps: [R] executed steps, rising.
        scale: [R] step size of the grid.
        zero_point: [R] integer that stands for 0, in [0, 2^bits - 1].
        bits: grid size.
        format: int, or one of `cachequant.quant.formats`, whose scale is that of its codebook and whose zero point is 0.
    """

    steps: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    format: str = "int"


@dataclass(frozen=True)
class WeightGrid:
    """Integer weights of one input segment of a layer.

    Attributes:
        values: uint8 [O, I, ...] in [0, 2^bits - 1].
        scale: [O] step size per output channel.
        zero_point: [O] integer that stands for 0.
        bits: grid size.
        format: int, or one of `cachequant.quant.formats`, of whose codebook the values are indices.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    format: str = "int"


@dataclass(frozen=True)
class LayerQuant:
    """Quantisation state of one convolution or linear layer.

    Attributes:
        weights: one grid per input segment (two behind a decoder concat, else one).
        inputs: one activation table per input segment.
        widths: input channels of each segment.
    """

    weights: tuple[WeightGrid, ...]
    inputs: tuple[ActivationTable, ...]
    widths: tuple[int, ...]


@dataclass(frozen=True)
class QuantState:
    """Quantisation state of a model: computed once, saved once, loaded by everything later.

    Attributes:
        layers: layer name -> weights and input tables; a plan that is read lazily reads each when it is asked for.
        operands: attention operand name -> table (query, key, value, probabilities).
    """

    layers: Mapping[str, LayerQuant] = field(default_factory=dict)
    operands: dict[str, ActivationTable] = field(default_factory=dict)


@dataclass(frozen=True)
class Remainder:
    """What a quantised denoiser needs beside its integers, so that it loads without its full-precision file.

    Attributes:
        tensors: name -> parameter or buffer that stays in full precision (norms, biases, embeddings, ends).
        recipe: JSON-like: class and configuration of the denoiser, the scheduler and the pipeline.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
