"""Trains the diffusion transformer miniature (Peebles & Xie 2023); writes a diffusers folder with its model card.

    python scripts/train/train_autoencoder.py fashion-dit --minutes 5
    python scripts/train/train_fashion_dit.py --minutes 15 --compile

adaLN-Zero blocks over latent patches, the variance learned by the hybrid loss of improved DDPM (Nichol & Dhariwal
2021), one of ten labels dropped for guidance. `DiTPipeline` takes class 1000 as "no class", so that is its id here.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
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

NO_CLASS = 1000
GUIDANCE = 1.5


class Denoiser(LatentDenoiser):
    """Epsilon and variance given a class; `labels` [N]."""

    def __init__(self, network: nn.ModuleDict, labels: Tensor, options: argparse.Namespace) -> None:
        scheduler = make_scheduler()
        super().__init__(network, (len(labels), 4, 16, 16), scheduler, options)
        self.labels: Tensor
        self.betas: Tensor
        self.register_buffer("labels", labels.long(), persistent=False)
        self.register_buffer("betas", scheduler.betas.float(), persistent=False)  # [T]

    @property
    def compiled(self) -> nn.Module:
        return self.network["transformer"]

    def loss(self) -> Tensor:
        rows, x0, timestep, noise, x_t = self.draw()
        labels = self.labels[rows].masked_fill(self.unconditional(), NO_CLASS)  # [B]
        output = self.network["transformer"](x_t, timestep, labels).sample.float()  # [B, 8, 16, 16]
        epsilon, fraction = output.chunk(2, dim=1)
        bound = variational_bound(x0, x_t, epsilon.detach(), fraction, timestep, self.betas)
        return F.mse_loss(epsilon, noise) + bound.mean()


def variational_bound(
    x0: Tensor, x_t: Tensor, epsilon: Tensor, fraction: Tensor, timestep: Tensor, betas: Tensor
) -> Tensor:
    """KL(q(x_{t-1} | x_t, x_0) ‖ p(x_{t-1} | x_t)) in bits per dimension, [B] (improved DDPM, equations 14 and 15).

    log Σ interpolates between log β̃_t (fraction -1) and log β_t (fraction 1). At t = 0, where β̃ is 0, β̃_1 stands in,
    and the term stays a KL; improved DDPM takes the likelihood of 8-bit pixels there, which latents have not.

    Args:
        x0: clean latents [B, c, h, w].
        x_t: noised ones.
        epsilon: the predicted noise, not differentiated.
        fraction: the predicted interpolation.
        timestep: [B], 0…T−1.
        betas: [T].
    """
    alpha_bar = (1.0 - betas.double()).cumprod(0)  # [T]
    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])  # ᾱ_{t-1}
    posterior = betas * (1.0 - before) / (1.0 - alpha_bar)  # β̃ (DDPM, equation 7)
    posterior = torch.cat([posterior[1:2], posterior[1:]])
    weight_x0 = betas * before.sqrt() / (1.0 - alpha_bar)

    def at(values: Tensor) -> Tensor:
        return values[timestep].float().view(-1, 1, 1, 1)

    x0_predicted = (x_t - at((1.0 - alpha_bar).sqrt()) * epsilon) / at(alpha_bar.sqrt())
    difference = at(weight_x0) * (x0 - x0_predicted)  # of the two means; the share of x_t is the same in both
    log_q, log_beta = at(posterior.log()), at(betas.log())
    log_p = log_q + 0.5 * (fraction + 1.0) * (log_beta - log_q)
    divergence = 0.5 * (log_p - log_q - 1.0 + (log_q - log_p).exp() + difference.square() * (-log_p).exp())
    return divergence.flatten(1).mean(1) / math.log(2.0)


def make_network() -> nn.ModuleDict:
    """Twelve blocks of width 128 over 8 × 8 patches, begun as the DiT paper says; 5.7 M parameters.

    1.5 M of them are rows of classes that do not exist (each block of diffusers has its own table of 1001); they are 0.
    """
    transformer = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=8,
        num_layers=12,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=NO_CLASS,
    )
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        table = block.norm1.emb.class_embedder
        table.dropout_prob = 0.0  # labels are dropped in the loss, once for all blocks
        nn.init.normal_(table.embedding_table.weight, std=0.02)
        table.embedding_table.weight.data[len(FASHION_LABELS) : NO_CLASS] = 0.0
    nn.init.zeros_(transformer.proj_out_1.weight)
    nn.init.zeros_(transformer.proj_out_2.weight)
    return nn.ModuleDict({"transformer": transformer})


def make_scheduler() -> DDIMScheduler:
    """DDIM over DDPM's linear betas, as DiT-XL/2's folder has it."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=2e-2,
        beta_schedule="linear",
        clip_sample=False,
        prediction_type="epsilon",
    )


def export(module: Denoiser, first_stage: AutoencoderKL, folder: Path) -> None:
    """Writes the pipeline as a diffusers folder in float16."""
    names = {i: label for i, label in enumerate(FASHION_LABELS)}
    pipe = DiTPipeline(half(module.ema["transformer"]), half(first_stage), make_scheduler(), id2label=names)
    pipe.register_to_config(id2label=names)
    pipe.save_pretrained(folder, safe_serialization=True)


def card(module: Denoiser, first_stage: Path, quality: Quality | None) -> None:
    """The model card and `training.json`."""
    made = facts(module)
    text = f"""A class-conditional diffusion transformer of {made["parameters"]:,} parameters with adaLN-Zero, learned sigma
and its own Gaussian first stage, for `diffusers.DiTPipeline`: 32 × 32 pixels, one channel, latents 16 × 16 × 4, patches of
2 × 2, 12 blocks of width 128. Class {NO_CLASS} is "no class", as in that pipeline; the rows of classes between are 0.
Made for tests and demonstrations of CacheQuant.
TABLE
{FRECHET_NOTE if quality else ""}
Made by `scripts/train/train_autoencoder.py` and `scripts/train/train_fashion_dit.py`.
"""
    rows = {
        "data": FASHION_DATA,
        "classes": ", ".join(f"{i} {label}" for i, label in enumerate(FASHION_LABELS)),
        "licence": "MIT",
        "diffusion": "epsilon and variance by L_simple + L_vlb, 1000 timesteps, linear betas 1e-4 to 2e-2, "
        "labels dropped: 10 %",
        **first_stage_rows(first_stage),
        **training_rows(made),
        **(quality.rows() | {"guidance": f"{GUIDANCE:g}"} if quality else {"quality": "not evaluated"}),
    }
    front = {"license": "mit", "library_name": "diffusers", "datasets": "[zalando-datasets/fashion_mnist]"}
    record = {**made, "guidance_scale": GUIDANCE, **quality_record(quality)}
    write_card(module.options.out, front, "Fashion-MNIST diffusion transformer miniature", text, rows, record)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    options = parser(__doc__, "fashion-dit", steps=100_000, batch_size=512, lr=8e-4)
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
    folder = options.autoencoder or options.out / "vae"
    first_stage = load_first_stage(AutoencoderKL, folder, options.wait, options.device)
    module.set_latents(scaled_latents(first_stage, images))
    train(module, options, lambda: export(module, first_stage, options.out))
    card(module, folder, quality=None)
    if options.samples == 0:
        return
    pipe = DiTPipeline.from_pretrained(options.out, torch_dtype=torch.float32).to(options.device)
    card(module, folder, evaluate_classes(pipe, images, options, GUIDANCE))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
