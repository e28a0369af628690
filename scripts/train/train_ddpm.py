"""Trains the Fashion-MNIST miniature (Ho et al. 2020); writes a diffusers folder with its model card.

    python scripts/train/train_ddpm.py --steps 20000 --minutes 30 --compile

The data set lies wholly on the device and batches are drawn by index. Training ends at --steps or --minutes
after the start, whichever comes first, and the learning rate's cosine ends there too. `--resume` goes on from
the run folder's last checkpoint.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from publish import (
    FASHION_DATA,
    FRECHET_NOTE,
    Quality,
    add_sample_options,
    fashion_quality,
    quality_record,
    save_grid,
    training_rows,
    write_card,
)
from torch import Tensor
from training import Averaged, facts, half, load_exported, parser, train, warm_up

from cachequant.errors import UserError
from cachequant.evaluation.fashion_mnist import load_fashion_mnist, to_model_range

TRAIN_TIMESTEPS = 1000


class Denoiser(Averaged):
    """Epsilon prediction on images `[N, 1, 32, 32]` in [-1, 1]."""

    def __init__(self, unet: UNet2DModel, images: Tensor, options: argparse.Namespace) -> None:
        super().__init__(unet.to(memory_format=torch.channels_last), options)
        self.alphas_cumprod: Tensor
        self.images: Tensor
        self.register_buffer("alphas_cumprod", make_scheduler().alphas_cumprod, persistent=False)  # [T]
        self.register_buffer("images", images, persistent=False)  # [N, 1, 32, 32]

    def loss(self) -> Tensor:
        size, device = (self.options.batch_size,), self.images.device
        x0 = self.images[torch.randint(len(self.images), size, device=device)]  # [B, 1, 32, 32]
        timestep = torch.randint(TRAIN_TIMESTEPS, size, device=device)  # [B]
        noise = torch.randn_like(x0)
        alpha_bar = self.alphas_cumprod[timestep].view(-1, 1, 1, 1)  # [B, 1, 1, 1]
        x_t = alpha_bar.sqrt() * x0 + (1.0 - alpha_bar).sqrt() * noise  # DDPM, equation 4
        return F.mse_loss(self.network(x_t, timestep).sample.float(), noise)  # DDPM, equation 14


def make_unet() -> UNet2DModel:
    """The miniature's network: `[B, 1, 32, 32]` to `[B, 1, 32, 32]`, 6.1 M parameters, attention at 8 × 8."""
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(48, 96, 192),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """Linear betas of DDPM (Ho et al. 2020), sampled with DDIM (Song et al. 2021) and no clipping."""
    return DDIMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_start=1e-4,
        beta_end=2e-2,
        beta_schedule="linear",
        clip_sample=False,
        prediction_type="epsilon",
        set_alpha_to_one=True,
        steps_offset=0,
        timestep_spacing="leading",
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__, "fashion-ddpm", steps=20_000, batch_size=512, lr=4e-4)
    add_sample_options(options, steps=100)
    return options.parse_args(argv)


def export(unet: UNet2DModel, folder: Path) -> None:
    """Writes the pipeline as a diffusers folder, the denoiser in float16."""
    DDIMPipeline(half(unet), make_scheduler()).save_pretrained(folder, safe_serialization=True)


@torch.no_grad()
def sample(pipe: DDIMPipeline, count: int, steps: int, batch_size: int, seed: int) -> Tensor:
    """Images `[N, 1, 32, 32]` in [-1, 1] on the CPU, where the noise is drawn: the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 1, 32, 32, generator=generator)
    pipe.scheduler.set_timesteps(steps)
    batches = []
    for number, x in enumerate(noise.split(batch_size)):
        print(f"sampling {number * batch_size}/{count}", flush=True)
        x = x.to(pipe.device)
        for timestep in pipe.scheduler.timesteps:
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
                epsilon = pipe.unet(x, timestep).sample  # [B, 1, 32, 32]
            x = pipe.scheduler.step(epsilon, timestep, x, eta=0.0).prev_sample  # DDIM, equation 12
        batches.append(x.clamp(-1.0, 1.0).cpu())
    return torch.cat(batches)


def card(module: Denoiser, quality: Quality | None) -> None:
    """The model card and `training.json`."""
    made = facts(module)
    text = f"""An unconditional denoiser of {made["parameters"]:,} parameters for `diffusers.DDIMPipeline`, 32 × 32 pixels,
one channel: 28 × 28 images with 2 pixels of -1 all round. Made for tests and demonstrations of CacheQuant.
TABLE
{FRECHET_NOTE if quality else ""}
Made by `scripts/train/train_ddpm.py`.
"""
    rows = {
        "data": FASHION_DATA,
        "licence": "MIT",
        "diffusion": f"epsilon prediction, {TRAIN_TIMESTEPS} timesteps, linear betas 1e-4 to 2e-2",
        **training_rows(made),
        **(quality.rows() if quality else {"quality": "not evaluated"}),
    }
    front = {"license": "mit", "library_name": "diffusers", "datasets": "[zalando-datasets/fashion_mnist]"}
    record = {**made, "train_timesteps": TRAIN_TIMESTEPS, **quality_record(quality)}
    write_card(module.options.out, front, "Fashion-MNIST DDPM miniature", text, rows, record)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    pl.seed_everything(options.seed)
    pixels, _ = load_fashion_mnist("train", options.data)
    train_images = to_model_range(pixels)
    unet = make_unet()
    load_exported({"unet": unet}, options.start_from)
    module = Denoiser(unet, train_images, options)
    warm_up(module, options)
    train(module, options, lambda: export(module.ema, options.out))
    card(module, quality=None)
    if options.samples == 0:
        return
    pipe = DDIMPipeline.from_pretrained(options.out, torch_dtype=torch.float32).to(options.device)
    images = sample(pipe, options.samples, options.sample_steps, options.sample_batch, options.sample_seed)
    save_grid({f"{i}": row for i, row in enumerate(images[:64].split(8))}, options.out / "samples.png")
    quality = fashion_quality(
        images, train_images, options.data, options.sample_steps, options.sample_seed, options.device
    )
    card(module, quality)
    print(f"Fréchet FashionCNN distance {quality.distance:.3f} (floor {quality.floor:.3f}); {options.out}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
