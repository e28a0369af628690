"""Stage 4, after the grids: weights rounded in closed form from the second moments of what they multiply. Ours.

The moments are streamed along trajectories of fresh noise under the schedule and the correction of the cache, in full
precision: each layer sees what it will see, in the shares that it will see it. Every layer is rounded as a whole: the two
segments behind a decoder concat have their own grids, but one segment's columns make good the errors of the other's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from tqdm import tqdm

from cachequant.errors import UserError
from cachequant.kernels.reference import Geometry
from cachequant.models.cost import float_bytes, weight_bytes
from cachequant.pipeline.context import ROUNDING
from cachequant.pipeline.gains import output_gains
from cachequant.pipeline.hook import Call
from cachequant.pipeline.quant_params import mapped
from cachequant.pipeline.step import accelerated_step
from cachequant.pipeline.walk import Walk
from cachequant.quant.allocation import Option, choose_bits
from cachequant.quant.input_sums import InputSums
from cachequant.quant.layers import Layer
from cachequant.quant.rounding import (
    DAMPINGS,
    Factor,
    RowGrids,
    best_damping,
    best_rounding,
    candidate_grids,
)
from cachequant.types import LayerQuant, QuantState, WeightGrid

SUMS_BYTES = 8 << 30
"""Second moments held at once; layers beyond it wait for another pass."""


@torch.no_grad()
def round_weights(walk: Walk, state: QuantState) -> QuantState:
    """The state with compensated integers on every grid below 8 bits; activation tables stay as they are.

    With `quant.budget` every such layer is rounded to 8 bits too, and those whose error weighs most per byte keep them;
    not those that `quant.bits_map` names.

    Raises:
        UserError: the budget is less than what the plan's bits take.
    """
    quant = walk.context.config.quant
    budget = quant.budget
    coarse = needing(state)
    cheap: dict[str, Rounded] = {}
    dear: dict[str, Rounded] = {}
    for group in _groups(walk, coarse):
        sums = gather_sums(walk, group)
        for name in tqdm(group, desc="4 rounding", unit="layer", leave=False, disable=None):
            cheap[name] = round_layer(_layer(walk, name), state.layers[name], sums[name])
            if budget is not None and mapped(name, quant) is None:
                dear[name] = round_layer(_layer(walk, name), state.layers[name], sums[name], 8, quant.symmetric(8))
            del sums[name]
    chosen = {name: made.layer for name, made in cheap.items()}
    if budget is not None:
        chosen |= {name: dear[name].layer for name in _promoted(walk, state, cheap, dear, budget)}
    return QuantState({**state.layers, **chosen}, state.operands)


def needing(state: QuantState) -> list[str]:
    """Names of the layers that this rounds: integer grids below 8 bits."""
    firsts = {name: layer.weights[0] for name, layer in state.layers.items()}
    return [name for name, grid in firsts.items() if grid.bits < 8 and grid.format == "int"]


@dataclass(frozen=True)
class Rounded:
    """A rounded layer and the mean squared error of each output channel [O] that its rounding causes."""

    layer: LayerQuant
    error: Tensor


def round_layer(
    source: Layer, layer: LayerQuant, sums: InputSums, bits: int | None = None, symmetric: bool = False
) -> Rounded:
    """One layer, from the second moments of its input rows; `bits` other than its own replace them."""
    weight = source.weight.detach().float()
    rows, segment = weight.flatten(1), segment_of_columns(weight, layer.widths)
    candidates = candidate_grids(rows, segment, bits or layer.weights[0].bits, symmetric)
    middle = candidates[len(candidates) // 3]
    halves = sums.halves
    damping = best_damping(rows, halves, middle) if halves else DAMPINGS[0]
    integers, grids, error = best_rounding(rows, Factor.of(sums.moment, damping), candidates)
    return Rounded(with_weights(layer, integers.view(weight.shape), grids), error)


def segment_of_columns(weight: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Which input segment every column of weight.flatten(1) belongs to: [n]."""
    channels = torch.cat([torch.full((width,), i) for i, width in enumerate(widths)])
    return channels.repeat_interleave(weight[0, 0].numel()).to(weight.device)


def with_weights(layer: LayerQuant, integers: Tensor, grids: RowGrids) -> LayerQuant:
    """A layer with other integers [O, I, ...] on grids of its rows and segments."""
    columns = zip(integers.split(layer.widths, dim=1), grids.scale.T.cpu(), grids.zero_point.T.cpu(), strict=True)
    made = [
        WeightGrid(part.to(torch.uint8).cpu().contiguous(), scale.contiguous(), zero.contiguous(), grids.bits)
        for part, scale, zero in columns
    ]
    return LayerQuant(tuple(made), layer.inputs, layer.widths)


def gather_sums(walk: Walk, names: list[str]) -> dict[str, InputSums]:
    """Second moments of the named layers' inputs along accelerated trajectories."""
    context, shallow, cache = walk.context, walk.context.adapter.shallow_names(), walk.fresh_cache()
    seeds = context.seeds(ROUNDING, context.config.quant.rounding_samples)
    size = context.config.calibration.batch_size
    full, sums, batch = len(walk.schedule.refresh_steps), dict[str, InputSums](), _Batch()
    for name in names:
        source, steps = _layer(walk, name), walk.schedule.num_steps if name in shallow else full
        sums[name] = InputSums(source.weight, Geometry.of(source), -(-len(seeds) // size) * steps)
    accelerated = accelerated_step(context.adapter, cache, walk.correction)

    def step(call: Call) -> Tensor:
        """The accelerated model, and whose rows its layers see."""
        if call.opens and cache.step == 0:
            batch.first += batch.samples
            batch.samples = min(size, len(seeds) - batch.first)
        return accelerated(call)

    with _watched(walk, sums, batch):
        context.trajectories(step, cache, seeds, "4 second moments")
    return sums


@dataclass
class _Batch:
    """Which samples the pipeline draws: the number of the first, and how many."""

    first: int = 0
    samples: int = 0


@contextmanager
def _watched(walk: Walk, sums: dict[str, InputSums], batch: _Batch) -> Iterator[None]:
    """Inside, every call of the layers is added to their sums."""

    def adding(total: InputSums) -> Callable[..., None]:
        return lambda _, inputs: total.update(inputs[0], batch.samples, batch.first)

    handles = [_layer(walk, name).register_forward_pre_hook(adding(total)) for name, total in sums.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _groups(walk: Walk, names: list[str]) -> Iterator[list[str]]:
    """The layers in order, as many at once as memory holds the sums of."""
    group: list[str] = []
    held = 0
    for name in names:
        size = 8 * _layer(walk, name).weight[0].numel() ** 2
        if group and held + size > SUMS_BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group


def _promoted(
    walk: Walk, state: QuantState, cheap: dict[str, Rounded], dear: dict[str, Rounded], budget: float
) -> list[str]:
    """Layers that keep 8 bits."""
    total = float_bytes(walk.context.adapter.denoiser)
    chosen = {**state.layers, **{name: made.layer for name, made in cheap.items()}}
    least = total + sum(
        weight_bytes(layer) - 4 * sum(g.values.numel() for g in layer.weights) for layer in chosen.values()
    )
    if least > budget * total:
        raise UserError(
            f"quant.budget is {budget:g} of the full-precision bytes, but these bits alone take {least / total:.3f}: "
            "raise quant.budget or lower quant.weight_bits"
        )
    gains = output_gains(walk, list(dear))

    def option(made: Rounded, gain: Tensor) -> Option:
        return Option(
            made.layer.weights[0].bits, weight_bytes(made.layer), float((gain.cpu() * made.error.cpu()).sum())
        )

    options = {name: (option(cheap[name], gain), option(dear[name], gain)) for name, gain in gains.items()}
    return [name for name, bits in choose_bits(options, budget * total - least).items() if bits == 8]


def _layer(walk: Walk, name: str) -> Layer:
    return cast(Layer, walk.context.adapter.denoiser.get_submodule(name))
