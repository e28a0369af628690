"""Stage 4's closed-form rounding on a toy network: its errors, its budget, the map of bits, and what a gain is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cachequant as cq
from cachequant.config import RunConfig
from cachequant.errors import UserError
from cachequant.models.cost import float_bytes, weight_bytes
from cachequant.pipeline.context import Context
from cachequant.pipeline.gains import STRIDE, _moves, output_gains
from cachequant.pipeline.quant_params import layer_plans
from cachequant.pipeline.round_weights import gather_sums, needing, round_layer, segment_of_columns
from cachequant.pipeline.stages import Stages
from cachequant.pipeline.walk import Walk
from cachequant.quant import input_sums
from cachequant.quant.rounding import RowGrids, rounding_error
from cachequant.storage import pack_weights
from cachequant.types import LayerQuant, QuantState

Configure = Callable[..., RunConfig]
W4 = ("quant.weight_bits=4", "quant.rounding_samples=6")


def stages_of(pipe: Any, config: RunConfig, folder: Path) -> Stages:
    return Stages.at(Context.of(pipe, config), folder, quiet=True)


def error_of(weight: torch.Tensor, layer: LayerQuant, moment: torch.Tensor) -> torch.Tensor:
    """e H eᵀ of every output channel: [O]."""
    grids = RowGrids(
        torch.stack([g.scale for g in layer.weights], dim=1),
        torch.stack([g.zero_point for g in layer.weights], dim=1),
        segment_of_columns(weight, layer.widths), layer.weights[0].bits,
    )  # fmt: skip
    integers = torch.cat([g.values.float() for g in layer.weights], dim=1).flatten(1)
    return rounding_error(weight.flatten(1), moment, integers, grids)


def test_every_layer_errs_less_than_with_the_nearest_integers(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    plain = stages_of(pipe, configure(*W4, "quant.rounding=nearest"), tmp_path)
    stages = stages_of(pipe, configure(*W4), tmp_path)
    (nearest, _), (made, _) = plain.quant(), stages.quant()
    assert nearest is not None and made is not None
    walk = stages._walk()
    sums = gather_sums(walk, list(made.layers))
    total = {"nearest": 0.0, "made": 0.0}
    for name, layer in made.layers.items():
        weight, moment = pipe.unet.get_submodule(name).weight.detach(), sums[name].moment
        power = float(((weight.flatten(1) @ moment) * weight.flatten(1)).sum())
        for label, state in (("nearest", nearest), ("made", made)):
            total[label] += float(error_of(weight, state.layers[name], moment).sum()) / power
        assert torch.equal(layer.inputs[0].scale, nearest.layers[name].inputs[0].scale)
        assert layer.widths == nearest.layers[name].widths
    assert total["made"] < 0.6 * total["nearest"]


def test_eight_bits_and_other_formats_are_left_alone(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    state, _ = stages_of(pipe, configure("quant.activation_bits=8"), tmp_path).quant()
    assert state is not None and needing(state) == []
    state, _ = stages_of(pipe, configure(*W4, "quant.weight_format=log2"), tmp_path).quant()
    assert state is not None and needing(state) == [] and next(iter(state.layers.values())).weights[0].format == "log2"


def test_all_of_a_budget_is_used_and_no_more(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    total, chosen = float_bytes(pipe.unet), {}
    for budget in (0.3, 0.4):
        state, _ = stages_of(pipe, configure(*W4, f"quant.budget={budget}"), tmp_path).quant()
        assert state is not None
        stored = total - sum(4 * g.values.numel() for layer in state.layers.values() for g in layer.weights)
        stored += sum(t.numel() * t.element_size() for t in pack_weights(state).values())
        assert stored <= budget * total
        chosen[budget] = {name for name, layer in state.layers.items() if layer.weights[0].bits == 8}
    assert 0 < len(chosen[0.3]) < len(chosen[0.4])
    with pytest.raises(UserError, match=r"quant\.budget is 0\.05"):
        stages_of(pipe, configure(*W4, "quant.budget=0.05"), tmp_path).quant()


def test_bits_by_name(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    config = configure(
        *W4, 'quant.bits_map={"mid_block.*": w8a6, "*.time_emb_proj": float, "conv_out": w8a8, "down_blocks.*": w3a8}'
    )
    plans = layer_plans(Context.of(pipe, config).adapter, config.quant)
    bits = {name: (plan.weight_bits, plan.activation_bits) for name, plan in plans.items()}
    assert bits["mid_block.resnets.0.conv1"] == (8, 6)
    assert bits["mid_block.resnets.0.time_emb_proj"] == (8, 6)  # the first pattern counts
    assert bits["conv_out"] == (8, 8) and "conv_in" not in bits
    assert bits["down_blocks.0.resnets.0.conv1"] == (3, 8) and bits["up_blocks.0.resnets.0.conv1"] == (4, 8)
    assert "up_blocks.0.resnets.0.time_emb_proj" not in bits
    config.quant.budget = 0.35
    state, _ = stages_of(pipe, config, tmp_path).quant()
    assert state is not None
    assert state.layers["down_blocks.0.resnets.0.conv1"].weights[0].bits == 3  # named: the budget leaves it alone
    around_zero = {
        name: bool((grid.zero_point == 2.0 ** (grid.bits - 1)).all())
        for name, layer in state.layers.items()
        for grid in layer.weights
    }
    assert around_zero == {name: layer.weights[0].bits == 8 for name, layer in state.layers.items()}
    plan = cq.calibrate(pipe, config, tmp_path, quiet=True)
    counts = plan.provenance["weight_bits"]
    found = [layer.weights[0].bits for layer in state.layers.values()]
    assert counts == {f"w{bits}": found.count(bits) for bits in sorted(set(found))} and len(counts) > 1
    assert f"{counts['w3']} w3, " in plan.summary() and f"{counts['w8']} w8)" in plan.summary()
    cq.enable(pipe, plan)
    assert "layers that are float in quant.bits_map" in cq.report(pipe)
    cq.disable(pipe)
    with pytest.raises(UserError, match=r"quant\.bits_map has 'middle"):
        layer_plans(Context.of(pipe, config).adapter, configure('quant.bits_map={"middle.*": w8a8}').quant)


def test_a_gain_is_the_squared_derivative_of_the_move(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    """Of the last convolution it is known: every pixel moves its own pixel of ε by as much, at each step anew."""
    stages = stages_of(pipe, configure("cache.interval=3"), tmp_path)
    walk = stages._walk()
    schedule = walk.schedule
    steps = [
        t for t in range(schedule.num_steps) if (t - schedule.source(t) - 1) % STRIDE == 0 or schedule.is_refresh(t)
    ]
    ends = [next((r for r in schedule.refresh_steps if r > t), schedule.num_steps) for t in steps]
    stands_for = [1 if schedule.is_refresh(t) else min(STRIDE, e - t) for t, e in zip(steps, ends, strict=True)]
    moves = _moves(walk)
    expected = 16 * 16 * sum(n * float(moves[t]) ** 2 for t, n in zip(steps, stands_for, strict=True))
    before = [p.requires_grad for p in pipe.unet.parameters()]
    gains = output_gains(walk, ["conv_out", "mid_block.resnets.0.conv2"])
    assert float(gains["conv_out"]) == pytest.approx(expected, rel=1e-4)
    assert gains["mid_block.resnets.0.conv2"].shape == (16,) and (gains["mid_block.resnets.0.conv2"] > 0).all()
    assert before == [p.requires_grad for p in pipe.unet.parameters()]
    assert all(p.grad is None for p in pipe.unet.parameters())


def test_a_layer_of_one_sample_is_rounded_with_the_strongest_damping(
    pipe: Any, configure: Configure, tmp_path: Path
) -> None:
    stages = stages_of(pipe, configure("quant.weight_bits=4", "quant.rounding_samples=1"), tmp_path)
    state, _ = stages.grids()
    name = "mid_block.resnets.0.conv1"
    walk: Walk = stages._walk()
    sums = gather_sums(walk, [name])[name]
    assert sums.halves is None
    made = round_layer(pipe.unet.get_submodule(name), state.layers[name], sums)
    assert made.error.isfinite().all() and weight_bytes(made.layer) < state.layers[name].weights[0].values.numel()
    eight = round_layer(pipe.unet.get_submodule(name), state.layers[name], sums, bits=8)
    assert float(eight.error.sum()) < 0.05 * float(made.error.sum())
    assert QuantState({name: eight.layer}).layers[name].weights[0].bits == 8


def test_halves_of_the_samples_do_not_depend_on_the_batches(
    pipe: Any, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_sums, "ROWS", 10**6)
    walk = stages_of(pipe, configure("quant.weight_bits=4", "quant.rounding_samples=5"), tmp_path)._walk()
    name, found = "mid_block.resnets.0.conv1", []
    for size in (5, 3, 2, 1):
        walk.context.config.calibration.batch_size = size
        halves = gather_sums(walk, [name])[name].halves
        assert halves is not None
        found.append(halves)
    for halves in found[1:]:
        for one, other in zip(halves, found[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
