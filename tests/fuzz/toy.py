"""A diffusion pipeline of a few thousand random weights, small enough to be run a thousand times."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel


def save_toy(folder: Path) -> Path:
    """Write it as a diffusers folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=16, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8, norm_num_groups=4,
        ).eval()  # fmt: skip
    DDIMPipeline(unet, DDIMScheduler(clip_sample=False, steps_offset=0)).save_pretrained(folder)
    return folder
