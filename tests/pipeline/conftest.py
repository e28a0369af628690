"""A toy pipeline with random weights, and a configuration that fits it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from cachequant.config import RunConfig, load_config, repository_folder


@pytest.fixture
def pipe() -> Any:
    """An unconditional DDIM pipeline with a two-level U-Net."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, norm_num_groups=4,
    ).eval()  # fmt: skip
    pipe = DDIMPipeline(unet, DDIMScheduler(clip_sample=False, steps_offset=0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def configure() -> Callable[..., RunConfig]:
    """Six steps, interval 2, four samples; anything else by key=value."""

    def make(*overrides: str) -> RunConfig:
        base = [
            "sampler.steps=6", "cache.interval=2", "calibration.samples=4", "calibration.batch_size=2",
            "sample.count=2", "sample.batch_size=2",
        ]  # fmt: skip
        return load_config(repository_folder() / "configs" / "fashion.yaml", [*base, *overrides])

    return make


@pytest.fixture
def images(pipe: Any) -> Callable[..., torch.Tensor]:
    """Images of the pipeline for a seed: [B, H, W, C]."""

    def run(batch: int = 2, steps: int = 6, seed: int = 3) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        made = pipe(batch_size=batch, generator=generator, num_inference_steps=steps, output_type="np").images
        return torch.from_numpy(made)

    return run


@pytest.fixture
def weights_file(tmp_path: Path, pipe: Any) -> Path:
    """The toy pipeline as a diffusers folder."""
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
