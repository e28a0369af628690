"""The two pipelines that diffusers lacks: class-conditional latent diffusion, and pixels with a scheduler of our own."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ConfigMixin,
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from cachequant.errors import UserError


class ClassEmbedder(ModelMixin, ConfigMixin):
    """One context token per class; the row behind the last class stands for "no class".

    Args:
        num_classes: classes, without the unconditional one.
        embed_dim: width of the token.
    """

    @register_to_config
    def __init__(self, num_classes: int = 1000, embed_dim: int = 512) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, embed_dim)

    def forward(self, class_labels: Tensor) -> Tensor:
        """Class ids [B] -> context [B, 1, embed_dim]."""
        return self.embedding(class_labels)[:, None]


class PixelDDIMPipeline(DDIMPipeline):
    """`DDIMPipeline` that keeps the scheduler it is given; diffusers' turns any into a plain, evenly spaced one."""

    cache_branch = 3
    """The released CIFAR-10 scripts run the finest level and the resnet before it: four positions ("branch 2" there)."""

    def __init__(self, unet: UNet2DModel, scheduler: DDIMScheduler) -> None:
        super().__init__(unet, scheduler)
        self.register_modules(scheduler=scheduler)


class ClassConditionalLDMPipeline(DiffusionPipeline):
    """Class-conditional latent diffusion with classifier-free guidance (Rombach et al., CVPR 2022; cin256-v2).

    Args:
        vqvae: first stage; latents are divided by its `scaling_factor` before it decodes them.
        unet: denoiser with cross attention on the class token.
        class_embedder: class ids -> tokens.
        scheduler: usually DDIM.
    """

    model_cpu_offload_seq = "class_embedder->unet->vqvae"

    def __init__(
        self,
        vqvae: VQModel | AutoencoderKL,
        unet: UNet2DConditionModel,
        class_embedder: ClassEmbedder,
        scheduler: DDIMScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(vqvae=vqvae, unet=unet, class_embedder=class_embedder, scheduler=scheduler)
        self._guidance_scale = 1.0

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether every evaluation runs on a doubled batch, the unconditional half first."""
        return self._guidance_scale > 1

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int] | Tensor,
        num_inference_steps: int = 250,
        guidance_scale: float = 1.5,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """One image per class id.

        Args:
            class_labels: ids [B] in 0…num_classes − 1.
            num_inference_steps: steps of the sampler.
            guidance_scale: ε = ε_u + scale·(ε_c − ε_u); at most 1 runs the conditional half alone.
            eta: η of DDIM.
            generator: one for the batch, or a list of one per image.
            latents: starting noise [B, C, H, W], drawn where None.
            output_type: "pil", "np", "pt" or "latent" (the sampler's result, undecoded).
            return_dict: an `ImagePipelineOutput`, or a tuple of its one entry.

        Raises:
            UserError: a class id that the embedder does not have, noise of another shape.
        """
        self._guidance_scale = guidance_scale
        device = self._execution_device  # walks all modules
        context = self._context(class_labels, device)
        x = self._noise(len(context) // (1 + self.do_classifier_free_guidance), generator, latents, device)
        self.scheduler.set_timesteps(num_inference_steps)
        accepted = inspect.signature(self.scheduler.step).parameters
        extra = {k: v for k, v in {"eta": eta, "generator": generator}.items() if k in accepted}
        for timestep in self.progress_bar(self.scheduler.timesteps):
            doubled = torch.cat([x, x]) if self.do_classifier_free_guidance else x  # [2B or B, C, H, W]
            doubled = self.scheduler.scale_model_input(doubled, timestep)
            noise = self.unet(doubled, timestep, encoder_hidden_states=context).sample
            if self.do_classifier_free_guidance:
                unconditional, conditional = noise.chunk(2)
                noise = torch.lerp(unconditional, conditional, guidance_scale)
            x = self.scheduler.step(noise, timestep, x, **extra).prev_sample
        images = x if output_type == "latent" else self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _context(self, class_labels: int | list[int] | Tensor, device: torch.device) -> Tensor:
        """Tokens [B, 1, D], behind those of "no class" [B, 1, D] under guidance."""
        none = self.class_embedder.config.num_classes
        labels = torch.as_tensor(class_labels).reshape(-1)
        wrong = labels[(labels < 0) | (labels >= none)].tolist()
        if wrong:
            raise UserError(f"class id {wrong[0]}, expected 0 to {none - 1}: choose one of this model's {none} classes")
        if self.do_classifier_free_guidance:
            labels = torch.cat([torch.full_like(labels, none), labels])
        return self.class_embedder(labels.to(device))

    def _noise(self, batch: int, generator: Any, latents: Tensor | None, device: torch.device) -> Tensor:
        """Starting noise [B, C, H, W] on a device."""
        size, dtype = self.unet.config.sample_size, self.unet.dtype
        shape = (batch, self.unet.config.in_channels, size, size)
        if latents is None:
            latents = randn_tensor(shape, generator, device=device, dtype=dtype)
        elif latents.shape[:2] != shape[:2]:
            raise UserError(f"latents are {list(latents.shape)}, expected {list(shape)}: one per class id")
        return latents.to(device, dtype) * self.scheduler.init_noise_sigma

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        """Images in [0, 1] of latents [B, C, H, W], as `output_type` says."""
        images = self.vqvae.decode(latents / self.vqvae.config.scaling_factor).sample
        images = (images / 2 + 0.5).clamp(0, 1)  # [B, 3, H, W]
        if output_type == "pt":
            return images
        images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images
