"""Whole runs on the integer backend against the simulated one, and what the library says about them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cachequant as cq
from cachequant.config import RunConfig, load_config, repository_folder
from cachequant.evaluation.paired import psnr
from cachequant.kernels.cpu import unavailable
from cachequant.models.architectures import random_denoiser
from cachequant.models.loading import Generator
from cachequant.models.prompts import read_prompts
from cachequant.pipeline.bench import MODES, format_bench, run_bench
from cachequant.pipeline.context import Context

Configure = Callable[..., RunConfig]
needs_int8 = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


def drawn(pipe: Any, config: RunConfig) -> torch.Tensor:
    """Images of a pipeline as it is: [n, C, H, W]."""
    first, file = config.sample.seed, config.sampler.prompts
    prompts = read_prompts(file)[: config.sample.count] if file else ()
    return Generator(pipe, config.sampler, prompts)(list(range(first, first + config.sample.count)))


@needs_int8
@pytest.mark.parametrize(
    ("name", "method", "least"),
    [
        ("fashion", "best", 33.0),
        ("fashion", "paper", 33.0),
        ("fashion", "naive", 33.0),
        ("fashion_ldm", "best", 33.0),
        ("fashion_dit", "best", 33.0),
        ("drawings_sd", "best", 18.0),  # guidance 5 blows every rounding up
    ],
)
def test_a_whole_run_on_a_miniature_is_the_simulated_one_within_its_own_error(
    tmp_path: Path, name: str, method: str, least: float
) -> None:
    """Integer and simulated images are nearer to each other, by 3 dB, than the simulated ones are to full precision."""
    small = ["sampler.steps=10", "cache.interval=5", "calibration.samples=4", "calibration.batch_size=4"]
    rows = ["calibration.refresh_inputs=4", "calibration.cached_inputs=4", "sample.count=4", "sample.batch_size=4"]
    path = repository_folder() / "configs" / f"{name}.yaml"
    config = load_config(path, [*small, *rows, f"method={method}"])
    pipe = cq.load_pipeline(config.model, "cpu")
    plan = cq.calibrate(pipe, config, tmp_path, quiet=True)
    reference = drawn(pipe, config)
    images = {}
    for backend in ("simulated", "cpu-int8"):
        cq.enable(pipe, plan, backend)
        images[backend] = drawn(pipe, config)
        cq.disable(pipe)
    apart = float(psnr(images["cpu-int8"], images["simulated"], 1.0).mean())
    error = float(psnr(images["simulated"], reference, 1.0).mean())
    assert apart > max(least, error + 3.0)


@needs_int8
def test_the_report_names_the_backend_and_every_layer_that_is_not_integer(
    pipe: Any, configure: Configure, tmp_path: Path
) -> None:
    plan = cq.calibrate(pipe, configure("method=paper"), tmp_path, quiet=True)
    assert plan.quant is not None
    cq.enable(pipe, plan)
    report = cq.report(pipe)
    assert "cpu-int8: integers on oneDNN" in report
    assert f"integers     {len(plan.quant.layers)} layers" in report
    attentions = {name.rsplit(".", 1)[0] for name in plan.quant.operands}
    assert all(f"simulated    {name}: attention operands are simulated" in report for name in attentions)
    with pytest.raises(cq.UserError, match=r"expected it to stay there: call cachequant\.disable"):
        pipe.unet.to("meta")
    cq.disable(pipe)


def test_a_backend_that_does_not_run_here_is_refused(
    pipe: Any, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cachequant.kernels.backend.unavailable", lambda: "this processor is too old")
    plan = cq.calibrate(pipe, configure(), tmp_path, quiet=True)
    with pytest.raises(cq.UserError, match=r"cpu-int8 does not run here \(this processor is too old\)"):
        cq.enable(pipe, plan, "cpu-int8")
    cq.enable(pipe, plan)
    assert "simulated: integers computed in floating point, slower than the model itself, because" in cq.report(pipe)


def test_the_bench_measures_what_it_says(pipe: Any, configure: Configure) -> None:
    context = Context.of(pipe, configure("cache.interval=3"))
    modes = tuple(mode for mode in MODES if mode not in ("compile", "openvino"))
    result = run_bench(context, modes, rounds=1)
    assert [row["mode"] for row in result["rows"]] == list(modes)
    for row in result["rows"]:
        assert set(row) == {"mode", "ms_per_step", "ms_full_step", "ms_cached_step"}
        assert row["ms_per_step"] > 0 and (row["ms_cached_step"] is None) == (row["mode"] in ("fp32", "int8"))
    assert result["evaluations"] == 6 and result["full_steps_with_cache"] == 2 and result["batch"] == 2
    assert "cachequant" in format_bench(result) and "_cachequant" not in vars(pipe.unet)
    with pytest.raises(cq.UserError, match="expected some of"):
        run_bench(context, ("fp64",))


def test_random_architectures() -> None:
    network = random_denoiser("ddpm-cifar10")
    assert sum(p.numel() for p in network.parameters()) == 35_746_307  # Ho et al.: 35.7 M
    with pytest.raises(cq.UserError, match="family is 'x', expected one of"):
        random_denoiser("x")
