"""Trains the class-conditional latent diffusion miniature; writes a diffusers folder with its model card.

    python scripts/train/train_autoencoder.py fashion-ldm --minutes 5
    python scripts/train/train_fashion_ldm.py --minutes 15 --compile

The structure of CompVis' LDM-4 for ImageNet (Rombach et al. 2022): quantised first stage, diffusion on the latents
before quantisation, a class token read by cross attention, one of ten labels dropped for guidance.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel, VQModel
from latents import LatentDenoiser, add_first_stage_options, first_stage_rows, load_first_stage, scaled_latents
from publish import (
    FASHION_DATA,
    FASHION_LABELS,
    FRECHET_NOTE,
    Quality,
    add_sample_options,
    evaluate_classes,
    quality_record,
    training_rows,
    write_card,
)
from torch import Tensor, nn
from training import facts, half, load_exported, parser, train, warm_up

from cachequant.errors import UserError
from cachequant.evaluation.fashion_mnist import load_fashion_mnist, to_model_range
from cachequant.models.pipelines import ClassConditionalLDMPipeline, ClassEmbedder

CLASSES = len(FASHION_LABELS)
TOKEN = 96
GUIDANCE = 1.5


class Denoiser(LatentDenoiser):
    """Epsilon prediction given a class; `labels` [N]."""

    def __init__(self, network: nn.ModuleDict, labels: Tensor, options: argparse.Namespace) -> None:
        network["unet"].to(memory_format=torch.channels_last)
        super().__init__(network, (len(labels), 3, 16, 16), make_scheduler(), options)
        self.labels: Tensor
        self.register_buffer("labels", labels.long(), persistent=False)

    @property
    def compiled(self) -> nn.Module:
        return self.network["unet"]

    def loss(self) -> Tensor:
        rows, _, timestep, noise, x_t = self.draw()
        labels = self.labels[rows].masked_fill(self.unconditional(), CLASSES)  # [B]
        context = self.network["class_embedder"](labels)  # [B, 1, D]
        return F.mse_loss(self.network["unet"](x_t, timestep, context).sample.float(), noise)


def make_network() -> nn.ModuleDict:
    """A U-Net of 4.1 M parameters on 16 × 16 × 3, cross attention at 8 × 8 and 4 × 4, and its class tokens."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(64, 96, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TOKEN,
        attention_head_dim=(2, 3, 3),  # the number of heads, whatever its name
        norm_num_groups=16,
    )
    return nn.ModuleDict({"unet": unet, "class_embedder": ClassEmbedder(CLASSES, TOKEN)})


def make_scheduler() -> DDIMScheduler:
    """DDIM over latent diffusion's betas, as cin256-v2 is sampled."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def export(module: Denoiser, first_stage: VQModel, folder: Path) -> None:
    """Writes the pipeline as a diffusers folder in float16."""
    parts = {name: half(part) for name, part in module.ema.items()}
    pipe = ClassConditionalLDMPipeline(half(first_stage), parts["unet"], parts["class_embedder"], make_scheduler())
    pipe.save_pretrained(folder, safe_serialization=True)


def card(module: Denoiser, first_stage: Path, quality: Quality | None) -> None:
    """The model card and `training.json`."""
    made = facts(module)
    text = f"""A class-conditional latent denoiser of {made["parameters"]:,} parameters with its own quantised first stage,
for `cachequant.models.pipelines.ClassConditionalLDMPipeline`: 32 × 32 pixels, one channel, latents 16 × 16 × 3. Class
{CLASSES} is "no class". Made for tests and demonstrations of CacheQuant.
TABLE
{FRECHET_NOTE if quality else ""}
Made by `scripts/train/train_autoencoder.py` and `scripts/train/train_fashion_ldm.py`.
"""
    rows = {
        "data": FASHION_DATA,
        "classes": ", ".join(f"{i} {label}" for i, label in enumerate(FASHION_LABELS)),
        "licence": "MIT",
        "diffusion": "epsilon prediction, 1000 timesteps, scaled linear betas 0.0015 to 0.0195, labels dropped: 10 %",
        **first_stage_rows(first_stage),
        **training_rows(made),
        **(quality.rows() | {"guidance": f"{GUIDANCE:g}"} if quality else {"quality": "not evaluated"}),
    }
    front = {"license": "mit", "library_name": "diffusers", "datasets": "[zalando-datasets/fashion_mnist]"}
    record = {**made, "guidance_scale": GUIDANCE, **quality_record(quality)}
    write_card(module.options.out, front, "Fashion-MNIST latent diffusion miniature", text, rows, record)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__, "fashion-ldm", steps=100_000, batch_size=512, lr=6e-4)
    add_first_stage_options(options)
    add_sample_options(options, steps=50)
    return options.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    pl.seed_everything(options.seed)
    pixels, labels = load_fashion_mnist("train", options.data)
    images = to_model_range(pixels)
    network = make_network()
    load_exported(dict(network.items()), options.start_from)
    module = Denoiser(network, labels, options)
    warm_up(module, options)
    folder = options.autoencoder or options.out / "vqvae"
    first_stage = load_first_stage(VQModel, folder, options.wait, options.device)
    module.set_latents(scaled_latents(first_stage, images))
    train(module, options, lambda: export(module, first_stage, options.out))
    card(module, folder, quality=None)
    if options.samples == 0:
        return
    pipe = ClassConditionalLDMPipeline.from_pretrained(options.out, torch_dtype=torch.float32).to(options.device)
    card(module, folder, evaluate_classes(pipe, images, options, GUIDANCE))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
