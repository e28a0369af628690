"""Trains the text-to-image miniature in Stable Diffusion's format; writes a diffusers folder with its model card.

    python scripts/train/prepare_drawings.py
    python scripts/train/train_autoencoder.py drawings-sd --minutes 5
    python scripts/train/train_drawings_clip.py --minutes 5     # the judge, for the card
    python scripts/train/train_drawings_sd.py --minutes 30 --compile

A CLIP-style text encoder, a U-Net with cross attention and a Gaussian first stage (Rombach et al. 2022). The text
encoder is trained with the denoiser, from nothing. One of ten prompts is dropped for guidance.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import drawings
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from latents import LatentDenoiser, add_first_stage_options, first_stage_rows, load_first_stage, scaled_latents
from publish import save_grid, training_rows, write_card
from torch import Tensor, nn
from training import REPOSITORY, facts, half, load_exported, parser, train, warm_up
from transformers import CLIPTextConfig, CLIPTextModel

from cachequant.errors import UserError
from cachequant.evaluation.retrieval import load_judge, prompt_similarities, retrieval_accuracy
from cachequant.models.prompts import read_prompts

CONTEXT = 128
STEPS = 50
EVALUATION = REPOSITORY / "prompts" / "drawings_evaluation.txt"
KNOWN = (
    "red apple", "strawberry", "hamburger", "birthday cake", "cat face", "panda face", "koala", "fish", "rose",
    "evergreen tree", "sailboat", "rocket", "blue heart", "ghost", "smiling face with sunglasses", "umbrella", "guitar",
    "automobile",
)  # fmt: skip


class Denoiser(LatentDenoiser):
    """Epsilon prediction given a prompt; `tokens` [N, V, L] are V prompts of each drawing, `empty` [L] of none."""

    def __init__(self, network: nn.ModuleDict, tokens: Tensor, empty: Tensor, options: argparse.Namespace) -> None:
        network["unet"].to(memory_format=torch.channels_last)
        super().__init__(network, (len(tokens), 8, 16, 16), make_scheduler(), options)
        self.tokens: Tensor
        self.empty: Tensor
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("empty", empty, persistent=False)

    @property
    def compiled(self) -> nn.Module:
        return self.network["unet"]

    def loss(self) -> Tensor:
        rows, _, timestep, noise, x_t = self.draw()
        variant = torch.randint(self.tokens.shape[1], rows.shape, device=rows.device)
        tokens = self.tokens[rows, variant]  # [B, L]
        tokens = torch.where(self.unconditional()[:, None], self.empty, tokens)
        context = self.network["text_encoder"](tokens)[0]  # [B, L, D]
        return F.mse_loss(self.network["unet"](x_t, timestep, context).sample.float(), noise)


def make_network(tokenizer: Any) -> nn.ModuleDict:
    """A U-Net of 4.9 M parameters on 16 × 16 × 8 and a text transformer of 0.8 M."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        layers_per_block=1,
        block_out_channels=(96, 96, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=CONTEXT,
        attention_head_dim=3,  # the number of heads, whatever its name
        norm_num_groups=16,
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CONTEXT,
        intermediate_size=4 * CONTEXT,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=drawings.MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return nn.ModuleDict({"unet": unet, "text_encoder": CLIPTextModel(text)})


def make_scheduler() -> PNDMScheduler:
    """PLMS as Stable Diffusion v1.4 has it."""
    return PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def export(module: Denoiser, first_stage: AutoencoderKL, tokenizer: Any, folder: Path) -> None:
    """Writes the pipeline as a diffusers folder in float16."""
    pipe = StableDiffusionPipeline(
        vae=half(first_stage),
        text_encoder=half(module.ema["text_encoder"]),
        tokenizer=tokenizer,
        unet=half(module.ema["unet"]),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder, safe_serialization=True)


def draw(pipe: Any, prompts: list[str], guidance: float, seed: int, batch_size: int = 128) -> Tensor:
    """One image [3, 64, 64] in [-1, 1] for each prompt, its noise drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    pipe.set_progress_bar_config(disable=True)
    batches = []
    for begin in range(0, len(prompts), batch_size):
        print(f"sampling {begin}/{len(prompts)}", flush=True)
        images = pipe(
            prompts[begin : begin + batch_size],
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            generator=generator,
            output_type="np",
        ).images
        batches.append(torch.from_numpy(images).permute(0, 3, 1, 2) * 2.0 - 1.0)
    return torch.cat(batches)


def sample_grid(pipe: Any, known: set[str], guidance: float, path: Path) -> None:
    """Two drawings in each style for training names, then for held-out ones of the evaluation list."""
    names = [name for name in KNOWN if name in known]
    names += [name for name in read_prompts(str(EVALUATION)) if name not in known][:6]
    styles = [style for style in drawings.SETS for _ in range(2)]
    images = draw(pipe, [drawings.prompt(name, style) for name in names for style in styles], guidance, seed=1)
    rows = dict(
        zip((f"{name}{'' if name in known else ' *'}" for name in names), images.split(len(styles)), strict=True)
    )
    save_grid(rows, path)


def agreement(pipe: Any, known: set[str], guidance: float, judge: tuple[Any, Any]) -> dict[str, float]:
    """Retrieval accuracy of images of the evaluation prompts among them, for training names and held-out ones."""
    prompts = list(read_prompts(str(EVALUATION)))
    images = (draw(pipe, prompts, guidance, seed=2) + 1.0) / 2.0
    scores, answers = prompt_similarities(judge, images, prompts), torch.arange(len(prompts))
    seen = torch.tensor([prompt in known for prompt in prompts])
    parts = {"known": seen, "held_out": ~seen}
    return {
        f"{name}_top{top}": retrieval_accuracy(scores[part], answers[part], top)
        for name, part in parts.items()
        for top in (1, 5)
    }


def card(module: Denoiser, first_stage: Path, found: dict[str, float] | None, guidance: float) -> None:
    """The model card and `training.json`."""
    made = facts(module)
    count = len(read_prompts(str(EVALUATION)))
    text = f"""A text-to-image model of {made["parameters"]:,} parameters, text encoder included, with its own first stage,
for `diffusers.StableDiffusionPipeline`: 64 × 64 pixels, latents 16 × 16 × 8, PLMS. Prompts are names of things, if wanted
with a style: "red apple", "red apple, noto style", "twemoji style", "fluent style". Made for tests and demonstrations.
TABLE
In `samples.png` each row is one name, two drawings in each style (noto, twemoji, fluent); names with * were held out:
no drawing of their concept, in any style, was trained on. The agreement is the share of images that find their own
prompt among the {count} of `prompts/drawings_evaluation.txt`, as `assets/drawings-clip` sees it.

{drawings.ATTRIBUTION}
Made by `scripts/train/prepare_drawings.py`, `train_autoencoder.py` and `train_drawings_sd.py`.
"""
    rows = {
        "data": f"{len(module.tokens):,} drawings in three styles; a tenth of the concepts is held out",
        "licence": "MIT; of the drawings see below",
        "diffusion": "epsilon prediction, 1000 timesteps, scaled linear betas 0.00085 to 0.012, prompts dropped: 10 %",
        **first_stage_rows(first_stage),
        **training_rows(made),
        "samples": f"{STEPS} PLMS steps, guidance {guidance:g}, float32",
    }
    if found is not None:
        rows["agreement, training names"] = f"{found['known_top1']:.1%} first, {found['known_top5']:.1%} among five"
        rows["agreement, held-out names"] = (
            f"{found['held_out_top1']:.1%} first, {found['held_out_top5']:.1%} among five"
        )
    front = {"license": "mit", "library_name": "diffusers", "pipeline_tag": "text-to-image"}
    record = {**made, "guidance_scale": guidance, "agreement": found}
    write_card(module.options.out, front, "Drawings: a Stable Diffusion miniature", text, rows, record)


def main(argv: Sequence[str] | None = None) -> None:
    options_parser = parser(__doc__, "drawings-sd", steps=200_000, batch_size=512, lr=6e-4)
    add_first_stage_options(options_parser)
    options_parser.add_argument("--data", type=Path, default=drawings.DATA, help="the packed drawings")
    options_parser.add_argument("--judge", type=Path, default=REPOSITORY / "assets" / "drawings-clip")
    options_parser.add_argument("--guidance", type=float, default=5.0, help="of the card's samples")
    options_parser.add_argument("--no-samples", action="store_true", help="neither grid nor agreement")
    options = options_parser.parse_args(argv)
    pl.seed_everything(options.seed)
    data = drawings.load_drawings(options.data).part(held_out=False)
    known = set(data.names)
    tokenizer = drawings.make_tokenizer(sorted(known))
    prompts = [[drawings.prompt(n), drawings.prompt(n, s)] for n, s in zip(data.names, data.sets, strict=True)]
    tokens = torch.stack([drawings.tokenise(tokenizer, variants) for variants in zip(*prompts, strict=True)], dim=1)
    network = make_network(tokenizer)
    load_exported(dict(network.items()), options.start_from)
    module = Denoiser(network, tokens, drawings.tokenise(tokenizer, [""])[0], options)
    warm_up(module, options)
    folder = options.autoencoder or options.out / "vae"
    first_stage = load_first_stage(AutoencoderKL, folder, options.wait, options.device)
    module.set_latents(scaled_latents(first_stage, drawings.to_model_range(data.images)))
    train(module, options, lambda: export(module, first_stage, tokenizer, options.out))
    card(module, folder, None, options.guidance)
    if options.no_samples:
        return
    pipe = StableDiffusionPipeline.from_pretrained(options.out, torch_dtype=torch.float32).to(options.device)
    sample_grid(pipe, known, options.guidance, options.out / "samples.png")
    judge = load_judge(options.judge)
    judge[0].to(options.device)
    found = agreement(pipe, known, options.guidance, judge)
    card(module, folder, found, options.guidance)
    print(f"agreement {found}; {options.out}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
