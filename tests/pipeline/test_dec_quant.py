"""Stage 5 on a decoder block whose GroupNorm groups hold cached and fresh channels together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor

import cachequant as cq
from cachequant.cache.feature_cache import FeatureCache
from cachequant.config import RunConfig
from cachequant.correction import fit_affine
from cachequant.kernels.reference import centred_integers
from cachequant.pipeline.calibrate import gather
from cachequant.pipeline.context import Context
from cachequant.pipeline.dec_cache import solve_maps
from cachequant.pipeline.dec_quant import fit_quantised
from cachequant.pipeline.features import gather_moments
from cachequant.pipeline.hook import Call
from cachequant.pipeline.quant_params import calibrate_quantisers
from cachequant.plan import Plan
from cachequant.schedule import uniform_schedule
from cachequant.types import Correction, QuantState

Configure = Callable[..., RunConfig]
WIDTH, CHANNELS, GROUP = 12, 16, 8  # as DDPM CIFAR-10's 256 of 384 in groups of 12


@pytest.fixture
def straddling() -> Any:
    """The upper level's first position reads 12 cached and 4 fresh channels in two groups of 8."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(4, 12),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=2, attention_head_dim=4,
    ).eval()  # fmt: skip
    pipe = DDIMPipeline(unet, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_straddling_group_is_found_and_reported(straddling: Any, configure: Configure, tmp_path: Path) -> None:
    found = {c.name: c for c in Context.of(straddling, configure("cache.branch=1")).adapter.consumers()}
    conv, shortcut = (found[f"up_blocks.1.resnets.0.{part}"] for part in ("conv1", "conv_shortcut"))
    assert (conv.width, conv.channels, conv.straddling_groups) == (WIDTH, CHANNELS, 1)
    assert shortcut.straddling_groups == 0
    level = Context.of(straddling, configure("cache.branch=0")).adapter.consumers()
    assert all(c.straddling_groups == 0 for c in level)  # 4 of 8 in groups of 4
    plan = cq.calibrate(straddling, configure("cache.branch=1", "method=paper"), tmp_path, quiet=True)
    lines = [line for line in plan.summary().splitlines() if line.startswith("reads it")]
    assert len(lines) == 2
    assert (
        "conv1: 12 of 16 input channels, one normalisation group holds both halves; corrected on the joint" in lines[0]
    )
    assert lines[1].endswith("conv_shortcut: 12 of 16 input channels; corrected")
    again = Plan.load(plan.save(tmp_path / "plan"))
    assert again.provenance["consumers"] == plan.provenance["consumers"]


def product_inputs(context: Context, maps: dict[int, Any], interval: int) -> dict[int, list[Tensor]]:
    """What the consumer's resnet reads at every step of full-precision trajectories: concat of (corrected) h and skip."""
    schedule = uniform_schedule(context.num_steps, interval)
    cache, seen = FeatureCache(schedule), {}
    resnet = context.pipe.unet.up_blocks[1].resnets[0]

    def step(call: Call) -> Tensor:
        caught: list[Tensor] = []
        handle = resnet.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        output, feature = context.adapter.full(call.x, call.timestep)
        if cache.must_refresh:
            cache.store(feature)
        else:
            context.adapter.cached(call.x, call.timestep, None, cache.reuse(maps[cache.step]))
        handle.remove()
        seen.setdefault(cache.step, []).append(caught[-1])
        return output

    context.trajectories(step, cache, context.fresh_seeds, "test")
    return seen


def dequantised(state: QuantState, name: str, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """The h half on its grid, and its integer weights on theirs."""
    layer = state.layers[name]
    table, grid = layer.inputs[0], layer.weights[0]
    row = table.steps.tolist().index(step)
    scale, zero = float(table.scale[row]), float(table.zero_point[row])
    weight = (grid.values.float() - grid.zero_point.view(-1, 1, 1, 1)) * grid.scale.view(-1, 1, 1, 1)
    return centred_integers(x, scale, zero, table.bits) * scale, weight


def test_the_convolution_is_corrected_on_its_joint_input(straddling: Any, configure: Configure) -> None:
    config = configure("cache.branch=1", "method=paper", "quant.weight_bits=4", "quant.activation_bits=4")
    context = Context.of(straddling, config)
    schedule = uniform_schedule(context.num_steps, 2)
    maps = solve_maps(gather_moments(context, schedule), 0.0)
    correction = Correction(maps)
    state = calibrate_quantisers(context, gather(context), schedule, correction)
    fitted = fit_quantised(context, schedule, correction, state)
    inputs = product_inputs(context, maps, 2)
    resnet, name = straddling.unet.up_blocks[1].resnets[0], "up_blocks.1.resnets.0.conv1"
    for step, parts in inputs.items():
        joint = torch.cat(parts)  # [n, 16, 8, 8]
        with torch.no_grad():
            h = F.silu(resnet.norm1(joint))[:, :WIDTH]
            alone = F.silu(F.group_norm(joint[:, :WIDTH], 3, resnet.norm1.weight[:WIDTH], resnet.norm1.bias[:WIDTH]))
            rounded, weight = dequantised(state, name, h, step)
            x, y = F.conv2d(rounded, weight, padding=1), F.conv2d(h, resnet.conv1.weight[:, :WIDTH], padding=1)
        expected, made = fit_affine(x, y), fitted.layers[name][step]
        assert torch.allclose(made.scale, expected.scale, rtol=1e-3, atol=1e-3)
        assert torch.allclose(made.shift, expected.shift, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(h, alone, atol=0.05)  # the h half alone is another input
