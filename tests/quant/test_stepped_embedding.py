"""Time embeddings from a table against the network's own, with layers that are quantised at every step in another way."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.models.adapter import adapter
from cachequant.pipeline.graphs import GraphedAdapter
from cachequant.quant.convert import LayerPlan, fresh_state, install
from cachequant.quant.deploy import deploy, deploy_on_device
from cachequant.quant.layers import Mode
from cachequant.quant.stepped_embedding import SteppedEmbedding
from cachequant.types import QuantState, Schedule

SCHEDULE, TIMESTEPS, CPU = Schedule((0, 2), 4, 2), (900, 600, 300, 0), torch.device("cpu")


def unet(conditional: bool = False, **changes: Any) -> Any:
    from diffusers import UNet2DConditionModel, UNet2DModel

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "block_out_channels": (16, 32),
        "norm_num_groups": 8, "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    if conditional:
        settings |= {"cross_attention_dim": 8, "attention_head_dim": 2}
    return (UNet2DConditionModel if conditional else UNet2DModel)(**settings | changes).eval()


def sample(step: int) -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step)) * (step + 1)


@torch.no_grad()
def quantised(network: Any, time: bool, *inputs: Any) -> QuantState:
    """Integers of all layers, of the time embedding's only where asked."""
    structure, clock = adapter(network), FeatureCache(SCHEDULE)
    names = {n for n, m in network.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}
    names -= set() if time else structure.time_names()
    plans = {name: LayerPlan(8, 8, structure.splits().get(name, 0)) for name in names}
    handle = install(network, fresh_state(network, plans, "minmax"), clock, search="minmax")
    handle.set_mode(Mode.OBSERVE)
    for step, timestep in enumerate(TIMESTEPS):
        clock.step = step
        network(sample(step), timestep, *inputs)
        handle.finish_step(step)
    state = handle.state
    handle.remove()
    return state


@torch.no_grad()
@pytest.mark.parametrize("time", [False, True], ids=["embedding in float", "embedding in integers"])
@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("deployed", [deploy, partial(deploy_on_device, device=CPU)], ids=["cpu", "cuda's tables"])
def test_a_row_of_the_table_is_what_the_step_would_compute(deployed: Any, conditional: bool, time: bool) -> None:
    network, inputs = unet(conditional), (torch.randn(2, 5, 8),) if conditional else ()
    state, clock = quantised(network, time, *inputs), FeatureCache(SCHEDULE)
    before = {name: id(module) for name, module in network.named_modules()}
    full = [network(sample(step), timestep, *inputs).sample for step, timestep in enumerate(TIMESTEPS)]
    outputs = []
    for timesteps in (None, TIMESTEPS):
        made = deployed(network, state, clock, timesteps=timesteps)
        assert any(isinstance(joint, SteppedEmbedding) for joint in made.time) == (timesteps is not None)
        assert clock.step == 0
        found = []
        for step in (2, 0, 1, 3):
            clock.step = step
            found.append(network(sample(step), TIMESTEPS[step], *inputs).sample)
        clock.step = 0
        outputs.append(found)
        made.remove()
    for ours, theirs in zip(*outputs, strict=True):
        assert (
            ours - theirs
        ).abs().max() < 2e-3 * theirs.abs().max()  # an integer in a hundred may round the other way
    assert {name: id(module) for name, module in network.named_modules()} == before
    again = [network(sample(step), timestep, *inputs).sample for step, timestep in enumerate(TIMESTEPS)]
    assert all(torch.equal(a, b) for a, b in zip(full, again, strict=True))


@torch.no_grad()
def test_a_graph_looks_its_timestep_up() -> None:
    """Whatever number comes with the call, the row of the step counts; the embedding's own layers do not run."""
    network = unet()
    structure, clock = adapter(network), FeatureCache(SCHEDULE)
    made = deploy_on_device(network, quantised(network, time=True), clock, device=CPU, timesteps=TIMESTEPS)
    structure.rebuild()
    graphed = GraphedAdapter(structure, clock, made.tables, lambda body: body)
    for step in (1, 3):
        clock.step = step
        wanted, _ = structure.full(sample(step), TIMESTEPS[step])
        for given in (TIMESTEPS[step], torch.tensor(7), torch.tensor([7, 7])):
            found, _ = graphed.full(sample(step), given)
            assert torch.equal(found, wanted)
    made.remove()


@torch.no_grad()
@pytest.mark.parametrize("deployed", [deploy, partial(deploy_on_device, device=CPU)], ids=["cpu", "cuda's tables"])
@pytest.mark.parametrize("changes", [{"num_class_embeds": 4}, {"resnet_time_scale_shift": "scale_shift"}])
def test_what_is_not_the_timestep_alone_is_computed(deployed: Any, changes: dict[str, Any]) -> None:
    network = unet(**changes)
    inputs = (torch.tensor([1, 3]),) if "num_class_embeds" in changes else ()
    state, clock = quantised(network, False, *inputs), FeatureCache(SCHEDULE)
    made = deployed(network, state, clock, timesteps=TIMESTEPS)
    assert not any(isinstance(joint, SteppedEmbedding) for joint in made.time)
    made.remove()
