"""The adapter contract on real diffusers classes of toy size."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from cachequant.errors import UserError
from cachequant.models import adapter
from cachequant.models.cost import step_macs


def tiny_unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, norm_num_groups=4,
    ).eval()  # fmt: skip


def tiny_conditional() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6, attention_head_dim=4, norm_num_groups=4,
    ).eval()  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("branch", [0, 1, 2, 3])
def test_cached_with_its_own_feature_is_the_full_step(branch: int) -> None:
    for network, cond in ((tiny_unet(), None), (tiny_conditional(), torch.randn(2, 3, 6))):
        x = torch.randn(2, network.config.in_channels, network.config.sample_size, network.config.sample_size)
        shaped = adapter(network, branch)
        output, feature = shaped.full(x, torch.tensor(3), cond)
        kwargs = {} if cond is None else {"encoder_hidden_states": cond}
        assert torch.equal(output, network(x, torch.tensor(3), **kwargs).sample)
        assert torch.equal(shaped.cached(x, torch.tensor(3), cond, feature), output)
        assert feature.shape[1] == shaped.width


@torch.no_grad()
def test_a_cached_step_does_not_look_at_the_deep_network() -> None:
    network = tiny_unet()
    shaped = adapter(network, 0)
    x = torch.randn(1, 1, 16, 16)
    _, feature = shaped.full(x, torch.tensor(3))
    before = shaped.cached(x, torch.tensor(3), None, feature)
    for parameter in network.mid_block.parameters():
        parameter.fill_(torch.nan)
    assert torch.equal(shaped.cached(x, torch.tensor(3), None, feature), before)


@torch.no_grad()
def test_controlnet_residual_of_the_mid_block_is_not_added_twice() -> None:
    network = tiny_conditional()
    shaped = adapter(network, 0)
    x, cond = torch.randn(1, 2, 8, 8), torch.randn(1, 3, 6)
    skips = [
        torch.randn(1, 8, 8, 8),
        torch.randn(1, 8, 8, 8),
        torch.randn(1, 8, 4, 4),
        torch.randn(1, 16, 4, 4),
    ]
    residuals = {
        "down_block_additional_residuals": tuple(skips), "mid_block_additional_residual": torch.randn(1, 16, 4, 4)
    }  # fmt: skip
    output, feature = shaped.full(x, torch.tensor(3), cond, **residuals)
    assert torch.equal(shaped.cached(x, torch.tensor(3), cond, feature, **residuals), output)


def test_consumers_are_the_layers_that_read_the_cached_half() -> None:
    shaped = adapter(tiny_unet(), 0)
    found = shaped.consumers()
    assert {c.name for c in found} == {"up_blocks.1.resnets.1.conv1", "up_blocks.1.resnets.1.conv_shortcut"}
    assert all(shaped.splits()[c.name] == c.width == shaped.width < c.channels for c in found)
    assert shaped.end_names() == {"conv_in", "conv_out"}


def test_macs_of_a_cached_step_are_a_fraction() -> None:
    shaped = adapter(tiny_unet(), 0)
    full, cached = step_macs(shaped, torch.zeros(1, 1, 16, 16), torch.tensor(3), {})
    stem = 16 * 16 * 9 * 8  # 3×3, 1 -> 8 channels
    assert 2 * stem < cached < 0.5 * full


def test_what_is_not_a_pipeline_is_named() -> None:
    with pytest.raises(UserError, match=r"got a object without \.unet"):
        adapter(object())
    with pytest.raises(UserError, match="Linear is not supported"):
        adapter(torch.nn.Linear(2, 2))
