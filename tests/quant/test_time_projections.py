"""Joint projections of the time embedding against the layers' own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cachequant.quant.time_projections import TimeProjections, share_time_projections


class ResnetBlock2D(nn.Module):
    """What is read of diffusers' block."""

    def __init__(self, channels: int, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.time_emb_proj = nn.Linear(12, channels)
        self.nonlinearity = activation or nn.SiLU()
        self.skip_time_act = False
        self.conv1 = nn.Identity()
        self.conv1.time = None


@pytest.fixture
def resnets():
    torch.manual_seed(0)
    return nn.ModuleList(ResnetBlock2D(channels) for channels in (8, 3, 5))


@torch.no_grad()
def test_each_resnet_gets_its_own_projection(resnets):
    embeddings = (torch.randn(2, 12), torch.randn(1, 12))
    expected = [[r.time_emb_proj(F.silu(temb)) for r in resnets] for temb in embeddings]
    shared = TimeProjections(list(resnets))
    for wanted, temb in zip(expected, embeddings, strict=True):
        for resnet, values in zip(resnets, wanted, strict=True):
            assert torch.allclose(shared.of(resnet, temb), values, atol=1e-6)


@torch.no_grad()
def test_a_forward_reads_the_values_of_its_own_embedding(resnets):
    """A captured step finds it at the same address with other values; a forward may end early."""
    shared, temb = TimeProjections(list(resnets)), torch.randn(2, 12)
    for end in (3, 1, 3):
        temb.copy_(torch.randn(2, 12))
        for resnet in resnets[:end]:
            assert torch.allclose(shared.of(resnet, temb), resnet.time_emb_proj(F.silu(temb)), atol=1e-6)


@torch.no_grad()
def test_a_forward_computes_once(resnets):
    shared, temb = TimeProjections(list(resnets)), torch.randn(2, 12)
    first, *rest = [shared.of(resnet, temb) for resnet in resnets]
    assert all(part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for part in rest)


@torch.no_grad()
def test_memory_is_shared_until_it_is_released(resnets):
    before = [r.time_emb_proj.weight.clone() for r in resnets]
    shared = TimeProjections(list(resnets))
    storages = {r.time_emb_proj.weight.untyped_storage().data_ptr() for r in resnets}
    assert storages == {shared.weight.untyped_storage().data_ptr()}
    shared.release()
    assert len({r.time_emb_proj.weight.untyped_storage().data_ptr() for r in resnets}) == 3
    assert all(torch.equal(r.time_emb_proj.weight, old) for r, old in zip(resnets, before, strict=True))


def test_groups_follow_what_a_cached_step_runs(resnets):
    network = nn.Module()
    network.blocks = nn.ModuleList([*resnets, ResnetBlock2D(4), ResnetBlock2D(4, nn.Mish())])
    made = share_time_projections(network, {"blocks.0", "blocks.1"})
    assert sorted(len(group.layers) for group in made) == [2, 2]
    assert network.blocks[0].conv1.time is network.blocks[1].conv1.time
    assert network.blocks[2].conv1.time is network.blocks[3].conv1.time is not network.blocks[0].conv1.time
    assert network.blocks[4].conv1.time is None  # another activation
