"""The samplers of the paper's six models, as diffusers schedulers."""

from __future__ import annotations

from typing import Any

from cachequant.errors import UserError


def pixel_scheduler(**betas: Any) -> Any:
    """DDIM of the CIFAR-10 scripts: quadratic timesteps, linear betas, ᾱ = 1 at the end, nothing clipped."""
    from cachequant.models.schedulers import SpacedDDIMScheduler

    return SpacedDDIMScheduler(timestep_spacing="quadratic", clip_sample=False, **betas)


def latent_scheduler(**betas: Any) -> Any:
    """DDIM of latent diffusion: timesteps 1, 1 + 1000/S, …, √β evenly spaced, ᾱ₀ at the end."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(clip_sample=False, **_LATENT, **betas)


def plms_scheduler(**betas: Any) -> Any:
    """PLMS of Stable Diffusion v1: one evaluation more than steps, since the first step takes two."""
    from diffusers import PNDMScheduler

    return PNDMScheduler(skip_prk_steps=True, **_LATENT, **betas)


def transformer_scheduler(**betas: Any) -> Any:
    """DDIM over the respaced timesteps of DiT: evenly spaced from 0 to 999, both ends included, linear betas."""
    from cachequant.models.schedulers import SpacedDDIMScheduler

    return SpacedDDIMScheduler(timestep_spacing="linspace", clip_sample=False, **betas)


_LATENT: dict[str, Any] = {"beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False}


_PIPELINES = {
    "ddpm-cifar10": ("PixelDDIMPipeline", "DDIMPipeline", "DDPMPipeline"),
    "ldm4-bedroom": ("LDMPipeline",),
    "ldm8-church": ("LDMPipeline",),
    "ldm4-imagenet": ("ClassConditionalLDMPipeline",),
    "sd-v1": ("StableDiffusionPipeline",),
    "dit-xl2": ("DiTPipeline",),
}
"""What a folder of each family may hold."""


def with_family_sampler(pipe: Any, family: str) -> Any:
    """A hub or folder pipeline with the sampler that the paper's scripts use for its family.

    Published folders differ from the originals in two cases: google/ddpm-cifar10-32 is saved with ancestral sampling, and
    facebook/DiT-XL-2-256 with timesteps that begin at 980. The others have the right sampler already.

    Raises:
        UserError: the pipeline is not one of this family's.
    """
    found = type(pipe).__name__
    if found not in _PIPELINES[family]:
        raise UserError(
            f"model.path holds a {found}, expected {' or '.join(_PIPELINES[family])} for model.family {family}: "
            "correct one of the two"
        )
    made = {"ddpm-cifar10": pixel_scheduler, "dit-xl2": transformer_scheduler}.get(family)
    if made is None:
        return pipe
    scheduler = made(**{key: pipe.scheduler.config[key] for key in ("beta_start", "beta_end", "num_train_timesteps")})
    if family == "ddpm-cifar10":
        from cachequant.models.pipelines import PixelDDIMPipeline

        return PixelDDIMPipeline(pipe.unet, scheduler)
    pipe.register_modules(scheduler=scheduler)
    return pipe
