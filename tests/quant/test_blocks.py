"""Fused blocks against the classes they stand for, around the same integer layers; deployment and its undoing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.kernels.cpu import unavailable
from cachequant.models.adapter import adapter
from cachequant.quant.blocks import Fused, fuse, unfuse
from cachequant.quant.convert import LayerPlan, fresh_state, install
from cachequant.quant.deploy import Deployment, deploy
from cachequant.quant.deployed import IntegerLayer
from cachequant.quant.layers import Mode
from cachequant.schedule import uniform_schedule
from cachequant.types import QuantState

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


@pytest.fixture(autouse=True)
def without_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


def unconditional(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "sample_size": 16, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8, "norm_num_groups": 4, **changes,
    }  # fmt: skip
    return UNet2DModel(**settings).eval()


def conditional() -> nn.Module:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
    ).eval()  # fmt: skip


def inputs(network: nn.Module) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    if isinstance(network, UNet2DConditionModel):
        context = torch.randn(2, 7, 16, generator=draw)
        return torch.randn(2, 4, 8, 8, generator=draw), torch.tensor(500), {"encoder_hidden_states": context}
    return torch.randn(2, 1, 16, 16, generator=draw), torch.tensor(500), {}


def calibrated(network: nn.Module, clock: FeatureCache) -> QuantState:
    """Every convolution and linear layer at 8 bits, with the grids of one evaluation."""
    splits = adapter(network, 0).splits()
    names = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    state = fresh_state(network, {n: LayerPlan(8, 8, splits.get(n, 0)) for n in names}, "minmax")
    handle = install(network, state, clock, "minmax")
    handle.set_mode(Mode.OBSERVE)
    x, timestep, kwargs = inputs(network)
    network(x, timestep, **kwargs)
    handle.finish_step(0)
    state = handle.state
    handle.remove()
    return state


def deployed(network: nn.Module) -> Deployment:
    clock = FeatureCache(uniform_schedule(4, 2))
    return deploy(network, calibrated(network, clock), clock)


def assert_close(found: Tensor, expected: Tensor, grids: int) -> None:
    """Equal but for activations that float32 rounding moved over a grid border: a few steps of the finest output."""
    error = (found - expected).norm() / expected.norm()
    assert float(error) <= 2e-3 * grids


@pytest.mark.parametrize("make", [unconditional, conditional, lambda: unconditional(downsample_padding=0)])
def test_every_fused_block_is_its_class_around_the_same_layers(make: Any) -> None:
    """Each block alone, on the input that it met in the network."""
    network = make()
    handle = deployed(network)
    met: dict[str, tuple[Any, Any, Tensor]] = {}

    def remember(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            met[name] = (args, kwargs, output[0] if isinstance(output, tuple) else output)

        return hook

    hooks = [
        network.get_submodule(name).register_forward_hook(remember(name), with_kwargs=True) for name in handle.fused
    ]
    x, timestep, kwargs = inputs(network)
    network(x, timestep, **kwargs)
    for hook in hooks:
        hook.remove()
    kinds = set(handle.fused.values())
    assert {"ResnetBlock2D", "Upsample2D", "Downsample2D"} <= kinds and any("Up" in kind for kind in kinds)
    unfuse(network, list(handle.fused))
    assert not any(isinstance(module, Fused) for module in network.modules())
    for name, (args, options, output) in met.items():
        whole = tuple(torch.cat(a, 1) if isinstance(a, tuple) and name.split(".")[-2] == "resnets" else a for a in args)
        expected = network.get_submodule(name)(*whole, **options)
        assert_close(output, expected[0] if isinstance(expected, tuple) else expected, grids=3)


@pytest.mark.parametrize("make", [unconditional, conditional])
def test_removal_is_bit_exact_and_leaves_nothing_behind(make: Any) -> None:
    network = make()
    x, timestep, kwargs = inputs(network)
    reference, modules = network(x, timestep, **kwargs).sample, [(id(m), type(m)) for m in network.modules()]
    handle = deployed(network)
    assert any(isinstance(module, IntegerLayer) for module in network.modules())
    assert not torch.equal(network(x, timestep, **kwargs).sample, reference)
    handle.remove()
    assert [(id(m), type(m)) for m in network.modules()] == modules
    assert torch.equal(network(x, timestep, **kwargs).sample, reference)


def test_every_layer_is_deployed_or_says_why() -> None:
    network = conditional()
    handle = deployed(network)
    layers = [n for n, m in network.named_modules() if isinstance(m, IntegerLayer)]
    assert set(layers) == set(handle.integer) == set(handle.replaced) and not handle.reasons
    handle.remove()


def test_a_layer_of_another_format_is_simulated_and_says_why() -> None:
    network, clock = conditional(), FeatureCache(uniform_schedule(4, 2))
    state, name = calibrated(network, clock), "mid_block.resnets.0.conv1"
    table = replace(state.layers[name].inputs[0], format="fp8", zero_point=torch.zeros(1))
    foreign = replace(state.layers[name], inputs=(table,))
    handle = deploy(network, QuantState({**state.layers, name: foreign}), clock)
    assert handle.reasons == {name: "fp8 is simulated only, integer backends run int8 and int4"}
    assert name not in handle.integer and name in handle.replaced
    handle.remove()


def test_scales_are_read_as_numbers_however_they_lie() -> None:
    network, clock = conditional(), FeatureCache(uniform_schedule(4, 2))
    state, name = calibrated(network, clock), "mid_block.resnets.0.conv1"
    x = torch.randn(1, network.get_submodule(name).in_channels, 4, 4)
    grid = state.layers[name].weights[0]
    strided = replace(grid, scale=torch.stack([grid.scale, torch.zeros_like(grid.scale)], dim=1)[:, 0])
    outputs = []
    for one in (grid, strided):
        layer = IntegerLayer(network.get_submodule(name), replace(state.layers[name], weights=(one,)), clock)
        outputs.append(layer(x))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("make", [unconditional, conditional])
def test_the_network_is_the_simulation_but_for_rounding_at_borders(make: Any) -> None:
    """Attention errs by a few hundredths of a grid's step, which sends that share of the integers behind it to a neighbour.

    A tenth of them at a neighbour differ from the others by 0.7 of what rounding does to all; they are no farther from full
    precision. The bounds are those of the GPU's check (scripts/gpu/check_models.py).
    """
    network = make()
    clock = FeatureCache(uniform_schedule(4, 2))
    state = calibrated(network, clock)
    x, timestep, kwargs = inputs(network)
    simulation = install(network, state, clock)
    simulated = network(x, timestep, **kwargs).sample
    noise = 1e-6 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    moved = network(x + noise, timestep, **kwargs).sample
    simulation.remove()
    exact = network(x, timestep, **kwargs).sample
    handle = deploy(network, state, clock)
    integer = network(x, timestep, **kwargs).sample
    handle.remove()
    chaos, quantisation = float((moved - simulated).norm()), float((simulated - exact).norm())
    assert float((integer - simulated).norm()) <= max(3 * chaos, 0.7 * quantisation)
    assert float((integer - exact).norm()) <= 1.1 * quantisation


def test_masks_run_the_class_of_the_block() -> None:
    """A fused transformer block hands what it does not cover to diffusers' own forward."""
    network = conditional()
    handle = deployed(network)
    name = next(n for n, kind in handle.fused.items() if kind == "BasicTransformerBlock")
    block = network.get_submodule(name)
    x, context = torch.randn(2, 64, 8), torch.randn(2, 7, 16)
    mask = torch.zeros(2, 1, 7)
    masked = block(x, encoder_hidden_states=context, encoder_attention_mask=mask)
    assert_close(block(x, encoder_hidden_states=context), masked, grids=3)
    mask[:, :, 3:] = -10000.0
    cut = block(x, encoder_hidden_states=context[:, :3])
    assert_close(block(x, encoder_hidden_states=context, encoder_attention_mask=mask), cut, grids=3)
    handle.remove()


def test_a_block_of_another_structure_is_left_alone() -> None:
    network = unconditional(resnet_time_scale_shift="scale_shift")
    handle = deployed(network)
    assert "ResnetBlock2D" not in handle.fused.values() and "UpBlock2D" not in handle.fused.values()
    x, timestep, _ = inputs(network)
    assert network(x, timestep).sample.isfinite().all()
    assert fuse(network) == {}  # nothing twice
    handle.remove()
