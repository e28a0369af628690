"""The YAML of every system of the paper: it loads, and its cut is where the paper has it in the full-size network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from cachequant.config import load_config, repository_folder
from cachequant.models.adapter import adapter

CONFIGS = repository_folder() / "configs"
PAPER = ("cifar10", "bedroom", "church", "imagenet", "stable_diffusion", "stable_diffusion_parti", "dit")


def full_size(name: str) -> nn.Module:
    """The system's denoiser without memory for its weights."""
    from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

    down, attn, up, attn_up = "DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"
    with torch.device("meta"):
        if name == "cifar10":
            return UNet2DModel(
                32, 3, 3, block_out_channels=(128, 256, 256, 256), down_block_types=(down, attn, down, down),
                up_block_types=(up, up, attn_up, up), layers_per_block=2, attention_head_dim=None,
            )  # fmt: skip
        if name == "bedroom":
            return UNet2DModel(
                64, 3, 3, block_out_channels=(224, 448, 672, 896), down_block_types=(down, attn, attn, attn),
                up_block_types=(attn_up, attn_up, attn_up, up), layers_per_block=2, attention_head_dim=32,
            )  # fmt: skip
        if name == "church":
            return UNet2DModel(
                32, 4, 4, block_out_channels=(192, 192, 384, 768, 768), resnet_time_scale_shift="scale_shift",
                down_block_types=("ResnetDownsampleBlock2D", attn, attn, attn, attn),
                up_block_types=(attn_up, attn_up, attn_up, attn_up, "ResnetUpsampleBlock2D"), layers_per_block=2,
                attention_head_dim=24, downsample_type="resnet", upsample_type="resnet",
            )  # fmt: skip
        if name == "imagenet":
            cross, cross_up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
            return UNet2DConditionModel(
                64, 3, 3, block_out_channels=(192, 384, 576, 960), cross_attention_dim=512, attention_head_dim=1,
                down_block_types=(down, cross, cross, cross), up_block_types=(cross_up, cross_up, cross_up, up),
            )  # fmt: skip
        if name == "dit":
            return DiTTransformer2DModel(out_channels=8)
        return UNet2DConditionModel(64, 4, 4, cross_attention_dim=768)


@pytest.mark.parametrize("name", PAPER)
def test_the_yaml_loads_with_any_method_and_says_where_each_value_is_from(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    for method in ("paper", "best", "naive", "uniform_dec"):
        load_config(CONFIGS / f"{name}.yaml", [f"method={method}"])
    assert config.model.path and config.calibration.seed == 1243
    assert config.calibration.dps_samples == config.calibration.batch_size
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    sampled = [
        line for line in lines if re.match(r"  [a-z_]+: ", line) and not re.match(r"  (name|path|family|eta): ", line)
    ]
    assert sampled and all(re.search(r"# \[[PRDH]\]", line) for line in sampled)


@pytest.mark.parametrize(
    ("name", "evaluations", "width", "refreshes"),
    [
        ("cifar10", 100, 256, 10), ("bedroom", 100, 224, 50), ("church", 100, 192, 50), ("imagenet", 250, 192, 13),
        ("stable_diffusion", 50, 320, 10), ("dit", 250, 1152, 125),
    ],
)  # fmt: skip
def test_steps_interval_and_cut_are_the_papers(name: str, evaluations: int, width: int, refreshes: int) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", ["method=paper"])
    assert config.sampler.steps == evaluations
    assert -(-evaluations // config.cache.interval) == refreshes
    cut = adapter(full_size(name), config.cache.branch, config.cache.span)
    assert cut.width == width
    straddling = {c.name.rpartition(".")[2]: c.straddling_groups for c in cut.consumers()}
    if name == "dit":
        assert {c.name for c in cut.consumers()} == {f"transformer_blocks.21.attn1.to_{p}" for p in "qkv"}
    else:
        assert set(straddling) == {"conv1", "conv_shortcut"}
    assert any(straddling.values()) == (name == "cifar10")  # 256 of 384 channels in groups of 12


def test_our_method_keeps_only_the_last_decoder_block_of_cifar10() -> None:
    ours, paper = (load_config(CONFIGS / "cifar10.yaml", [f"method={name}"]) for name in ("best", "paper"))
    assert (ours.cache.branch, paper.cache.branch) == (0, 3)
    assert ours.cache.interval == paper.cache.interval and ours.sampler == paper.sampler


def test_both_stable_diffusion_files_differ_in_the_evaluation_alone() -> None:
    coco, parti = (load_config(CONFIGS / f"{name}.yaml") for name in PAPER[4:6])
    assert coco.sampler.prompts != parti.sampler.prompts and coco.calibration == parti.calibration
    assert Path(str(coco.calibration.prompts)).name == "calibration.txt"
