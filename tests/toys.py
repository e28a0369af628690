"""Pipelines of toy size with random weights, one for each of the paper's models, as diffusers folders."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)

from cachequant.models.pipelines import ClassConditionalLDMPipeline, ClassEmbedder

DDIM = {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}


def save_toy(family: str, folder: Path) -> Path:
    """Write the toy of a family ("pixels" is none of the paper's), from seed 0; returns the folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        TOYS[family]().save_pretrained(folder)
    return folder


def pixel_unet(channels: int = 1, size: int = 16, layers: int = 1) -> UNet2DModel:
    """Two levels, attention in the lower one."""
    return UNet2DModel(
        sample_size=size, in_channels=channels, out_channels=channels, layers_per_block=layers, norm_num_groups=4,
        block_out_channels=(8, 16), attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def cross_unet(channels: int, width: int) -> UNet2DConditionModel:
    """Two levels with cross attention in the upper one, 8×8."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=channels, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width, attention_head_dim=4, norm_num_groups=4,
    ).eval()  # fmt: skip


def _first_stage(kind: Any, **settings: Any) -> Any:
    """An autoencoder of two levels."""
    return kind(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, **settings,
    ).eval()  # fmt: skip


def _latent() -> Any:
    return LDMPipeline(_first_stage(VQModel), pixel_unet(channels=3, size=8), DDIMScheduler(**DDIM))


def _class_conditional() -> Any:
    unet, classes = cross_unet(3, 6), ClassEmbedder(10, 6).eval()
    return ClassConditionalLDMPipeline(_first_stage(VQModel, scaling_factor=1.0), unet, classes, DDIMScheduler(**DDIM))


def _stable_diffusion() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    text = CLIPTextConfig(
        vocab_size=54, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    letters = [chr(97 + i) for i in range(26)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer(str(vocabulary), str(merges), model_max_length=8)
    return StableDiffusionPipeline(
        vae=_first_stage(AutoencoderKL, latent_channels=4, sample_size=16), text_encoder=CLIPTextModel(text).eval(),
        unet=cross_unet(4, 16), scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
        tokenizer=tokenizer, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _transformer() -> Any:
    """As many blocks as DiT-XL/2 has."""
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=28, sample_size=8,
        patch_size=2,
    ).eval()  # fmt: skip
    return DiTPipeline(network, _first_stage(AutoencoderKL, latent_channels=4, sample_size=16), DDIMScheduler())


TOYS: dict[str, Callable[[], Any]] = {
    "pixels": lambda: DDIMPipeline(pixel_unet(), DDIMScheduler(clip_sample=False, steps_offset=0)),
    "ddpm-cifar10": lambda: DDIMPipeline(pixel_unet(channels=3, layers=2), DDIMScheduler()),
    "ldm4-bedroom": _latent,
    "ldm8-church": _latent,
    "ldm4-imagenet": _class_conditional,
    "sd-v1": _stable_diffusion,
    "dit-xl2": _transformer,
}
