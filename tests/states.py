"""Random plans and parts of plans, and whether two of them are the same to the bit."""

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from cachequant.config import RunConfig
from cachequant.plan import ModelIdentity, Plan
from cachequant.types import (
    ActivationTable,
    AffineMap,
    Correction,
    LayerQuant,
    QuantState,
    Schedule,
    WeightGrid,
)

SEEDS = st.integers(0, 2**31 - 1)
NAMES = st.sampled_from(["conv_in", "up_blocks.0.resnets.1.conv1", "a.b", "mid_block.attentions.0.to_out.0"])


@st.composite
def affine_maps(draw: st.DrawFn, forecast: bool | None = None) -> dict[int, AffineMap]:
    """Steps with maps of one width, all with a forecast term or none."""
    steps = draw(st.sets(st.integers(0, 999), min_size=1, max_size=6))
    channels, seed = draw(st.integers(1, 5)), draw(SEEDS)
    with_previous = draw(st.booleans()) if forecast is None else forecast
    generator = torch.Generator().manual_seed(seed)
    return {
        step: AffineMap(*(torch.randn(channels, generator=generator) for _ in range(3 if with_previous else 2)))
        for step in steps
    }


def table(rows: int, seed: int, bits: int = 8) -> ActivationTable:
    generator = torch.Generator().manual_seed(seed)
    return ActivationTable(
        torch.arange(0, 2 * rows, 2, dtype=torch.int32),
        torch.rand(rows, generator=generator) + 0.01,
        torch.randint(0, 2**bits, (rows,), generator=generator).float(),
        bits,
    )


def grid(shape: tuple[int, ...], seed: int, bits: int = 4) -> WeightGrid:
    generator = torch.Generator().manual_seed(seed)
    return WeightGrid(
        torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8),
        torch.rand(shape[0], generator=generator) + 0.01,
        torch.randint(0, 2**bits, (shape[0],), generator=generator).float(),
        bits,
    )


def quant_state(seed: int = 0) -> QuantState:
    """A split convolution, a linear layer that was not calibrated yet, and attention operands."""
    split = LayerQuant(
        (grid((5, 4, 3, 3), seed), grid((5, 2, 3, 3), seed + 1, 8)),
        (table(3, seed), table(3, seed + 1)),
        (4, 2),
    )
    plain = LayerQuant((grid((7, 6), seed + 2),), (table(0, seed, 4),), (6,))
    operands = {f"mid_block.attentions.0.{name}": table(4, seed, 8) for name in ("query", "probabilities")}
    return QuantState({"up_blocks.0.resnets.1.conv1": split, "time_embedding.linear_1": plain}, operands)


def plan(seed: int = 0, quantised: bool = True) -> Plan:
    generator = torch.Generator().manual_seed(seed)
    maps = {s: AffineMap(*(torch.randn(3, generator=generator) for _ in range(3))) for s in (1, 2, 4)}
    return Plan(
        replace(RunConfig(), method="paper", output="here"),
        ModelIdentity("UNet2DModel", "ab" * 32, "DDIMScheduler-0123456789ab", "none"),
        (900, 700, 500, 300, 100),
        Schedule((0, 3), 5, 3, cost=1.25, uniform_cost=1.5),
        Correction(maps, {"conv_in": {0: AffineMap.identity(4)}}),
        quant_state(seed) if quantised else None,
        {"seed": 1243, "versions": {"torch": "2"}, "costs": [0.5, 1e-30]},
    )


def same_tensor(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)


def same_maps(a: dict[int, AffineMap], b: dict[int, AffineMap]) -> bool:
    return a.keys() == b.keys() and all(
        same_tensor(a[s].scale, b[s].scale)
        and same_tensor(a[s].shift, b[s].shift)
        and same_tensor(a[s].previous, b[s].previous)
        for s in a
    )


def same_correction(a: Correction, b: Correction) -> bool:
    return (
        same_maps(a.cache, b.cache)
        and a.layers.keys() == b.layers.keys()
        and all(same_maps(a.layers[n], b.layers[n]) for n in a.layers)
    )


def same_table(a: ActivationTable, b: ActivationTable) -> bool:
    columns = ("steps", "scale", "zero_point")
    return a.bits == b.bits and all(same_tensor(getattr(a, c), getattr(b, c)) for c in columns)


def same_layer(a: LayerQuant, b: LayerQuant) -> bool:
    return (
        a.widths == b.widths
        and all(same_table(x, y) for x, y in zip(a.inputs, b.inputs, strict=True))
        and all(
            x.bits == y.bits
            and same_tensor(x.values, y.values)
            and same_tensor(x.scale, y.scale)
            and same_tensor(x.zero_point, y.zero_point)
            for x, y in zip(a.weights, b.weights, strict=True)
        )
    )


def same_quant(a: QuantState, b: QuantState) -> bool:
    return (
        a.layers.keys() == b.layers.keys()
        and a.operands.keys() == b.operands.keys()
        and all(same_layer(a.layers[n], b.layers[n]) for n in a.layers)
        and all(same_table(a.operands[n], b.operands[n]) for n in a.operands)
    )
