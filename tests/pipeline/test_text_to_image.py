"""Stable Diffusion's pipeline at toy size: text, classifier-free guidance as one doubled batch, PLMS."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cachequant as cq
from cachequant.cli import main
from cachequant.config import RunConfig, repository_folder
from cachequant.pipeline.calibrate import gather
from cachequant.pipeline.context import Context
from cachequant.pipeline.stages import Stages
from cachequant.pipeline.step import cache_of
from cachequant.quant.deploy import deploy_on_device


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Random weights, a tokenizer that knows the alphabet."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [chr(97 + i) for i in range(26)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=54, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    scheduler = PNDMScheduler(
        skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        set_alpha_to_one=False,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=CLIPTextModel(text).eval(), unet=unet.eval(), scheduler=scheduler,
        tokenizer=CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def config(configure: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n\na dog\n")

    def make(*overrides: str) -> RunConfig:
        text = (f"sampler.prompts={prompts}", "sampler.guidance_scale=7.5", "sampler.steps=8", "cache.interval=4")
        return configure(*text, *overrides)

    return make


def draw(pipe: Any, guidance: float = 7.5, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    made = pipe(
        ["a cat"] * count, num_inference_steps=8, guidance_scale=guidance, generator=generator, output_type="np"
    )
    return torch.from_numpy(made.images)


@pytest.mark.parametrize("method", ["paper", "best"])
def test_plan_fits_guidance_and_the_extra_evaluation_of_plms(
    stable_diffusion: Any, config: Callable[..., RunConfig], tmp_path: Path, method: str
) -> None:
    pipe, reference = stable_diffusion, draw(stable_diffusion)
    plan = cq.calibrate(pipe, config(f"method={method}"), tmp_path / "run", quiet=True)
    assert len(plan.timesteps) == plan.schedule.num_steps == 9
    assert len(plan.schedule.refresh_steps) == 2  # ceil(8 / 4): counted from the sampler's steps
    assert plan.identity.guidance == "cfg"
    cq.enable(pipe, plan)
    accelerated = draw(pipe)
    assert not torch.equal(accelerated, reference)
    draw(pipe, count=1)
    assert torch.equal(draw(pipe), accelerated)
    with pytest.raises(cq.UserError, match="this run has guidance none, the plan was made for cfg"):
        draw(pipe, guidance=1.0)
    assert torch.equal(draw(pipe), accelerated)
    cq.disable(pipe)
    assert torch.equal(draw(pipe), reference)


@pytest.mark.parametrize("method", ["paper", "best"])
def test_a_calibrated_plan_lets_keys_and_values_be_computed_once_a_prompt(
    stable_diffusion: Any, config: Callable[..., RunConfig], tmp_path: Path, method: str
) -> None:
    """What the prompt alone determines has the same grid at every step, so that the GPU holds it for all of them."""
    context = Context.of(stable_diffusion, config(f"method={method}"))
    plan, _ = Stages.at(context, tmp_path / "run", quiet=True).plan()
    network, cache = context.adapter.denoiser, cache_of(plan, context.adapter)
    crossed = [m for m in network.modules() if getattr(m, "is_cross_attention", False)]
    assert plan.quant is not None and len(crossed) == 4
    made = deploy_on_device(network, plan.quant, cache, plan.correction, torch.device("cpu"))
    assert made.context is not None and {id(m) for m in made.context.attentions} == {id(m) for m in crossed}
    made.remove()


@pytest.mark.parametrize("kind", ["uniform", "dps"])
def test_with_an_interval_of_one_nothing_is_cached(
    stable_diffusion: Any, config: Callable[..., RunConfig], tmp_path: Path, kind: str
) -> None:
    """PLMS's extra evaluation is in full too, though the interval gives eight groups."""
    settings = ("method=paper", "cache.interval=1", f"schedule.kind={kind}")
    stages = Stages.at(Context.of(stable_diffusion, config(*settings)), tmp_path / "run", quiet=True)
    assert stages.schedule()[0].refresh_steps == tuple(range(9))


def test_the_same_conditioning_is_saved_once(
    stable_diffusion: Any, config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    context = Context.of(stable_diffusion, config("method=paper"))
    made, _ = Stages.at(context, tmp_path / "run", quiet=True).calibration()
    loaded, _ = Stages.at(context, tmp_path / "run", quiet=True).calibration()
    for a, b in zip(made.inputs, loaded.inputs, strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.timestep, b.timestep) and set(a.kwargs) == set(b.kwargs)
        assert all(torch.equal(a.kwargs[name], b.kwargs[name]) for name in a.kwargs)
    assert "encoder_hidden_states" in loaded.inputs[3].kwargs
    from safetensors.torch import load_file

    stored = load_file(next((tmp_path / "run").glob("1_calibrate-*/calibration.safetensors")))
    assert [name for name in stored if "encoder_hidden_states" in name] == ["inputs.0.kwargs.encoder_hidden_states"]


def test_kept_rows_span_both_guidance_halves(stable_diffusion: Any, config: Callable[..., RunConfig]) -> None:
    context = Context.of(
        stable_diffusion, config("calibration.samples=2", "calibration.refresh_inputs=2", "calibration.cached_inputs=2")
    )
    contexts = gather(context).inputs[0].kwargs["encoder_hidden_states"]
    assert contexts.shape[0] == 2 and not torch.equal(contexts[0], contexts[1])


def test_a_missing_or_empty_prompt_file_is_one_line(
    stable_diffusion: Any, config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    with pytest.raises(cq.UserError, match="needs text"):
        cq.calibrate(stable_diffusion, config("sampler.prompts=null"), tmp_path, quiet=True)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(cq.UserError, match="is empty"):
        cq.calibrate(stable_diffusion, config(f"sampler.prompts={tmp_path}/empty.txt"), tmp_path, quiet=True)
    with pytest.raises(cq.UserError, match="no prompt file"):
        cq.calibrate(stable_diffusion, config("sampler.prompts=absent.txt"), tmp_path, quiet=True)


def test_no_guidance_scale_means_no_guidance(
    stable_diffusion: Any, config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """The pipeline's own default (7.5) must not slip in."""
    pipe, reference = stable_diffusion, draw(stable_diffusion, guidance=1.0)
    plan = cq.calibrate(pipe, config("sampler.guidance_scale=null", "method=naive"), tmp_path / "run", quiet=True)
    assert plan.identity.guidance == "none"
    cq.enable(pipe, plan)
    assert draw(pipe, guidance=1.0).isfinite().all()
    with pytest.raises(cq.UserError, match="this run has guidance cfg"):
        draw(pipe, guidance=7.5)
    cq.disable(pipe)
    assert torch.equal(draw(pipe, guidance=1.0), reference)


def test_calibration_has_its_own_prompts(
    stable_diffusion: Any, config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.txt").write_text("a b c\n")
    context = Context.of(stable_diffusion, config(f"calibration.prompts={tmp_path}/own.txt"))
    assert context.generator().prompts == ("a b c",)
    assert context.generator(sampling=True).prompts == ("a fox", "a dog")
    seen: list[str] = []
    encode = type(stable_diffusion).encode_prompt

    def watched(self: Any, prompt: list[str], *args: Any, **kwargs: Any) -> Any:
        seen.extend(prompt)
        return encode(self, prompt, *args, **kwargs)

    monkeypatch.setattr(type(stable_diffusion), "encode_prompt", watched)
    Stages.at(context, tmp_path / "run", quiet=True).plan()
    assert set(seen) == {"a b c"}
    Stages.at(context, tmp_path / "run", quiet=True).samples()
    assert set(seen) == {"a b c", "a fox", "a dog"}
    shared = Context.of(stable_diffusion, config(f"calibration.prompts={tmp_path}/prompts.txt"))
    with pytest.raises(cq.UserError, match="share 2 prompts"):
        shared.generator(sampling=True)


def test_a_prompt_list_that_cannot_be_had_is_told_before_the_calibration(
    stable_diffusion: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stable_diffusion.save_pretrained(tmp_path / "model")
    (tmp_path / "empty.txt").write_text("")
    run = ["run", str(repository_folder() / "configs" / "stable_diffusion.yaml"), "--out", str(tmp_path / "run")]
    for name, message in (("absent.json", "no prompt file"), ("empty.txt", "is empty")):
        change = ["--set", f"model.path={tmp_path / 'model'}", "--set", f"sampler.prompts={tmp_path / name}"]
        assert main([*run, *change, "--device", "cpu"]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "run").exists()
