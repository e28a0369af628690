"""Converted checkpoints give what the original code gave: one evaluation, a cached one, both stages, whole trajectories."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.models import adapter
from cachequant.models.original.convert import Conversion
from cachequant.pipeline.hook import DenoiserHook
from cachequant.pipeline.step import accelerated_step
from cachequant.types import AffineMap, Correction, Schedule
from tests.models.original_checkpoints import GUIDED, Golden, error

ONCE, RUN = 5e-5, 2e-4
"""Tolerances relative to the largest value: a single evaluation, a trajectory."""

U_NETS = [
    ("ddpm-cifar10", "", "auto", ""),
    ("ddpm-cifar10", "ema_model-790000.ckpt", "auto", "ema_"),
    ("ddpm-cifar10", "ckpt.pth", "raw", ""),
    ("ddpm-cifar10", "ckpt.pth", "ema", "ema_"),
    ("ldm4-bedroom", "", "raw", ""),
    ("ldm4-bedroom", "", "auto", "ema_"),
    ("ldm8-church", "", "raw", ""),
    ("ldm8-church", "", "ema", "ema_"),
    ("ldm4-imagenet", "", "auto", ""),
    ("sd-v1", "", "raw", ""),
]
LATENT = ["ldm4-bedroom", "ldm8-church", "ldm4-imagenet", "sd-v1"]

Make = Callable[..., Conversion]


@pytest.fixture(scope="module")
def made(golden: Golden) -> Make:
    """Conversions, each made once."""
    kept: dict[tuple[str, str, str], Conversion] = {}

    def make(family: str, name: str = "", weights: str = "raw") -> Conversion:
        if (family, name, weights) not in kept:
            kept[family, name, weights] = golden.convert(family, weights, name)
        return kept[family, name, weights]

    return make


@torch.no_grad()
@pytest.mark.parametrize(("family", "name", "weights", "prefix"), U_NETS)
def test_full_and_cached_steps(golden: Golden, made: Make, family: str, name: str, weights: str, prefix: str) -> None:
    data, structure = golden.tensors(family), adapter(made(family, name, weights).pipe)
    context = data.get("context")
    eps, site = structure.full(data["x"], data["t"], context)
    assert error(eps, data[f"{prefix}eps"]) <= ONCE
    assert error(site, data[f"{prefix}cache_site"]) <= ONCE
    later = (data["x2"], data["t2"], context)
    assert error(structure.cached(*later, site), data[f"{prefix}eps2_cached"]) <= ONCE
    if f"{prefix}eps2_full" in data:
        eps, site2 = structure.full(*later)
        assert error(eps, data[f"{prefix}eps2_full"]) <= ONCE
        assert error(site2, data[f"{prefix}cache_site2"]) <= ONCE
        corrected = structure.cached(*later, site, AffineMap(data["dec_a"], data["dec_b"]))
        assert error(corrected, data[f"{prefix}eps2_cached_dec"]) <= ONCE


@torch.no_grad()
@pytest.mark.parametrize("family", LATENT)
def test_first_stage(golden: Golden, made: Make, family: str) -> None:
    data, pipe = golden.tensors(family), made(family).pipe
    stage = pipe.vae if family == "sd-v1" else pipe.vqvae
    assert stage.config.scaling_factor == pytest.approx(golden.case(family)["scale_factor"], rel=1e-7)
    latents = data["z"] / stage.config.scaling_factor
    assert error(stage.decode(latents).sample, data["image"]) <= ONCE
    encoded = stage.encode(data["enc_image"])
    if "vq_indices" in data:
        assert error(encoded.latents, data["enc_prequant"]) <= ONCE
        indices = stage.quantize(latents)[2][2]
        assert torch.equal(indices.reshape(data["vq_indices"].shape), data["vq_indices"])
    else:
        assert error(encoded.latent_dist.parameters, data["enc_moments"]) <= ONCE


@torch.no_grad()
def test_conditioners(golden: Golden, made: Make) -> None:
    data = golden.tensors("ldm4-imagenet")
    context = made("ldm4-imagenet").pipe.class_embedder(data["class_labels"])
    assert error(context, data["context"]) <= ONCE
    data, encoder = golden.tensors("sd-v1"), made("sd-v1").pipe.text_encoder
    assert error(encoder(data["clip_input_ids"])[0], data["context"]) <= ONCE
    assert error(encoder(data["clip_uncond_ids"])[0], data["uncond_context"]) <= ONCE


@pytest.fixture
def noise_is(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor], None]:
    """Make the unconditional pipelines, which take no latents, start from given noise."""
    from diffusers.pipelines.ddim import pipeline_ddim
    from diffusers.pipelines.deprecated.latent_diffusion_uncond import pipeline_latent_diffusion_uncond

    def replace(noise: Tensor) -> None:
        for module in (pipeline_ddim, pipeline_latent_diffusion_uncond):
            monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise.clone())

    return replace


def arguments(family: str, data: dict[str, Tensor], case: dict[str, Any]) -> dict[str, Any]:
    """How the pipeline is called for the reference trajectory."""
    common = {"num_inference_steps": 10}
    if family == "sd-v1":
        uncond = data["uncond_context"].expand(2, -1, -1)
        embeds = {"prompt_embeds": data["context"], "negative_prompt_embeds": uncond}
        size = {"height": 128, "width": 128, "latents": data["traj_xT"], "output_type": "latent"}
        return {**common, **embeds, **size, "guidance_scale": case["cfg_scale"]}
    if family == "ldm4-imagenet":
        labels = data["traj_class_labels"].tolist()
        return {**common, "class_labels": labels, "latents": data["traj_xT"], "guidance_scale": case["cfg_scale"]}
    return {**common, "batch_size": 2}


def final_sample(pipe: Any, call: dict[str, Any]) -> Tensor:
    """What the pipeline's scheduler returned last: the trajectory's end before decoding and clamping."""
    ends: list[Tensor] = []

    def step(*args: Any, **kwargs: Any) -> Any:
        result = type(pipe.scheduler).step(pipe.scheduler, *args, **kwargs)
        ends.append(result[0])
        return result

    pipe.scheduler.step = step
    try:
        pipe(**call)
    finally:
        del pipe.scheduler.step
    return ends[-1]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["full", "cached"])
@pytest.mark.parametrize(
    ("family", "name", "weights", "prefix"),
    [
        ("ddpm-cifar10", "", "auto", ""),
        ("ddpm-cifar10", "ema_model-790000.ckpt", "auto", "ema_"),
        ("ldm4-bedroom", "", "raw", ""),
        ("ldm8-church", "", "raw", ""),
        ("ldm4-imagenet", "", "auto", ""),
        ("sd-v1", "", "raw", ""),
    ],
)
def test_trajectories_in_the_pipelines_own_loop(
    golden: Golden, made: Make, noise_is: Any, family: str, name: str, weights: str, prefix: str, kind: str
) -> None:
    data, case = golden.tensors(family), golden.case(family)["trajectory"]
    pipe = made(family, name, weights).pipe
    noise_is(data["traj_xT"])
    evaluations = data["traj_timesteps"].tolist()
    steps = case["recompute_steps_cached"] if kind == "cached" else range(len(evaluations))
    cache = FeatureCache(Schedule(tuple(steps), len(evaluations), 1))
    structure = adapter(pipe)
    step = accelerated_step(structure, cache, Correction({}))
    with DenoiserHook(pipe, structure, cache, step, tuple(int(t) for t in evaluations)):
        final = final_sample(pipe, arguments(family, data, case))
    assert error(final, data[f"{prefix}traj_final_{kind}"]) <= RUN
    assert cache.full_steps == len(steps)
    assert (family in GUIDED) == (case.get("cfg_scale") is not None)


DIT = [("", "auto", ""), ("0400000.pt", "auto", ""), ("0400000.pt", "raw", "raw_")]


@torch.no_grad()
@pytest.mark.parametrize(("name", "weights", "prefix"), DIT)
def test_dit_and_its_guided_forward(golden: Golden, made: Make, name: str, weights: str, prefix: str) -> None:
    data, network = golden.tensors("dit-xl2"), made("dit-xl2", name, weights).pipe.transformer
    for x, t, expected in (("x", "t", "out"), ("x2", "t2", "out2_full")):
        out = network(data[x], timestep=data[t], class_labels=data["y"]).sample
        assert error(out, data[f"{prefix}{expected}"]) <= ONCE
    guided = guided_as_original(network, data["x"][:1], data["t"][:1], torch.tensor([207]), 4.0)
    assert error(guided[:1], data[f"{prefix}out_cfg4"][:1]) <= ONCE


def guided_as_original(network: Any, x: Tensor, t: Tensor, labels: Tensor, scale: float) -> Tensor:
    """The original's guided forward [B, 2·C, H, W]: conditional half first, only the first three channels are guided."""
    both = torch.cat([labels, torch.full_like(labels, 1000)])
    out = network(torch.cat([x, x]), timestep=torch.cat([t, t]), class_labels=both).sample
    conditional, unconditional = out.chunk(2)
    guided = unconditional + scale * (conditional - unconditional)
    return torch.cat([guided[:, :3], conditional[:, 3:]], 1)


@torch.no_grad()
def test_dit_trajectory(golden: Golden, made: Make) -> None:
    """Respaced DDIM on the guided noise; the originals guide three of four channels, diffusers' own pipeline all."""
    data, pipe = golden.tensors("dit-xl2"), made("dit-xl2").pipe
    pipe.scheduler.set_timesteps(10)
    x = data["traj_xT"]
    for t in pipe.scheduler.timesteps:
        noise = guided_as_original(pipe.transformer, x, t.expand(len(x)), data["traj_y"], 1.5)[:, :4]
        x = pipe.scheduler.step(noise, t, x).prev_sample
    assert error(x, data["ddim10_cfg1p5_final"]) <= RUN


@pytest.mark.parametrize("steps", [10, 50, 250])
def test_dit_timesteps(golden: Golden, made: Make, steps: int) -> None:
    scheduler = made("dit-xl2").pipe.scheduler
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.flip(0).tolist() == golden.tensors("dit-xl2")[f"spaced_timesteps{steps}"].tolist()


@torch.no_grad()
def test_dit_pipeline_runs_its_own_loop(golden: Golden, made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With guidance off both guide alike, so diffusers' loop must end where DDIM over the converted model ends."""
    pipe, latents = made("dit-xl2").pipe, []

    class Stage:
        """Keeps what it is asked to decode."""

        config = SimpleNamespace(scaling_factor=1.0)

        def decode(self, x: Tensor) -> Any:
            latents.append(x)
            return SimpleNamespace(sample=torch.zeros(2, 3, 8, 8))

    monkeypatch.setattr(pipe, "vae", Stage())
    pipe([3, 5], guidance_scale=1.0, generator=torch.Generator().manual_seed(0), num_inference_steps=10)
    x, labels = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 5])
    for t in pipe.scheduler.timesteps:
        noise = pipe.transformer(x, timestep=t.expand(2), class_labels=labels).sample[:, :4]
        x = pipe.scheduler.step(noise, t, x).prev_sample
    assert error(latents[0], x) <= RUN
