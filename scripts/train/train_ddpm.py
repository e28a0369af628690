"""Trains the Fashion-MNIST miniature (Ho et al. 2020); writes a diffusers folder with its model card.

    python scripts/train/train_ddpm.py --steps 20000 --max-minutes 30 --compile

The data set lies wholly on the device and batches are drawn by index. Training ends at --steps or at
--max-minutes, whichever comes first, and the learning rate's cosine ends there too. `--resume` goes on from
the run folder's last checkpoint.
"""

import argparse
import copy
import json
import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from torch import Tensor

from cachequant.errors import UserError
from cachequant.evaluation.fashion_mnist import load_fashion_mnist, to_model_range
from cachequant.evaluation.features import extract_features, load_feature_network
from cachequant.evaluation.frechet import FeatureStatistics, frechet_distance

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN_TIMESTEPS = 1000

CARD = """---
license: mit
library_name: diffusers
datasets: [zalando-datasets/fashion_mnist]
---
# Fashion-MNIST DDPM miniature

An unconditional denoiser of {parameters:,} parameters for `diffusers.DDIMPipeline`, 32 × 32 pixels, one
channel: 28 × 28 images with 2 pixels of -1 all round. Made for tests and demonstrations of CacheQuant.

| | |
| --- | --- |
| data | Fashion-MNIST, 60,000 training images (Zalando Research, MIT licence), no augmentation |
| licence | MIT |
| diffusion | epsilon prediction, {train_timesteps} timesteps, linear betas 1e-4 to 2e-2 |
| training | {steps:,} steps of batch {batch_size}, AdamW, warm-up to {lr:g} then cosine, seed {seed} |
| weights | exponential moving average (decay {ema_decay:g}), float16 safetensors |
| wall time | {minutes:.1f} minutes of training, compilation included |
| hardware | {hardware}, torch {torch_version}, precision {precision} |
{quality}
Made by `scripts/train/train_ddpm.py`.
"""

QUALITY = """| samples | {samples:,}, {sample_steps} DDIM steps, eta 0, float32, seed {sample_seed} |
| Fréchet FashionCNN distance | {distance:.3f}: the samples against the 10,000 test images |
| its floor | {floor:.3f}: 10,000 training images against the same test images |

The distance is over the 128 features of `assets/fashion-cnn`, and compares only with distances over them; the
feature network was trained on the training images.
"""


@dataclass(frozen=True)
class Quality:
    """Fréchet FashionCNN distance of samples to the test set, and of training images to it."""

    distance: float
    floor: float
    samples: int
    sample_steps: int
    sample_seed: int


class Ticks:
    """An endless loader of nothing: the module draws its own batches."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


class Denoiser(pl.LightningModule):
    """Epsilon prediction with an averaged copy of the weights; `images` `[N, 1, 32, 32]` in [-1, 1]."""

    def __init__(self, images: Tensor, options: argparse.Namespace) -> None:
        super().__init__()
        self.options = options
        self.unet = make_unet().to(memory_format=torch.channels_last)
        self.ema = copy.deepcopy(self.unet).requires_grad_(False)
        self.alphas_cumprod: Tensor
        self.images: Tensor
        self.register_buffer("alphas_cumprod", make_scheduler().alphas_cumprod, persistent=False)  # [T]
        self.register_buffer("images", images, persistent=False)  # [N, 1, 32, 32]
        self.seconds_before = 0.0
        self.begin = time.perf_counter()

    def on_train_start(self) -> None:
        torch.manual_seed(self.options.seed + self.global_step)
        self.begin = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Training time so far, that of resumed runs included."""
        return self.seconds_before + time.perf_counter() - self.begin

    @property
    def progress_made(self) -> float:
        """Share of the step or time budget that is spent, whichever is larger; 1 at the end."""
        limit = self.options.max_minutes * 60.0
        return min(1.0, max(self.global_step / self.options.steps, self.seconds / limit))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.unet.parameters(), lr=self.options.lr, weight_decay=1e-3)

    def on_train_batch_start(self, batch: int, batch_idx: int) -> int | None:
        progress = self.progress_made
        if progress >= 1.0:
            self.trainer.should_stop = True
            return -1
        warm_up = min(1.0, (self.global_step + 1) / self.options.warm_up)
        rate = self.options.lr * warm_up * 0.5 * (1.0 + math.cos(math.pi * progress))
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate
        return None

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        size, device = (self.options.batch_size,), self.images.device
        x0 = self.images[torch.randint(len(self.images), size, device=device)]  # [B, 1, 32, 32]
        timestep = torch.randint(TRAIN_TIMESTEPS, size, device=device)  # [B]
        noise = torch.randn_like(x0)
        alpha_bar = self.alphas_cumprod[timestep].view(-1, 1, 1, 1)  # [B, 1, 1, 1]
        x_t = alpha_bar.sqrt() * x0 + (1.0 - alpha_bar).sqrt() * noise  # DDPM, equation 4
        loss = F.mse_loss(self.unet(x_t, timestep).sample.float(), noise)  # DDPM, equation 14
        self.log("loss", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def on_train_batch_end(self, outputs: Any, batch: int, batch_idx: int) -> None:
        step = self.global_step
        decay = min(self.options.ema_decay, (1.0 + step) / (10.0 + step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.unet.parameters()), 1.0 - decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seconds"] = self.seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seconds_before = checkpoint["seconds"]


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
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--max-minutes", type=float, default=60.0, help="training time, resumed runs' too")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=4e-4, help="peak learning rate")
    parser.add_argument("--warm-up", type=int, default=500, help="steps of learning-rate warm-up")
    parser.add_argument("--ema-decay", type=float, default=0.9995)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the denoiser")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's last checkpoint")
    parser.add_argument("--checkpoint-every", type=int, default=2000, help="steps")
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's idx files")
    parser.add_argument("--run", type=Path, default=REPOSITORY / "runs" / "fashion-ddpm", help="checkpoints")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "assets" / "fashion-ddpm")
    parser.add_argument("--samples", type=int, default=10_000, help="samples to evaluate; 0: no evaluation")
    parser.add_argument("--sample-steps", type=int, default=100, help="DDIM steps of the evaluation")
    parser.add_argument("--sample-batch", type=int, default=1000)
    parser.add_argument("--sample-seed", type=int, default=1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=device)
    return parser.parse_args(argv)


def train(module: Denoiser, options: argparse.Namespace) -> None:
    """Trains to the step or time budget and leaves `last.ckpt` in the run folder; changes `module` in place.

    Raises:
        UserError: --resume without a checkpoint.
    """
    last = options.run / "last.ckpt"
    if options.resume and not last.is_file():
        raise UserError(f"no checkpoint {last}; expected one for --resume: train without it first")
    if options.compile:
        module.unet.compile()
    trainer = pl.Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        precision=precision(options),
        max_steps=options.steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        callbacks=[
            ModelCheckpoint(
                dirpath=options.run,
                filename="last",
                every_n_train_steps=options.checkpoint_every,
                enable_version_counter=False,
            ),
            TQDMProgressBar(refresh_rate=50),
        ],
        logger=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Ticks(), ckpt_path=last if options.resume else None)
    trainer.save_checkpoint(last)


def precision(options: argparse.Namespace) -> str:
    return "bf16-mixed" if options.device == "cuda" else "32-true"


def export(unet: UNet2DModel, folder: Path) -> None:
    """Writes the pipeline as a diffusers folder, the denoiser in float16."""
    half = copy.deepcopy(unet).to(torch.float16, memory_format=torch.contiguous_format)
    DDIMPipeline(half, make_scheduler()).save_pretrained(folder, safe_serialization=True)


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


def evaluate(images: Tensor, train_images: Tensor, options: argparse.Namespace) -> Quality:
    """Compares samples, and 10,000 training images, with the test set; all `[N, 1, 32, 32]` in [-1, 1]."""
    network = load_feature_network()

    def statistics(x: Tensor) -> FeatureStatistics:
        result = FeatureStatistics(channels=128)
        result.update(extract_features(network, x, batch_size=500, device=options.device))
        return result

    test_images, _ = load_fashion_mnist("test", options.data)
    test = statistics(to_model_range(test_images))
    generator = torch.Generator().manual_seed(options.sample_seed)
    rows = torch.randperm(len(train_images), generator=generator)[:10_000]
    floor, made = statistics(train_images[rows]), statistics(images)
    return Quality(
        distance=frechet_distance(made.mean, made.covariance, test.mean, test.covariance),
        floor=frechet_distance(floor.mean, floor.covariance, test.mean, test.covariance),
        samples=len(images),
        sample_steps=options.sample_steps,
        sample_seed=options.sample_seed,
    )


def save_grid(images: Tensor, path: Path, side: int = 8) -> None:
    """The first side² images `[N, 1, 32, 32]` in [-1, 1] as one greyscale PNG; too few leave black cells."""
    cells = -torch.ones(side * side, 32, 32)
    shown = images[: side * side, 0]  # [n, 32, 32]
    cells[: len(shown)] = shown
    grid = cells.view(side, side, 32, 32).transpose(1, 2).reshape(side * 32, side * 32)
    pixels = ((grid + 1.0) * 127.5).round().to(torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)


def write_card(module: Denoiser, seconds: float, quality: Quality | None) -> None:
    """`README.md` beside the weights, and the same numbers in `training.json`."""
    options = module.options
    facts = {
        "parameters": sum(p.numel() for p in module.ema.parameters()),
        "train_timesteps": TRAIN_TIMESTEPS,
        "steps": module.trainer.global_step,
        "batch_size": options.batch_size,
        "lr": options.lr,
        "seed": options.seed,
        "ema_decay": options.ema_decay,
        "minutes": seconds / 60.0,
        "hardware": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "torch_version": torch.__version__,
        "precision": precision(options),
    }
    text = QUALITY.format(**asdict(quality)) if quality else "| quality | not evaluated |\n"
    (options.out / "README.md").write_text(CARD.format(quality=text, **facts), encoding="utf-8")
    record = facts | {"frechet_fashion_cnn": asdict(quality) if quality else None}
    (options.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    pl.seed_everything(options.seed)
    pixels, _ = load_fashion_mnist("train", options.data)
    train_images = to_model_range(pixels)
    module = Denoiser(train_images, options)
    train(module, options)
    seconds = module.seconds
    export(module.ema, options.out)
    write_card(module, seconds, quality=None)
    if options.samples == 0:
        return
    pipe = DDIMPipeline.from_pretrained(options.out, torch_dtype=torch.float32).to(options.device)
    images = sample(pipe, options.samples, options.sample_steps, options.sample_batch, options.sample_seed)
    save_grid(images, options.out / "samples.png")
    quality = evaluate(images, train_images, options)
    write_card(module, seconds, quality)
    print(f"Fréchet FashionCNN distance {quality.distance:.3f} (floor {quality.floor:.3f}); {options.out}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
