"""Class-conditional latent diffusion as a diffusers pipeline: guidance, seeds, folders, wrong input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel, UNet2DModel, VQModel

from cachequant.config import SamplerConfig
from cachequant.errors import UserError
from cachequant.models.loading import Generator, load_pipeline
from cachequant.models.pipelines import ClassConditionalLDMPipeline, ClassEmbedder, PixelDDIMPipeline
from cachequant.models.schedulers import SpacedDDIMScheduler


@pytest.fixture
def pipe() -> ClassConditionalLDMPipeline:
    """Ten classes, 8×8 latents, 16×16 images."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6, attention_head_dim=4, norm_num_groups=4,
    ).eval()  # fmt: skip
    first_stage = VQModel(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=1.0,
    ).eval()  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    made = ClassConditionalLDMPipeline(first_stage, unet, ClassEmbedder(10, 6).eval(), scheduler)
    made.set_progress_bar_config(disable=True)
    return made


@torch.no_grad()
def test_one_step_is_the_guidance_formula_and_the_unconditional_half_comes_first(pipe: Any) -> None:
    x, calls = torch.randn(2, 3, 8, 8), []
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: calls.append((args, kwargs)) or forward(*args, **kwargs)
    got = pipe([3, 7], 1, guidance_scale=2.5, latents=x, output_type="latent").images
    ((doubled, timestep), kwargs), table = calls[0], pipe.class_embedder.embedding.weight
    assert torch.equal(doubled, torch.cat([x, x]))
    assert torch.equal(kwargs["encoder_hidden_states"][:, 0], table[[10, 10, 3, 7]])
    unconditional, conditional = (forward(x, timestep, table[rows][:, None]).sample for rows in ([10, 10], [3, 7]))
    noise = unconditional + 2.5 * (conditional - unconditional)
    expected = pipe.scheduler.step(noise, timestep, x).prev_sample
    assert torch.allclose(got, expected, atol=1e-5)
    assert pipe.do_classifier_free_guidance


@torch.no_grad()
def test_without_guidance_the_batch_is_not_doubled(pipe: Any) -> None:
    batches = []
    pipe.unet.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    pipe([1, 2, 3], 2, guidance_scale=1.0, output_type="latent")
    assert batches == [3, 3]
    assert not pipe.do_classifier_free_guidance


def test_an_image_depends_on_its_own_seed_and_class_only(pipe: Any) -> None:
    generate = Generator(pipe, SamplerConfig(steps=4, guidance_scale=1.5, labels=list(range(10))))
    together, alone = generate([11, 12, 13]), generate([12])
    assert together.shape == (3, 3, 16, 16)
    assert torch.allclose(together[1], alone[0], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_a_saved_folder_gives_the_same_images(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path, "cpu")
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded, ClassConditionalLDMPipeline)
    x = torch.randn(1, 3, 8, 8)
    expected, got = (p(4, 3, latents=x, output_type="pt").images for p in (pipe, loaded))
    assert torch.allclose(got, expected, atol=1e-5)


def test_classes_and_noise_that_do_not_fit_are_named(pipe: Any) -> None:
    with pytest.raises(UserError, match="class id 10, expected 0 to 9"):
        pipe([1, 10], 2)
    with pytest.raises(UserError, match="class id -1, expected 0 to 9"):
        pipe([-1], 2)
    with pytest.raises(UserError, match=r"latents are \[1, 3, 8, 8\], expected \[2, 3, 8, 8\]"):
        pipe([1, 2], 2, latents=torch.zeros(1, 3, 8, 8))


def test_a_pixel_pipeline_keeps_its_scheduler_through_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        attention_head_dim=8, norm_num_groups=4,
    ).eval()  # fmt: skip
    scheduler = SpacedDDIMScheduler(timestep_spacing="quadratic", clip_sample=False)
    assert type(DDIMPipeline(unet, scheduler).scheduler) is DDIMScheduler  # why there is a class of our own
    PixelDDIMPipeline(unet, scheduler).save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path, "cpu")
    assert isinstance(loaded.scheduler, SpacedDDIMScheduler)
    assert loaded.scheduler.config.timestep_spacing == "quadratic"
