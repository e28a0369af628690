"""Stage 4, second part: weights rounded in closed form from the second moments of what they multiply. Ours, not in the paper.

Every layer is rounded as a whole: the two segments behind a decoder concat have their own grids, but one segment's columns
make good the errors of the other's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from cachequant.kernels.reference import Geometry
from cachequant.pipeline.walk import Walk
from cachequant.quant.input_sums import InputSums
from cachequant.quant.layers import Layer
from cachequant.quant.rounding import Factor, RowGrids, best_rounding, candidate_grids
from cachequant.types import LayerQuant, QuantState, WeightGrid

SUMS_BYTES = 4 << 30
"""Second moments held at once; layers beyond it wait for another walk."""

DAMPING = 0.1
"""Share of the mean diagonal added to a second moment's diagonal."""


@torch.no_grad()
def round_weights(walk: Walk, state: QuantState) -> QuantState:
    """The state with compensated integers instead of the nearest ones; activation tables stay as they are."""
    symmetric = walk.context.config.quant.weight_symmetric
    layers = dict(state.layers)
    for moments in gather_moments(walk, list(state.layers)):
        for name, moment in moments.items():
            layers[name] = round_layer(_layer(walk, name), layers[name], moment, symmetric)
    return QuantState(layers, state.operands)


def round_layer(source: Layer, layer: LayerQuant, moment: Tensor, symmetric: bool) -> LayerQuant:
    """One layer, from the second moment [n, n] of its input rows."""
    weight = source.weight.detach().float()
    rows, segment = weight.flatten(1), segment_of_columns(weight, layer.widths)
    candidates = candidate_grids(rows, segment, layer.weights[0].bits, symmetric)
    integers, grids, _ = best_rounding(rows, Factor.of(moment, DAMPING), candidates)
    return with_weights(layer, integers.view(weight.shape), grids)


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


def gather_moments(walk: Walk, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Second moments [n, n] of the named layers' inputs in full precision, as many at once as memory holds."""
    for group in _groups(walk, names):
        shallow = walk.context.adapter.shallow_names()
        full = len(walk.schedule.refresh_steps)
        sums = {}
        for name in group:
            source, steps = _layer(walk, name), walk.schedule.num_steps if name in shallow else full
            sums[name] = InputSums(source.weight, Geometry.of(source), steps)
        with _watched(walk, sums):
            for _ in walk.run(walk.fresh_cache(), "4 moments"):
                pass
        yield {name: total.moment for name, total in sums.items()}


@contextmanager
def _watched(walk: Walk, sums: dict[str, InputSums]) -> Iterator[None]:
    """Inside, every call of the layers is added to their sums."""
    def add(total: InputSums):
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            total.update(inputs[0])
        return hook

    handles = [_layer(walk, name).register_forward_pre_hook(add(total)) for name, total in sums.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _groups(walk: Walk, names: list[str]) -> Iterator[list[str]]:
    group: list[str] = []
    held = 0
    for name in names:
        size = 4 * _layer(walk, name).weight[0].numel() ** 2
        if group and held + size > SUMS_BYTES:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group


def _layer(walk: Walk, name: str) -> Layer:
    return cast(Layer, walk.context.adapter.denoiser.get_submodule(name))
