"""Deployment of a plan: each layer is read once, and what fails midway leaves the network as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.errors import UserError
from cachequant.kernels.backend import CPU_INT8, CUDA_INT8, SIMULATED, Backend
from cachequant.kernels.cpu import unavailable
from cachequant.quant.blocks import FusedUpsample
from cachequant.quant.convert import LayerPlan, fresh_state
from cachequant.quant.deploy import attach
from cachequant.quant.device_blocks import DeviceUpsample
from cachequant.schedule import uniform_schedule
from cachequant.types import ActivationTable, AffineMap, Correction, LayerQuant, QuantState

BACKENDS = [
    SIMULATED,
    pytest.param(CPU_INT8, marks=pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))),
    CUDA_INT8,
]
SIMULATED_ONLY = "down_blocks.0.resnets.0.conv2"
"""A layer whose activations no integer backend runs."""


class Counted(Mapping[str, LayerQuant]):
    """Layers of a plan that is read lazily, and how often each was."""

    def __init__(self, layers: Mapping[str, LayerQuant]) -> None:
        self.layers, self.read = layers, Counter[str]()

    def __getitem__(self, name: str) -> LayerQuant:
        self.read[name] += 1
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


@pytest.fixture
def network() -> nn.Module:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


@pytest.fixture
def layers(network: nn.Module) -> dict[str, LayerQuant]:
    """Every layer at 8 bits, one of them in a format that is simulated."""
    names = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    table = ActivationTable(torch.tensor([0], dtype=torch.int32), torch.tensor([0.05]), torch.tensor([128.0]), 8)
    made = fresh_state(network, {name: LayerPlan(8, 8) for name in names}, "minmax").layers
    whole = {name: replace(layer, inputs=(table,)) for name, layer in made.items()}
    simulated = replace(table, format="fp8", zero_point=torch.zeros(1))
    return {**whole, SIMULATED_ONLY: replace(whole[SIMULATED_ONLY], inputs=(simulated,))}


def attached(network: nn.Module, layers: Mapping[str, LayerQuant], backend: str, correction: Correction) -> Any:
    clock = FeatureCache(uniform_schedule(4, 2))
    return attach(network, QuantState(layers), clock, correction, Backend(backend, ""))


@torch.no_grad()
def output(network: nn.Module) -> Tensor:
    return network(torch.ones(1, 3, 8, 8), 10, return_dict=False)[0]


def of_another_shape(layers: dict[str, LayerQuant]) -> tuple[dict[str, LayerQuant], Correction]:
    last = list(layers)[-1]
    (grid,) = layers[last].weights
    cut = replace(grid, values=grid.values[1:], scale=grid.scale[1:], zero_point=grid.zero_point[1:])
    return {**layers, last: replace(layers[last], weights=(cut,))}, Correction()


def of_another_correction(layers: dict[str, LayerQuant]) -> tuple[dict[str, LayerQuant], Correction]:
    return layers, Correction(layers={list(layers)[-1]: {1: AffineMap.identity(77)}})


def of_another_network(layers: dict[str, LayerQuant]) -> tuple[dict[str, LayerQuant], Correction]:
    return {**layers, "nowhere": layers["conv_out"]}, Correction()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_that_is_read_lazily_is_read_once(
    network: nn.Module, layers: dict[str, LayerQuant], backend: str
) -> None:
    counted = Counted(layers)
    handle = attached(network, counted, backend, Correction())
    assert counted.read == dict.fromkeys(layers, 1)
    assert set(handle.replaced) == set(layers)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_another_shape, "is of shape"),
        (of_another_correction, "corrects other channels of"),
        (of_another_network, "such as nowhere that this UNet2DModel lacks"),
        (lambda _: ({}, Correction()), "no layer at all"),
    ],
)
def test_a_plan_of_another_network_is_refused_and_leaves_it_as_it_was(
    network: nn.Module, layers: dict[str, LayerQuant], backend: str, change: Callable[[Any], Any], message: str
) -> None:
    before, modules = output(network), [(id(m), type(m)) for m in network.modules()]
    others, correction = change(layers)
    with pytest.raises(UserError, match=message):
        attached(network, others, backend, correction)
    assert [(id(m), type(m)) for m in network.modules()] == modules
    assert torch.equal(output(network), before)


@pytest.mark.parametrize(("backend", "block"), [(CPU_INT8, FusedUpsample), (CUDA_INT8, DeviceUpsample)])
def test_a_failure_after_the_layers_puts_back_layers_and_fused_blocks(
    network: nn.Module,
    layers: dict[str, LayerQuant],
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    block: type[FusedUpsample],
) -> None:
    def fail(_: Any) -> bool:
        assert any(type(m).__name__ == "FusedResnetBlock2D" for m in network.modules())
        raise RuntimeError("out of memory")

    before, modules = output(network), [(id(m), type(m)) for m in network.modules()]
    monkeypatch.setattr(block, "fits", staticmethod(fail))
    with pytest.raises(RuntimeError, match="out of memory"):
        attached(network, layers, backend, Correction())
    assert [(id(m), type(m)) for m in network.modules()] == modules
    assert torch.equal(output(network), before)
