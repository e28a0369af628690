"""The two subclasses of diffusers' networks: what they change, that it survives a folder, and that it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.models.attention_processor import Attention

from cachequant.models.networks import FixedHeadsUNet2DModel, OriginalDiT

U_NET: dict[str, Any] = {
    "sample_size": 8, "in_channels": 2, "out_channels": 2, "layers_per_block": 1, "block_out_channels": [8, 16],
    "down_block_types": ["AttnDownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D"],
    "norm_num_groups": 4,
}  # fmt: skip
DIT: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 6, "num_layers": 2, "sample_size": 8}


def heads(network: torch.nn.Module) -> set[int]:
    """Numbers of heads over all attention layers."""
    return {module.heads for module in network.modules() if isinstance(module, Attention)}


@torch.no_grad()
def test_every_level_has_the_same_number_of_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = FixedHeadsUNet2DModel(4, **U_NET).eval()
    assert heads(network) == {4}
    assert heads(UNet2DModel(**U_NET, attention_head_dim=2)) == {4, 8}  # what diffusers' class does
    network.save_pretrained(tmp_path)
    loaded = FixedHeadsUNet2DModel.from_pretrained(tmp_path)
    assert heads(loaded) == {4}
    assert loaded.config.num_attention_heads == 4
    x = torch.randn(1, 2, 8, 8)
    assert torch.equal(loaded(x, 3).sample, network(x, 3).sample)


@torch.no_grad()
def test_heads_are_attention_by_its_definition() -> None:
    """softmax(q·kᵀ/√d)·v for each of the heads, against the layer's own output."""
    torch.manual_seed(0)
    network = FixedHeadsUNet2DModel(4, **U_NET).eval()
    layer = network.get_submodule("down_blocks.1.attentions.0")
    x = torch.randn(2, 16, 4, 4)
    tokens = layer.group_norm(x).flatten(2).transpose(1, 2)  # [B, N, C]
    q, k, v = (part(tokens).unflatten(2, (4, 4)).transpose(1, 2) for part in (layer.to_q, layer.to_k, layer.to_v))
    mixed = (q @ k.transpose(2, 3) / 2).softmax(-1) @ v  # [B, heads, N, C / heads]
    expected = layer.to_out[0](mixed.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape) + x
    assert torch.allclose(layer(x), expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("timestep", [0, 37, 999])
def test_timestep_frequencies_of_dit(tmp_path: Path, timestep: int) -> None:
    """cos(t·f), then sin(t·f), with f = 10000^(−i/128)."""
    network = OriginalDiT(**DIT)
    network.save_pretrained(tmp_path)
    embedding = OriginalDiT.from_pretrained(tmp_path).transformer_blocks[0].norm1.emb.time_proj
    angles = timestep * torch.tensor(10000.0) ** (-torch.arange(128, dtype=torch.float64) / 128)
    expected = torch.cat([angles.cos(), angles.sin()]).float()
    assert torch.allclose(embedding(torch.tensor([timestep]))[0], expected, atol=2e-4)
    theirs = DiTTransformer2DModel(**DIT).transformer_blocks[0].norm1.emb.time_proj
    assert torch.allclose(theirs(torch.tensor([timestep]))[0], expected, atol=2e-4) == (timestep == 0)
