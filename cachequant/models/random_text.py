"""A text-to-image pipeline without words, for measuring time."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

TOKENS = 77
"""Length of a prompt."""


class RandomTextPipeline(StableDiffusionPipeline):
    """Stable Diffusion's loop with random tokens, or without a text encoder random embeddings, for its text."""

    @classmethod
    def around(
        cls, unet: UNet2DConditionModel, scheduler: Any, vae: Any = None, text_encoder: Any = None
    ) -> RandomTextPipeline:
        """The pipeline of a denoiser and a scheduler (usually PLMS); without `vae` latents are not decoded."""
        return cls(
            vae=vae, text_encoder=text_encoder, tokenizer=None, unet=unet, scheduler=scheduler, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        eta: float = 0.0,
        generator: Any = None,
        output_type: str = "latent",
    ) -> Any:
        """Images as `output_type` says, or latents [B, 4, H, W] where nothing decodes them."""
        text, nothing = self._embeddings(batch_size)
        return super().__call__(
            prompt_embeds=text, negative_prompt_embeds=nothing, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, eta=eta, generator=generator,
            output_type="latent" if self.vae is None else output_type,
        )  # fmt: skip

    def _embeddings(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """What stands for the prompts and for no prompt, each [B, 77, C]."""
        generator = torch.Generator().manual_seed(0)
        if self.text_encoder is None:
            width = self.unet.config.cross_attention_dim
            text, nothing = torch.randn(2, batch_size, TOKENS, width, generator=generator).to(self.device)
            return text, nothing
        tokens = torch.randint(self.text_encoder.config.vocab_size, (2 * batch_size, TOKENS), generator=generator)
        text, nothing = self.text_encoder(tokens.to(self.device))[0].chunk(2)
        return text, nothing
