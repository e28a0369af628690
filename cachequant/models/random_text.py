"""A text-to-image pipeline without text, for measuring time."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel


class RandomTextPipeline(StableDiffusionPipeline):
    """Stable Diffusion's loop around a denoiser alone: random text embeddings in, latents out. For measuring time."""

    @classmethod
    def around(cls, unet: UNet2DConditionModel, scheduler: Any) -> RandomTextPipeline:
        """The pipeline of a denoiser and a scheduler (usually PLMS), without any other part."""
        parts: dict[str, Any] = dict.fromkeys(
            ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
        )
        return cls(unet=unet, scheduler=scheduler, requires_safety_checker=False, **parts)

    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        eta: float = 0.0,
        generator: Any = None,
        output_type: str = "latent",
    ) -> Any:
        """Latents [B, 4, H, W] as `images`; `output_type` is accepted and makes no difference."""
        width = self.unet.config.cross_attention_dim
        text, nothing = torch.randn(2, batch_size, 77, width, generator=torch.Generator().manual_seed(0)).to(
            self.device
        )
        return super().__call__(
            prompt_embeds=text, negative_prompt_embeds=nothing, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, eta=eta, generator=generator, output_type="latent",
        )  # fmt: skip
