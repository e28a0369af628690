"""Peers: masks and choices by count; through their own packages, where installed, equal to what they are by definition."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor

from cachequant.config import CacheConfig, RunConfig, load_config, repository_folder
from cachequant.errors import UserError
from cachequant.evaluation import peers as module
from cachequant.evaluation.peers import (
    UNTOUCHED,
    Budget,
    Setting,
    Trial,
    deepcache_choices,
    draw_peer,
    dynamic_choices,
    masked_choices,
    package_branch,
    peers_of,
    require_peer,
    step_masks,
)
from cachequant.models.loading import load_pipeline
from cachequant.models.networks import OriginalDiT
from cachequant.pipeline import bench_peers
from cachequant.pipeline.context import Context
from cachequant.pipeline.first_calls import first_call
from cachequant.pipeline.sample import draw
from cachequant.pipeline.stages import Stages

STEPS = 8
SMALL = [f"sampler.steps={STEPS}", "cache.interval=4", "calibration.samples=2", "calibration.batch_size=2"]


def context(name: str, *overrides: str) -> Context:
    config: RunConfig = load_config(repository_folder() / "configs" / f"{name}.yaml", [*SMALL, *overrides])
    return Context.of(load_pipeline(config.model, "cpu"), config)


def naive(at: Context, folder: Path) -> Tensor:
    """Our own reuse of the feature as it is, without quantisation."""
    plan, _ = Stages.at(at, folder, quiet=True).plan()
    return draw(at, plan, [5, 6], "naive").images


@pytest.mark.parametrize(("steps", "full"), [(50, 10), (50, 5), (51, 10), (12, 4), (8, 2), (7, 7), (5, 1)])
def test_masks_have_the_full_steps_that_were_asked_for(steps: int, full: int) -> None:
    masks = step_masks(steps, full)
    assert len({tuple(mask) for mask in masks}) >= 1
    for mask in masks:
        assert len(mask) == steps and sum(mask) == full and mask[0] == 1 and set(mask) <= {0, 1}
    assert [i for i, on in enumerate(masks[0]) if on] == [i * steps // full for i in range(full)]


def test_choices_run_no_more_of_the_network_than_we_do() -> None:
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=4,
    )  # fmt: skip
    pipe = DDIMPipeline(unet, DDIMScheduler())
    assert peers_of(pipe) == ("deepcache",)
    branches = [
        [choice.options["cache_branch_id"] for choice in deepcache_choices(pipe, Budget(8, 2, CacheConfig(4, branch)))]
        for branch in (0, 1, 2)
    ]
    assert branches == [[0], [0, 1], [0, 1, 3]]  # two resnets a block, in steps of three


def test_a_branch_is_the_position_that_the_package_leaves_the_network_at() -> None:
    """By its own arithmetic: block id // 3 and layer id % 3, both counted from the end."""
    unet = SimpleNamespace(up_blocks=[SimpleNamespace(resnets=[None] * n) for n in (3, 2, 1)])
    found = [divmod(package_branch(unet, branch), 3) for branch in range(6)]
    assert found == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    large = SimpleNamespace(up_blocks=[SimpleNamespace(resnets=[None] * 4)] * 2)
    assert package_branch(large, 4) == 3
    for beyond in (3, 7, 8):
        with pytest.raises(UserError, match=rf"cache.branch is {beyond}, expected .* DeepCache"):
            package_branch(large, beyond)


@pytest.mark.parametrize(("front", "back"), [(0, 11), (8, 1), (11, 0), (1, 5)])
def test_full_steps_are_counted_where_cached_ones_leave_blocks_out(
    front: int, back: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that runs the blocks before and behind the cached ones at every second evaluation, wherever these lie."""

    def attach(twin: Any, options: dict[str, Any]) -> None:
        network, seen = twin.transformer, []
        every = list(network.transformer_blocks)
        some = every[: options["Fn_compute_blocks"]] + every[12 - options["Bn_compute_blocks"] :]

        def choose(*_: Any) -> None:
            network.transformer_blocks = torch.nn.ModuleList(some if len(seen) % 2 else every)
            seen.append(None)

        network.register_forward_pre_hook(choose)

    monkeypatch.setitem(module._ATTACH, "dbcache", attach)
    at = context("fashion_dit")
    setting = Setting("dbcache", {"Fn_compute_blocks": front, "Bn_compute_blocks": back})
    assert draw_peer(setting, at.generator(), [5], 1).full_step_share == 0.5


def test_blocks_outside_our_span_are_shared_out() -> None:
    pipe = load_pipeline("assets/fashion-dit", "cpu")
    assert peers_of(pipe) == ("dbcache", "taylorseer")
    budget = Budget(12, 4, CacheConfig(3, span=[3, 8]))
    choices = masked_choices("taylorseer", pipe, budget)
    for choice in choices:
        options = choice.options
        assert options["Fn_compute_blocks"] + options["Bn_compute_blocks"] == 6 and options["Fn_compute_blocks"] >= 1
        assert sum(options["steps_computation_mask"]) == 4
    assert {choice.options["taylorseer_order"] for choice in choices} == {1, 2}
    assert all(c.options["max_cached_steps"] == 8 for c in dynamic_choices(choices[0], budget))


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DeepCache", "cache_dit"):
        monkeypatch.setitem(sys.modules, name, None)
    for peer in ("deepcache", "dbcache", "taylorseer"):
        with pytest.raises(UserError, match=r"pip install 'cachequant\[peers\]'") as raised:
            require_peer(peer)
        assert "\n" not in str(raised.value)


def test_a_copy_without_a_peer_is_the_pipeline() -> None:
    at = context("fashion_dit")
    drawn = draw_peer(UNTOUCHED, at.generator(), [5, 6], 2)
    assert drawn.full_step_share == 1.0 and drawn.images.equal(draw(at, None, [5, 6], "full").images)


@pytest.mark.parametrize("name", ["fashion_ldm", "drawings_sd"])
def test_deepcache_is_our_uniform_reuse_without_correction(name: str, tmp_path: Path) -> None:
    pytest.importorskip("DeepCache", reason="needs the peers extra: pip install -e '.[peers]'")
    at = context(name, "method=naive", "quant.enabled=false", "calibration.prompts=null")
    before = draw(at, None, [5, 6], "full").images
    trial = Trial(at.generator(), Budget(at.num_steps, 2, at.config.cache), [1, 2], 2)
    setting = trial.best("deepcache")
    assert setting.options == {"cache_interval": 4, "cache_branch_id": 0}
    drawn = draw_peer(setting, at.generator(sampling=True), [5, 6], 2)
    if name == "fashion_ldm":  # PLMS evaluates a timestep twice, which the package counts as one step
        assert drawn.full_step_share == 2 / 8
        torch.testing.assert_close(drawn.images, naive(at, tmp_path), rtol=0, atol=1e-5)
    assert not drawn.images.equal(before)
    every = replace(setting, options={**setting.options, "cache_interval": 1})
    assert draw_peer(every, at.generator(sampling=True), [5, 6], 2).images.equal(before)
    assert draw(at, None, [5, 6], "full").images.equal(before)  # the pipeline itself was not touched


@pytest.fixture
def cache_dit() -> Any:
    if "cache_dit" not in sys.modules:
        pytest.importorskip(
            "cache_dit", reason="needs the peers extra: pip install -e '.[peers]'", exc_type=ImportError
        )
    return require_peer("dbcache")


def test_dbcache_with_our_span_and_mask_is_our_reuse(cache_dit: Any, tmp_path: Path) -> None:
    at = context("fashion_dit", "method=naive", "quant.enabled=false")
    budget = Budget(at.num_steps, 2, at.config.cache)
    same = [c for c in masked_choices("dbcache", at.generator().pipe, budget) if c.options["Fn_compute_blocks"] == 6]
    drawn = draw_peer(same[0], at.generator(), [5, 6], 2)
    assert drawn.full_step_share == 2 / 8
    torch.testing.assert_close(drawn.images, naive(at, tmp_path), rtol=0, atol=1e-5)
    every = Setting("dbcache", {**same[0].options, "steps_computation_mask": [1] * STEPS})
    full = draw(at, None, [5, 6], "full").images
    torch.testing.assert_close(draw_peer(every, at.generator(), [5, 6], 2).images, full, rtol=0, atol=1e-6)
    assert draw(at, None, [5, 6], "full").images.equal(full)


@torch.no_grad()
def test_a_subclass_of_diffusers_transformer_runs_in_the_bench(cache_dit: Any) -> None:
    """The package patches what diffusers itself defines; the first step of a run is a full one."""
    at = context("fashion_dit", "cache.span=[3,8]")
    transformer = at.adapter.denoiser
    transformer.__class__ = OriginalDiT
    call = first_call(at)
    full, _ = at.adapter.full(call.x, call.timestep, **call.kwargs)
    with bench_peers.cache_dit(at, 4, lambda function: function) as (step, cache):
        assert cache.step == 0
        torch.testing.assert_close(step(call)[:, : full.shape[1]], full, rtol=0, atol=1e-5)
    assert "forward" not in vars(transformer) and type(transformer).__module__ == OriginalDiT.__module__


@pytest.mark.slow
def test_the_best_setting_is_within_the_budget_and_no_worse_than_reuse(cache_dit: Any) -> None:
    at = context("fashion_dit", "sampler.steps=6", "cache.interval=2", "sampler.guidance_scale=null")
    trial = Trial(at.generator(), Budget(at.num_steps, 3, at.config.cache), [1, 2], 2)
    full = trial.draw(UNTOUCHED).images

    def error(setting: Setting) -> float:
        return float((trial.draw(setting).images - full).square().mean())

    best = trial.best("taylorseer")
    assert trial.draw(best).full_step_share <= 0.5
    uniform = masked_choices("taylorseer", trial.generator.pipe, trial.budget)
    assert error(best) <= min(map(error, uniform)) * (1 + 1e-6)
