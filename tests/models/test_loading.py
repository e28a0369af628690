"""Where pipelines come from: folders, hub ids, original checkpoints; each failure one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, LDMPipeline, UNet2DModel

from cachequant.cli import main
from cachequant.config import ModelConfig, SamplerConfig, load_config, repository_folder
from cachequant.errors import UserError
from cachequant.models.families import plms_scheduler
from cachequant.models.loading import Generator, load_pipeline
from cachequant.models.pipelines import PixelDDIMPipeline
from tests.models.original.miniature import DDPM, ddpm_weights, write


@pytest.fixture
def ancestral(tmp_path: Path) -> Path:
    """A folder as google/ddpm-cifar10-32 is saved: DDPM's own sampler, clipping."""
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), norm_num_groups=4,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler(beta_end=0.015)).save_pretrained(tmp_path / "ddpm")
    return tmp_path / "ddpm"


def test_a_family_gives_a_folder_its_sampler(ancestral: Path) -> None:
    plain = load_pipeline(ancestral, "cpu")
    assert type(plain) is DDPMPipeline
    pipe = load_pipeline(ModelConfig(str(ancestral), family="ddpm-cifar10"), "cpu")
    assert type(pipe) is PixelDDIMPipeline
    config = pipe.scheduler.config
    assert (config.timestep_spacing, config.clip_sample, config.beta_end) == ("quadratic", False, 0.015)
    assert Generator(pipe, SamplerConfig(steps=3))([1, 2]).shape == (2, 1, 8, 8)


def test_a_folder_of_another_family_is_refused(ancestral: Path) -> None:
    with pytest.raises(UserError, match=r"holds a DDPMPipeline, expected DiTPipeline for model\.family dit-xl2"):
        load_pipeline(ModelConfig(str(ancestral), family="dit-xl2"), "cpu")


@pytest.mark.parametrize("command", ["run", "calibrate"])
def test_a_checkpoint_in_a_configuration_is_converted_on_the_way(tmp_path: Path, command: str) -> None:
    path, original = write(tmp_path, [ddpm_weights(), {}, 1, 2, ddpm_weights(1)], DDPM)
    yaml = tmp_path / "mine.yaml"
    yaml.write_text(
        f"model: {{name: mine, path: {path}, family: ddpm-cifar10, original_config: {original}, weights: raw}}\n"
        "sampler: {steps: 4}\ncache: {interval: 2}\ncalibration: {samples: 2, batch_size: 2, refresh_inputs: 2, "
        "cached_inputs: 2}\nsample: {count: 2, batch_size: 2}\n"
    )
    pipe = load_pipeline(load_config(yaml).model, "cpu")
    assert torch.equal(pipe.unet.conv_in.weight, ddpm_weights()["conv_in.weight"])
    extra = {"run": ["--out", str(tmp_path / "runs")], "calibrate": [str(tmp_path / "plan")]}[command]
    assert main([command, str(yaml), *extra, "--device", "cpu"]) == 0


def one_line(capfd: pytest.CaptureFixture[str], *overrides: str) -> str:
    """Standard error of a run that must fail."""
    settings = [argument for value in overrides for argument in ("--set", value)]
    assert main(["run", str(repository_folder() / "configs" / "fashion.yaml"), "--device", "cpu", *settings]) == 2
    shown = capfd.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    return shown


def test_what_cannot_be_had_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shown = one_line(capfd, "model.path=google/no-such-ddpm")
    assert "run `hf download google/no-such-ddpm` where there is a network" in shown
    assert "no such folder or file" in one_line(capfd, f"model.path={tmp_path}/nothing")
    path, _ = write(tmp_path, ddpm_weights(), DDPM)
    assert "expected its model.family: one of ddpm-cifar10" in one_line(capfd, f"model.path={path}")
    wrong = one_line(capfd, f"model.path={path}", "model.family=sd-v1")
    assert "is a ddpm-cifar10 checkpoint, expected sd-v1" in wrong
    assert "model.family is 'ddpm', expected one of" in one_line(capfd, "model.family=ddpm")
    assert "model.path is empty" in one_line(capfd, "model.path=''")
    (tmp_path / "empty").mkdir()
    assert "expected a diffusers folder with model_index.json" in one_line(capfd, f"model.path={tmp_path}/empty")


def test_loading_says_nothing(ancestral: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also where diffusers would: a first stage that its LDM pipeline does not expect."""
    from diffusers import AutoencoderKL, DDIMScheduler

    unet = DDPMPipeline.from_pretrained(ancestral, low_cpu_mem_usage=False).unet
    stage = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=1)
    LDMPipeline(stage, unet, DDIMScheduler()).save_pretrained(ancestral.parent / "ldm")
    capfd.readouterr()
    load_pipeline(ModelConfig(str(ancestral.parent / "ldm"), family="ldm8-church"), "cpu")
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_stable_diffusion_comes_without_its_safety_checker(tmp_path: Path) -> None:
    """Folders name one; it is neither loaded nor missed."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8,), cross_attention_dim=8, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=2,
    )  # fmt: skip
    settings = {"vocab_size": 517, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text = CLIPTextModel(CLIPTextConfig(**settings, num_attention_heads=2))
    stage = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    pipe = StableDiffusionPipeline(stage, text, None, unet, plms_scheduler(), None, None, requires_safety_checker=False)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["requires_safety_checker"] = True
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = load_pipeline(ModelConfig(str(tmp_path), family="sd-v1"), "cpu")
    assert loaded.safety_checker is None
    assert loaded.tokenizer is None
    with pytest.raises(UserError, match="without its tokenizer"):
        Generator(loaded, SamplerConfig(), ("a fox",))([0])
