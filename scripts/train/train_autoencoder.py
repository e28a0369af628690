"""Trains a miniature's first stage: `python scripts/train/train_autoencoder.py fashion-ldm|fashion-dit|drawings-sd`.

    python scripts/train/train_autoencoder.py fashion-ldm --minutes 5

L1 reconstruction, as in latent diffusion's first stages, without their perceptual and adversarial parts. The
exported model's `scaling_factor` makes the latents' standard deviation 1. Everything else is as in `train_ddpm.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import drawings
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from publish import training_rows, write_card
from torch import Tensor
from training import Averaged, facts, half, load_exported, parser, train

from cachequant.errors import UserError
from cachequant.evaluation.fashion_mnist import load_fashion_mnist, to_model_range

KL_WEIGHT = 1e-4
"""Weight of the mean KL divergence of a latent value beside the mean absolute error of a pixel value."""

CODES = 1024
REVIVE_EVERY = 50
"""Steps after which a code that nobody chose is moved."""
REVIVE_UNTIL = 0.6
"""Share of the budget after which codes stay where they are."""

Images = tuple[Tensor, Tensor]
"""Training and held-out images [N, C, H, W] in [-1, 1]."""


def fashion_images(data: Path | None) -> Images:
    """Fashion-MNIST's two parts, one channel, 32 × 32."""
    train_images, _ = load_fashion_mnist("train", data)
    test_images, _ = load_fashion_mnist("test", data)
    return to_model_range(train_images), to_model_range(test_images)


def drawing_images(data: Path | None) -> Images:
    """Drawings of training and of held-out concepts, three channels, 64 × 64."""
    everything = drawings.load_drawings(data or drawings.DATA)
    known, new = (everything.part(held_out).images for held_out in (False, True))
    return drawings.to_model_range(known), drawings.to_model_range(new)


def make_vq() -> VQModel:
    """32 × 32 × 1 to 16 × 16 × 3, 1024 codes of width 3, 0.4 M parameters."""
    return VQModel(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 48),
        layers_per_block=1,
        latent_channels=3,
        sample_size=32,
        num_vq_embeddings=CODES,
        norm_num_groups=16,
    )


def make_kl(channels: int, sample_size: int, widths: tuple[int, ...], latent_channels: int) -> AutoencoderKL:
    """A Gaussian autoencoder that halves the side at every width but the first."""
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=latent_channels,
        sample_size=sample_size,
        norm_num_groups=16,
    )


@dataclass(frozen=True)
class Recipe:
    """How one miniature's first stage is made: its network, its images, its subfolder, and whether mirrors are drawn."""

    make: Callable[[], VQModel | AutoencoderKL]
    images: Callable[[Path | None], Images]
    folder: str
    mirror: bool


RECIPES = {
    "fashion-ldm": Recipe(make_vq, fashion_images, "vqvae", mirror=False),
    "fashion-dit": Recipe(lambda: make_kl(1, 32, (32, 48), latent_channels=4), fashion_images, "vae", mirror=False),
    "drawings-sd": Recipe(lambda: make_kl(3, 64, (32, 64, 64), latent_channels=8), drawing_images, "vae", mirror=True),
}


class Autoencoder(Averaged):
    """Reconstruction of images `[N, C, H, W]` in [-1, 1] through quantised or Gaussian latents."""

    def __init__(
        self, network: VQModel | AutoencoderKL, images: Tensor, mirror: bool, options: argparse.Namespace
    ) -> None:
        super().__init__(network.to(memory_format=torch.channels_last), options)
        self.mirror = mirror
        self.images: Tensor
        self.register_buffer("images", images, persistent=False)
        self.code_used: Tensor
        self.register_buffer("code_used", torch.zeros(CODES, dtype=torch.bool), persistent=False)

    def loss(self) -> Tensor:
        x = self.batch()
        if isinstance(self.network, VQModel):
            z = self.network.encode(x).latents  # [B, 3, h, w]
            self.code_used[nearest_code(self.network, z)] = True
            output = self.network.decode(z)
            return F.l1_loss(output.sample.float(), x) + output.commit_loss
        posterior = self.network.encode(x).latent_dist
        reconstruction = self.network.decode(posterior.sample()).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return F.l1_loss(reconstruction.float(), x) + KL_WEIGHT * divergence

    def batch(self) -> Tensor:
        """Random images [B, C, H, W], half of them mirrored where the recipe says so."""
        device = self.images.device
        x = self.images[torch.randint(len(self.images), (self.options.batch_size,), device=device)]
        if self.mirror:
            x = torch.where(torch.rand(len(x), 1, 1, 1, device=device) < 0.5, x, x.flip(3))
        return x

    def on_train_batch_end(self, outputs: Any, batch: int, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        step = self.global_step
        revive = step % REVIVE_EVERY == 0 and self.budget.progress(step) < REVIVE_UNTIL
        if isinstance(self.network, VQModel) and revive:
            self.revive_codes()

    @torch.no_grad()
    def revive_codes(self) -> None:
        """Moves every code that no latent chose lately to a random latent: a codebook begins in one point and would
        stay there."""
        z = self.network.encode(self.batch()).latents.float()  # [B, 3, h, w]
        candidates = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])  # [B·h·w, 3]
        dead = ~self.code_used
        picked = candidates[torch.randint(len(candidates), (len(dead),), device=z.device)]  # [CODES, 3]
        for network in (self.network, self.ema):
            codes = network.quantize.embedding.weight
            codes.copy_(torch.where(dead[:, None], picked, codes))
        self.code_used.zero_()


@torch.no_grad()
def nearest_code(network: VQModel, latents: Tensor) -> Tensor:
    """Indices [B·h·w] of the codes nearest to latents [B, c, h, w]."""
    return network.quantize(latents)[2][2]


@torch.no_grad()
def encode(network: VQModel | AutoencoderKL, images: Tensor, batch_size: int = 500) -> Tensor:
    """Latents [N, c, h, w] of images [N, C, H, W] in [-1, 1], unscaled; of Gaussian ones the means."""
    device = next(network.parameters()).device
    batches = []
    for x in images.split(batch_size):
        output = network.encode(x.to(device))
        batches.append(output.latents if isinstance(network, VQModel) else output.latent_dist.mean)
    return torch.cat(batches)


@torch.no_grad()
def measure(network: VQModel | AutoencoderKL, images: Tensor) -> dict[str, Any]:
    """PSNR in dB of reconstructed images [N, C, H, W] in [-1, 1]; of a codebook also the share of codes in use."""
    latents = encode(network, images)
    error, used = 0.0, set()
    for x, z in zip(images.split(500), latents.split(500), strict=True):
        error += float((network.decode(z).sample.clamp(-1, 1) - x.to(z.device)).square().sum())
        if isinstance(network, VQModel):
            used.update(nearest_code(network, z).tolist())
    result: dict[str, Any] = {"psnr": 10 * float(torch.log10(torch.tensor(4.0 * images.numel() / error)))}
    if isinstance(network, VQModel):
        result["codes_used"] = len(used) / network.config.num_vq_embeddings
    return result


def main(argv: Sequence[str] | None = None) -> None:
    options_parser = parser(__doc__, "autoencoder", steps=20_000, batch_size=256, lr=1e-3)
    options_parser.add_argument("miniature", choices=sorted(RECIPES))
    options_parser.add_argument("--data", type=Path, help="Fashion-MNIST's folder, or the file of packed drawings")
    options_parser.set_defaults(run=None, out=None, warm_up=100, ema_decay=0.995)
    options = options_parser.parse_args(argv)
    recipe = RECIPES[options.miniature]
    root = Path(__file__).resolve().parents[2]
    options.run = options.run or root / "runs" / options.miniature / "autoencoder"
    options.out = options.out or root / "assets" / options.miniature / recipe.folder
    pl.seed_everything(options.seed)
    images, held_out = recipe.images(options.data)
    network = recipe.make()
    load_exported({options.out.name: network}, options.start_from)
    module = Autoencoder(network, images, recipe.mirror, options)
    train(module, options, lambda: None)
    export(module, images, held_out)


def export(module: Autoencoder, images: Tensor, held_out: Tensor) -> None:
    """Writes the averaged autoencoder in float16 with its scale, its card, and last `training.json`."""
    out, network = module.options.out, module.ema.to(module.options.device).eval()
    sample = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:5000]]
    network.register_to_config(scaling_factor=1.0 / float(encode(network, sample).std()))
    half(network).save_pretrained(out)
    record = {**facts(module), **measure(network, held_out[:2000]), "scaling_factor": network.config.scaling_factor}
    rows = {"PSNR": f"{record['psnr']:.2f} dB, {min(len(held_out), 2000):,} held-out images", **training_rows(record)}
    text = f"A first stage of {record['parameters']:,} parameters, part of the pipeline in the folder above."
    write_card(out, {"library_name": "diffusers"}, type(network).__name__, text, rows, record)
    print(f"PSNR {record['psnr']:.2f} dB, {record['parameters']:,} parameters; {out}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
