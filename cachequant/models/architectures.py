"""The paper's models with random weights: for measuring time and memory where the checkpoints are not at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cachequant.config_values import FAMILIES
from cachequant.errors import UserError

DIT_XL2: dict[str, Any] = {
    "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8, "num_layers": 28,
    "sample_size": 32, "patch_size": 2, "num_embeds_ada_norm": 1000, "norm_eps": 1e-6,
}  # fmt: skip
"""DiT-XL/2 at 256×256 (Peebles and Xie, ICCV 2023, table 1)."""
CLIP_TEXT: dict[str, Any] = {
    "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "projection_dim": 768,
}  # fmt: skip
"""The text encoder of Stable Diffusion v1: CLIP ViT-L/14's (Radford et al., 2021, table 19)."""


def random_denoiser(family: str, seed: int = 0, device: str | torch.device = "cpu") -> Any:
    """The denoiser of a family with random weights, float32, channels last, in evaluation mode.

    Args:
        family: of `FAMILIES`.
        seed: of the weights.
        device: where they are drawn; a GPU draws the largest in seconds.

    Raises:
        UserError: unknown family.
    """
    return _drawn(_denoiser(family), seed, device).to(memory_format=torch.channels_last)


def random_pipeline(family: str, seed: int = 0, device: str | torch.device = "cpu", whole: bool = False) -> Any:
    """The pipeline of a family around `random_denoiser`, with the family's sampler.

    Args:
        family, seed, device: of `random_denoiser`.
        whole: Stable Diffusion's text encoder and first stage too, without which random embeddings stand for text and
            latents are not decoded; the other families have all their parts anyway.

    Raises:
        UserError: unknown family.
    """
    from cachequant.models.families import pixel_scheduler, plms_scheduler, transformer_scheduler

    denoiser = random_denoiser(family, seed, device)
    if family == "ddpm-cifar10":
        from cachequant.models.pipelines import PixelDDIMPipeline

        return PixelDDIMPipeline(denoiser, pixel_scheduler())
    if family == "dit-xl2":
        from diffusers import DiTPipeline

        return DiTPipeline(denoiser, _drawn(_first_stage(), seed, device), transformer_scheduler())
    if family == "sd-v1":
        from cachequant.models.original.text import text_encoder
        from cachequant.models.random_text import RandomTextPipeline

        builds = {"vae": _first_stage(), "text_encoder": text_encoder(CLIP_TEXT).build} if whole else {}
        parts = {name: _drawn(build, seed, device) for name, build in builds.items()}
        return RandomTextPipeline.around(denoiser, plms_scheduler(beta_start=0.00085, beta_end=0.012), **parts)
    recipe = _latent(family)
    return recipe.assemble(unet=denoiser, **{n.component: _drawn(n.build, seed, device) for n in recipe.networks[1:]})


def _denoiser(family: str) -> Callable[[], nn.Module]:
    """What makes the denoiser of a family, from the original configuration of its checkpoint.

    Raises:
        UserError: unknown family.
    """
    from cachequant.models.original.dit import dit
    from cachequant.models.original.settings import need, original_settings
    from cachequant.models.original.unet import ddpm_unet, ldm_unet

    if family not in FAMILIES:
        raise UserError(f"family is {family!r}, expected one of {', '.join(FAMILIES)}: choose one of these")
    if family == "dit-xl2":
        return dit(DIT_XL2).build
    settings = original_settings(family, None)
    if family == "ddpm-cifar10":
        return ddpm_unet(need(settings, "model"), need(settings, "data.image_size")).build
    params = need(settings, "model.params")
    return ldm_unet(need(params, "unet_config.params"), need(params, "image_size")).build


def _latent(family: str) -> Any:
    """The recipe of a latent-diffusion family whose sizes are all in its original configuration."""
    from cachequant.models.original.recipes import latent_recipe
    from cachequant.models.original.settings import original_settings

    return latent_recipe(original_settings(family, None), {}, family)


def _first_stage() -> Callable[[], nn.Module]:
    """The autoencoder of Stable Diffusion v1, which DiT decodes with too."""
    from cachequant.models.original.first_stage import first_stage
    from cachequant.models.original.settings import need, original_settings

    params = need(original_settings("sd-v1", None), "model.params")
    return first_stage(need(params, "first_stage_config"), "vae", need(params, "scale_factor")).build


def _drawn(build: Callable[[], nn.Module], seed: int, device: str | torch.device) -> Any:
    """A network in evaluation mode whose weights are drawn from a seed where they are to be; other random numbers stay."""
    place = torch.device(device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), place:
        torch.manual_seed(seed)
        return build().eval().to(place)  # buffers that are made from numpy arrays too
