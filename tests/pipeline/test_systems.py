"""Each system of the paper through all six stages, from its own YAML and a narrow checkpoint of the original code."""

from __future__ import annotations

import bz2
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import cachequant as cq
from cachequant.config import RunConfig, load_config, repository_folder
from cachequant.models.loading import load_pipeline
from cachequant.pipeline.context import Context
from cachequant.pipeline.stages import Stages

CHECKPOINTS = {
    "cifar10": ("ddpm_cifar10", "model-790000.ckpt"),
    "bedroom": ("ldm4_bedroom", "model.ckpt"),
    "church": ("ldm8_church", "model.ckpt"),
    "imagenet": ("ldm4_imagenet", "model.ckpt"),
    "stable_diffusion": ("sd_v1", "model.ckpt"),
    "dit": ("dit_xl2", "DiT-XL-2-256x256.pt"),
}
SMALL = (
    "sampler.steps=6", "cache.interval=3", "calibration.samples=2", "calibration.batch_size=2",
    "calibration.dec_samples=2", "calibration.refresh_inputs=2", "calibration.cached_inputs=1", "sample.count=2",
    "sample.batch_size=2", "calibration.prompts=null", "correction.inflation=0",
)  # fmt: skip

ON_ALL = ("schedule.fallback=false", "correction.layers=consumers")


def configuration(name: str, golden: Path, folder: Path, *overrides: str) -> RunConfig:
    """The system's YAML with the checkpoint in place of the released one."""
    case, file = CHECKPOINTS[name]
    (folder / file).write_bytes(bz2.decompress((golden / case / f"{file}.bz2").read_bytes()))
    model = [f"model.path={folder / file}"]
    if (golden / case / "config.yaml").is_file():
        model.append(f"model.original_config={golden / case / 'config.yaml'}")
    prompts = folder / "prompts.txt"
    prompts.write_text("a fox\na dog\n")
    text = ("sampler.prompts=" + str(prompts),) if name == "stable_diffusion" else ()
    return load_config(repository_folder() / "configs" / f"{name}.yaml", [*model, *SMALL, *text, *overrides])


def complete(pipe: Any, folder: Path) -> Any:
    """Give a pipeline what its checkpoint does not hold, a tokenizer of letters or a first stage, and small images."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

    if hasattr(pipe, "unet"):
        pipe.unet.register_to_config(sample_size=16)
    if getattr(pipe, "tokenizer", 0) is None:
        letters = [chr(97 + i) for i in range(26)]
        words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
        (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
        pipe.register_modules(tokenizer=tokenizer)
    if getattr(pipe, "vae", 0) is None:
        blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
        pipe.register_modules(
            vae=AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, **blocks)
        )
    return pipe


@pytest.mark.slow
@pytest.mark.parametrize("method", ["paper", "best"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_all_six_stages_run_from_the_systems_own_yaml(
    name: str, method: str, golden_folder: Path, tmp_path: Path
) -> None:
    config = configuration(name, golden_folder, tmp_path, f"method={method}", *ON_ALL)
    pipe = complete(load_pipeline(config.model, "cpu"), tmp_path)
    context = Context.of(pipe, config)
    stages = Stages.at(context, tmp_path / "run", quiet=True)
    samples, _ = stages.samples()
    plan, _ = stages.plan()
    assert plan.schedule.num_steps == (7 if name == "stable_diffusion" else 6)
    assert len(plan.schedule.refresh_steps) == 2 and plan.quant is not None
    assert set(plan.correction.layers) == {c.name for c in context.adapter.consumers()}
    cached = set(range(plan.schedule.num_steps)) - set(plan.schedule.refresh_steps)
    assert set(plan.correction.cache) == cached
    assert samples.images().shape[:2] == (2, 3)
    assert plan.identity.guidance == ("cfg" if name in ("imagenet", "stable_diffusion", "dit") else "none")
    loaded = cq.enable(pipe, plan.save(tmp_path / "plan"))
    again = context.generator(sampling=True)([config.sample.seed, config.sample.seed + 1])
    assert again.isfinite().all() and torch.equal((again * 255).round().to(torch.uint8), samples.images())
    cq.disable(loaded)
