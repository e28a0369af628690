"""The paper's networks with random weights: for measuring time and memory where the checkpoints are not at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cachequant.errors import UserError


def ddpm_cifar10() -> nn.Module:
    """The 35.7 M-parameter U-Net of DDPM on CIFAR-10 (Ho et al. 2020; the configuration of google/ddpm-cifar10-32)."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        act_fn="silu", attention_head_dim=None, norm_eps=1e-6, flip_sin_to_cos=False, freq_shift=1, downsample_padding=0,
    )  # fmt: skip


def sd_v1() -> nn.Module:
    """The 860 M-parameter U-Net of Stable Diffusion v1 (Rombach et al. 2022; the configuration of its v1.4)."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"ddpm-cifar10": ddpm_cifar10, "sd-v1": sd_v1}
"""Family -> its denoiser."""


def random_denoiser(family: str, seed: int = 0) -> Any:
    """The denoiser of a family with random weights, float32, channels last, in evaluation mode.

    Raises:
        UserError: unknown family.
    """
    if family not in NETWORKS:
        raise UserError(f"family is {family!r}, expected one of {', '.join(NETWORKS)}: choose one of these")
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        network = NETWORKS[family]().eval()
    finally:
        torch.random.set_rng_state(state)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def random_pipeline(family: str, seed: int = 0) -> Any:
    """The pipeline of a family around `random_denoiser`, with the family's sampler; text is replaced by random embeddings.

    Raises:
        UserError: unknown family.
    """
    from cachequant.models.families import pixel_scheduler, plms_scheduler

    denoiser = random_denoiser(family, seed)
    if family == "ddpm-cifar10":
        from cachequant.models.pipelines import PixelDDIMPipeline

        return PixelDDIMPipeline(denoiser, pixel_scheduler())
    from cachequant.models.random_text import RandomTextPipeline

    return RandomTextPipeline.around(denoiser, plms_scheduler(beta_start=0.00085, beta_end=0.012))
