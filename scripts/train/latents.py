"""Latent diffusion's shared parts: waiting for the first stage, cached latents, the noised batch."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from train_autoencoder import encode
from training import Averaged

from cachequant.errors import UserError


class LatentDenoiser(Averaged):
    """A denoiser of latents that lie on the device.

    Args:
        network: the denoiser and what is trained with it.
        shape: of the latents, [N, c, h, w]. Random ones stand in until `set_latents`, so that the network can be
            compiled while the first stage is still being trained.
        scheduler: its noise schedule is learned.
        options: of `training.parser`.
    """

    def __init__(
        self, network: nn.Module, shape: tuple[int, int, int, int], scheduler: Any, options: argparse.Namespace
    ) -> None:
        super().__init__(network, options)
        self.latents: Tensor
        self.alphas_cumprod: Tensor
        self.register_buffer("latents", torch.randn(shape), persistent=False)
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.float(), persistent=False)  # [T]

    def set_latents(self, latents: Tensor) -> None:
        """Replaces the stand-ins; raises ValueError for another shape."""
        if latents.shape != self.latents.shape:
            raise ValueError(f"latents {list(latents.shape)}, expected {list(self.latents.shape)}")
        self.latents.copy_(latents)

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A batch: rows [B], x_0 [B, c, h, w], timesteps [B], noise and x_t [B, c, h, w]."""
        size, device = (self.options.batch_size,), self.latents.device
        rows = torch.randint(len(self.latents), size, device=device)
        x0 = self.latents[rows]
        timestep = torch.randint(len(self.alphas_cumprod), size, device=device)
        noise = torch.randn_like(x0)
        alpha_bar = self.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        x_t = alpha_bar.sqrt() * x0 + (1.0 - alpha_bar).sqrt() * noise  # DDPM, equation 4
        return rows, x0, timestep, noise, x_t

    def unconditional(self, share: float = 0.1) -> Tensor:
        """bool [B]: the rows that lose their condition, for classifier-free guidance (Ho & Salimans 2022)."""
        return torch.rand(self.options.batch_size, device=self.latents.device) < share


def add_first_stage_options(parser: argparse.ArgumentParser) -> None:
    """Where the first stage is, and how long to wait for it."""
    parser.add_argument("--autoencoder", type=Path, help="folder of the first stage (default: within --out)")
    parser.add_argument("--wait", type=float, default=0.0, help="minutes to wait for the first stage's training")


def load_first_stage(kind: Any, folder: Path, minutes: float, device: str) -> Any:
    """The trained first stage in float32, once its training has written its last file.

    Raises:
        UserError: it is not there in time.
    """
    end = time.monotonic() + 60.0 * minutes
    while not (folder / "training.json").is_file():
        if time.monotonic() > end:
            raise UserError(f"no first stage in {folder}; expected one: run scripts/train/train_autoencoder.py first")
        time.sleep(0.5)
    first_stage = kind.from_pretrained(folder, torch_dtype=torch.float32)
    first_stage.register_to_config(_name_or_path="")  # not the folder of this machine
    return first_stage.to(device).eval().requires_grad_(False)


def scaled_latents(first_stage: Any, images: Tensor) -> Tensor:
    """Latents [N, c, h, w] of images [N, C, H, W] in [-1, 1], times the first stage's scaling factor."""
    return encode(first_stage, images) * first_stage.config.scaling_factor


def first_stage_rows(folder: Path) -> dict[str, str]:
    """The line of the model card on the first stage."""
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    text = f"{record['parameters']:,} parameters, {record['steps']:,} steps of batch {record['batch_size']}, "
    text += f"{record['minutes']:.1f} minutes, {record['psnr']:.2f} dB on held-out images"
    if "codes_used" in record:
        text += f", {record['codes_used']:.0%} of the codes in use"
    return {"first stage": text}
