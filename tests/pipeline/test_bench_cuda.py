"""The GPU bench's logic on the CPU: graphs are replaced by plain calls, events by the host's clock."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache as once
from typing import Any

import pytest
import torch
from torch import nn

import cachequant as cq
from cachequant.cli import main
from cachequant.config import RunConfig
from cachequant.kernels.backend import CUDA_INT8, SIMULATED, Backend
from cachequant.models.architectures import random_denoiser
from cachequant.pipeline import bench_modes
from cachequant.pipeline.bench_cuda import device_plan, format_ratios, run_bench_cuda
from cachequant.pipeline.bench_modes import MODES, Setup
from cachequant.pipeline.context import Context
from cachequant.pipeline.memory import held_bytes
from cachequant.types import QuantState

Configure = Callable[..., RunConfig]
OWN = tuple(name for name, mode in MODES.items() if mode.package is None)


class HostClock:
    def mark(self) -> float:
        return time.perf_counter()

    def between(self, begin: float, end: float) -> float:
        return 1e3 * (end - begin)

    def wait(self) -> None:
        pass


class Recorder:
    """Replays by running the body again."""

    made = 0

    def __call__(self, body: Any) -> Any:
        Recorder.made += 1
        return body


def host_setup(context: Context) -> Setup:
    """The modes as they are made for a GPU, on the operators' exact form."""
    return Setup(
        context, once(lambda: device_plan(context)), torch.float32, Recorder, lambda function: function,
        lambda _: Backend(CUDA_INT8, "exact form"),
    )  # fmt: skip


@pytest.fixture
def text(configure: Configure) -> Context:
    """Stable Diffusion's pipeline, with text encoder and decoder, around tiny networks."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from cachequant.models.families import plms_scheduler
    from cachequant.models.random_text import RandomTextPipeline

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=24,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=16,
    ).eval()  # fmt: skip
    encoder = CLIPTextModel(
        CLIPTextConfig(vocab_size=99, hidden_size=24, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    pipe = RandomTextPipeline.around(unet, plms_scheduler(), vae, encoder)
    config = configure(
        "sampler.guidance_scale=7.5",
        "cache.branch=0",
        "cache.interval=3",
        "sample.batch_size=1",
        "quant.weight_symmetric=true",
    )
    return Context.of(pipe, config)


def test_every_mode_of_ours_runs_whole_loops(text: Context) -> None:
    before = {name: p.clone() for name, p in text.adapter.denoiser.named_parameters()}
    Recorder.made, reports = 0, []
    result = run_bench_cuda(
        text, OWN, 2, report=lambda r: reports.append(len(r["rows"])), setup=host_setup(text), clock=HostClock()
    )
    rows = {row["mode"]: row for row in result["rows"]}
    assert [row.get("error") for row in result["rows"]] == [None] * len(OWN) and reports == list(range(1, len(OWN) + 1))
    assert result["evaluations"] == 7 and result["batch"] == 1  # PLMS takes one more
    for name, row in rows.items():
        cached = name in ("fp16-compile-cache", "cachequant")
        assert (row["full_steps"], row["cached_steps"]) == ((3, 4) if cached else (7, 0))
        assert (row["ms_cached_step"] is not None) is cached
        assert row["seconds_per_loop"] >= 1e-3 * 6 * row["ms_full_step"] * 0.1 and row["images_per_second"] > 0
        assert row["ms_per_step"] == pytest.approx(1e3 * row["seconds_per_loop"] / 7)
        exact = name not in ("int8", "cachequant")
        assert (row["distance_of_first_output"] < 1e-5) is exact and row["distance_of_first_output"] < 0.2
        assert row["graphs"] is (name not in ("fp32", "fp32-tf32", "fp16")) and row["simulated"] == {}
    made = 3 + 2 + 1 + 1  # graph, compile, int8: full; compile-cache, cachequant: full and cached
    assert Recorder.made == made + 2  # the prompt's keys of int8 and cachequant
    after = dict(text.adapter.denoiser.named_parameters())
    assert list(after) == list(before) and all(torch.equal(after[name], p) for name, p in before.items())
    assert not [m for m in text.adapter.denoiser.modules() if m._forward_pre_hooks or m._forward_hooks]
    assert "set_timesteps" not in vars(text.pipe.scheduler)
    assert "cachequant" in format_ratios(result) and json.dumps(result)


def test_a_simulated_layer_keeps_the_steps_from_being_graphs_and_is_told(
    text: Context, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = host_setup(text)
    plan = setup.plan()
    assert plan.quant is not None
    name, layer = next(iter(plan.quant.layers.items()))
    tables = tuple(replace(table, format="fp8", zero_point=torch.zeros_like(table.scale)) for table in layer.inputs)
    layers = {**plan.quant.layers, name: replace(layer, inputs=tables)}
    setup.plan = lambda: replace(plan, quant=QuantState(layers, plan.quant.operands))
    Recorder.made = 0
    (row,) = run_bench_cuda(text, ("cachequant",), 1, setup=setup, clock=HostClock())["rows"]
    assert Recorder.made == 0 and row["graphs"] is False
    assert row["simulated"] == {name: "fp8 is simulated only, integer backends run int8 and int4"}
    assert f"NO GRAPHS, {name} simulated: fp8 is simulated only" in capsys.readouterr().out


def test_a_backend_that_simulates_everything_names_every_layer(text: Context) -> None:
    setup = host_setup(text)
    setup.backend = lambda _: Backend(SIMULATED, "asked for")
    (row,) = run_bench_cuda(text, ("int8",), 1, setup=setup, clock=HostClock())["rows"]
    quant = setup.plan().quant
    assert quant is not None and row["graphs"] is False and set(row["simulated"]) >= set(quant.layers)


def test_the_whole_pipeline_takes_longer_than_its_loop(text: Context) -> None:
    result = run_bench_cuda(text, ("fp16", "cachequant"), 1, whole=True, setup=host_setup(text), clock=HostClock())
    for row in result["rows"]:
        assert row["seconds_per_pipeline"] > row["seconds_per_loop"] > 0
        assert row["images_per_second"] == pytest.approx(1 / row["seconds_per_pipeline"])


def test_a_mode_that_fails_is_a_row_and_one_that_cannot_run_a_line(
    text: Context, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    setup = host_setup(text)

    def refuse(_: Context) -> Backend:
        raise cq.UserError("no such card")

    setup.backend = refuse
    monkeypatch.setattr(bench_modes, "find_spec", lambda name: None)
    result = run_bench_cuda(text, ("int8", "deepcache", "fp16"), 1, setup=setup, clock=HostClock())
    assert [row["mode"] for row in result["rows"]] == ["int8", "fp16"]
    assert result["rows"][0]["error"] == "UserError: no such card" and "error" not in result["rows"][1]
    assert "deepcache: skipped, the package DeepCache is not installed" in capsys.readouterr().out
    monkeypatch.setattr(bench_modes, "find_spec", lambda name: object())
    run_bench_cuda(text, ("cache-dit",), 1, setup=setup, clock=HostClock())
    assert "cache-dit: skipped, UNet2DConditionModel is of another kind" in capsys.readouterr().out
    with pytest.raises(cq.UserError, match="expected some of"):
        run_bench_cuda(text, ("fp64",), 1, setup=setup, clock=HostClock())


def test_a_pipeline_without_a_decoder_is_not_timed_whole(pipe: Any, configure: Configure) -> None:
    context = Context.of(pipe, configure())
    with pytest.raises(cq.UserError, match="no first stage"):
        run_bench_cuda(context, ("fp16",), 1, whole=True, setup=host_setup(context), clock=HostClock())


def test_held_bytes_count_shared_memory_once_and_hidden_layers_too() -> None:
    layer = nn.Linear(8, 4, bias=False)
    layer.hidden = (nn.Linear(3, 2, bias=False),)  # type: ignore[assignment]
    layer.part = layer.weight.detach()[:2]  # type: ignore[assignment]
    cpu = torch.device("cpu")
    assert held_bytes([layer, {"again": layer.weight}], cpu) == 4 * (8 * 4 + 3 * 2)
    assert held_bytes([layer], torch.device("cuda")) == 0


def test_what_a_deployment_keeps_beside_its_integers_shows(text: Context) -> None:
    """On a CPU the replaced layers are on the device that computes; on a GPU they are not, and a quarter is left."""
    fp32, int8 = run_bench_cuda(text, ("fp32", "int8"), 1, setup=host_setup(text), clock=HostClock())["rows"]
    assert fp32["weight_share_of_fp32"] == pytest.approx(1, abs=0.01)
    assert int8["weight_share_of_fp32"] > 1.25


def test_no_gpu_is_one_line(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    status = main(["bench", "configs/cifar10.yaml", "--random-weights", "--device", "cuda"])
    assert status == 2 and capsys.readouterr().err == (
        "error: device is 'cuda', expected auto or one of cpu: choose one that is here\n"
    )


def test_random_weights_leave_other_random_numbers_alone() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (random_denoiser("ddpm-cifar10", seed).conv_in.weight for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("family", "kind", "parameters"),  # of the whole pipeline's denoiser, in millions
    [
        ("sd-v1", "UNet2DConditionModel", 859.5),
        ("ldm4-imagenet", "UNet2DConditionModel", 400.9),
        ("dit-xl2", "OriginalDiT", 749.8),
    ],
)
def test_the_papers_sizes(family: str, kind: str, parameters: float) -> None:
    """Rombach et al., CVPR 2022: 860 M and 400 M; DiT-XL/2 has 675 M (Peebles and Xie), diffusers copies embeddings."""
    with torch.device("meta"):
        network = random_denoiser(family, device="meta")
    assert type(network).__name__ == kind
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(parameters, abs=0.05)
