"""A whole network under quantised layers: every mode, and nothing of it left behind."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cachequant.quant.attention import OPERANDS
from cachequant.quant.convert import LayerPlan, QuantizedNetwork, fresh_state, install
from cachequant.quant.layers import Mode
from cachequant.types import AffineMap, Correction, QuantState
from tests.quant.layer_cases import clock, generator


@pytest.fixture(autouse=True)
def without_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


def unet() -> nn.Module:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
    ).eval()


def conditional_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


NETWORKS = pytest.mark.parametrize("make", [unet, conditional_unet])


def run(network: nn.Module, seed: int = 0) -> Tensor:
    x = torch.randn(2, 3, 8, 8, generator=generator(seed))
    conditional = type(network).__name__ == "UNet2DConditionModel"
    cond = {"encoder_hidden_states": torch.randn(2, 5, 12, generator=generator(7))} if conditional else {}
    output: Tensor = network(x, torch.tensor([10, 500]), **cond).sample
    return output


def all_layers(network: nn.Module) -> dict[str, LayerPlan]:
    return {name: LayerPlan(8, 8) for name, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def snapshot(network: nn.Module) -> dict[str, int]:
    """Identity of every module and every attention processor."""
    found = {name: id(module) for name, module in network.named_modules()}
    for name, module in network.named_modules():
        if hasattr(module, "processor"):
            found[f"{name}:processor"] = id(module.processor)
    return found


def calibrate(handle: QuantizedNetwork, step: int = 0) -> None:
    handle.set_mode(Mode.OBSERVE)
    for seed in range(2):
        run(handle.network, seed)
    handle.finish_step(step)


@NETWORKS
def test_remove_puts_every_object_back(make: type[nn.Module]) -> None:
    network = make()
    before, output = snapshot(network), run(network)
    order = [name for name, _ in network.named_modules()]
    handle = install(network, fresh_state(network, all_layers(network), "minmax"), clock(), attention_bits=8)
    during = snapshot(network)
    assert handle.attentions and all(during[name] != before[name] for name in handle.layers)
    calibrate(handle)
    handle.remove()
    assert snapshot(network) == before
    assert [name for name, _ in network.named_modules()] == order
    assert torch.equal(run(network), output)
    assert not handle.layers and not handle.attentions


@NETWORKS
def test_float_and_observe_modes_change_no_bit(make: type[nn.Module]) -> None:
    network = make()
    output = run(network)
    handle = install(network, fresh_state(network, all_layers(network), "minmax"), clock(), attention_bits=8)
    for mode in (Mode.FLOAT, Mode.RECORD):
        handle.set_mode(mode)
        assert torch.equal(run(network), output)
    handle.set_mode(Mode.OBSERVE)  # attention is written out there, so that its operands can be seen
    torch.testing.assert_close(run(network), output, rtol=1e-4, atol=1e-5)


@NETWORKS
def test_attention_with_operands_of_eight_bits_stays_close(make: type[nn.Module]) -> None:
    network = make()
    output = run(network)
    handle = install(network, QuantState(), clock(), "minmax", attention_bits=8)
    assert not handle.layers and handle.attentions
    calibrate(handle)
    handle.set_mode(Mode.QUANTIZED)
    quantised_output = run(network)
    relative = float((quantised_output - output).norm() / output.norm())
    assert 0 < relative < 0.02
    handle.remove()
    handle = install(network, QuantState(), clock(), "minmax", attention_bits=2)
    calibrate(handle)
    handle.set_mode(Mode.QUANTIZED)
    assert float((run(network) - output).norm() / output.norm()) > relative


@NETWORKS
def test_a_network_of_eight_bits_stays_close_and_its_state_restores_it(make: type[nn.Module]) -> None:
    network = make()
    output, twin = run(network), copy.deepcopy(network)
    handle = install(network, fresh_state(network, all_layers(network), "minmax"), clock(), "minmax", attention_bits=8)
    calibrate(handle)
    handle.set_mode(Mode.QUANTIZED)
    quantised_output = run(network)
    assert 0 < float((quantised_output - output).norm() / output.norm()) < 0.1
    state = handle.state
    assert {name.rpartition(".")[2] for name in state.operands} == set(OPERANDS)
    assert all(rows.steps.tolist() == [0] for rows in state.operands.values())
    assert all(rows.steps.tolist() == [0] for layer in state.layers.values() for rows in layer.inputs)
    install(twin, state, clock())
    assert torch.equal(run(twin), quantised_output)


def test_modes_can_be_set_for_some_layers_and_clocks_for_all() -> None:
    network = unet()
    handle = install(network, fresh_state(network, all_layers(network), "minmax"), clock(), attention_bits=8)
    handle.set_mode(Mode.FLOAT)
    handle.set_mode(Mode.PAIR, ["conv_in"])
    assert {name for name, layer in handle.layers.items() if layer.mode is Mode.PAIR} == {"conv_in"}
    other = clock(step=3)
    handle.set_clock(other)
    modules: list[Any] = [*handle.layers.values(), *handle.attentions.values()]
    assert all(module.clock is other for module in modules)


def test_installed_corrections_are_those_of_the_named_layers() -> None:
    network = unet()
    plans = {"conv_in": LayerPlan(8, 8), "conv_out": LayerPlan(4, 8)}
    maps = {2: AffineMap.identity(8)}
    handle = install(
        network,
        fresh_state(network, plans, "minmax"),
        clock(),
        correction=Correction(layers={"conv_in": maps}),
    )
    assert handle.layers["conv_in"].corrections == maps and handle.layers["conv_out"].corrections == {}
    assert handle.layers["conv_out"].state.weights[0].bits == 4
    assert not handle.attentions


def test_a_fresh_state_splits_weights_at_the_concat() -> None:
    network = unet()
    name = "up_blocks.1.resnets.0.conv1"
    weight = network.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    layer = fresh_state(network, {name: LayerPlan(8, 8, split=16)}, "minmax").layers[name]
    assert layer.widths == (16, weight.shape[1] - 16) and sum(layer.widths) == weight.shape[1]
    assert [g.values.shape[1] for g in layer.weights] == list(layer.widths)
    assert all(len(t.steps) == 0 for t in layer.inputs)
