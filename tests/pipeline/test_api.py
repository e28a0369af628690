"""The library contract: exact where nothing is changed, isolated between calls, refusing what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor

import cachequant as cq
from cachequant.api import find
from cachequant.config import RunConfig
from cachequant.pipeline.context import Context
from cachequant.pipeline.graphed_step import deployed_step
from cachequant.plan import Plan
from cachequant.schedule import uniform_schedule
from cachequant.types import AffineMap

Configure = Callable[..., RunConfig]
Images = Callable[..., Tensor]


def plain_plan(pipe: Any, config: RunConfig) -> Plan:
    """Caching alone on the uniform schedule: no statistics needed."""
    context = Context.of(pipe, config)
    schedule = uniform_schedule(context.num_steps, config.cache.interval)
    return Plan(config, context.identity, context.timesteps, schedule)


def module_ids(pipe: Any) -> list[int]:
    return [id(m) for m in pipe.unet.modules()]


def test_interval_one_without_quantisation_is_bit_equal(pipe: Any, configure: Configure, images: Images) -> None:
    reference = images()
    cq.enable(pipe, plain_plan(pipe, configure("cache.interval=1", "quant.enabled=false")))
    assert torch.equal(images(), reference)


def test_disable_and_bypass_restore_bit_exactly(
    pipe: Any, configure: Configure, images: Images, tmp_path: Path
) -> None:
    reference, modules = images(), module_ids(pipe)
    plan = cq.calibrate(pipe, configure(), tmp_path, quiet=True)
    assert torch.equal(images(), reference)
    assert module_ids(pipe) == modules
    cq.enable(pipe, plan)
    accelerated = images()
    assert not torch.equal(accelerated, reference)
    with cq.bypass(pipe):
        assert torch.equal(images(), reference)
    assert torch.equal(images(), accelerated)
    cq.disable(pipe)
    assert torch.equal(images(), reference)
    assert module_ids(pipe) == modules
    assert "forward" not in vars(pipe.unet) and "set_timesteps" not in vars(pipe.scheduler)


def test_a_step_knows_the_layers_that_are_in_place(
    pipe: Any, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step captured as a graph reads its layers' memory: it must not outlive them."""
    made: dict[Any, Any] = {}

    def deployed(adapter: Any, cache: Any, correction: Any, network: Any) -> Any:
        step = deployed_step(adapter, cache, correction, network)
        made[step] = network
        return step

    monkeypatch.setattr("cachequant.api.deployed_step", deployed)
    cq.enable(pipe, cq.calibrate(pipe, configure(), tmp_path, quiet=True))
    state = find(pipe)
    assert state is not None and made[state.hook.step] is state.network
    before = state.network
    with cq.bypass(pipe):
        pass
    assert state.network is not before and made[state.hook.step] is state.network


def test_nothing_leaks_between_calls_of_other_batch_sizes(pipe: Any, configure: Configure, images: Images) -> None:
    cq.enable(pipe, plain_plan(pipe, configure("quant.enabled=false")))
    first = images(batch=2)
    other = images(batch=3, seed=8)
    assert torch.equal(images(batch=2), first)
    assert torch.equal(images(batch=3, seed=8), other)


def test_a_run_that_was_cut_off_does_not_leak_into_the_next(pipe: Any, configure: Configure, images: Images) -> None:
    cq.enable(pipe, plain_plan(pipe, configure("quant.enabled=false")))
    reference = images()
    pipe.scheduler.set_timesteps(6)
    with torch.no_grad():
        pipe.unet(torch.randn(5, 1, 16, 16), pipe.scheduler.timesteps[0])
    assert torch.equal(images(), reference)


def test_a_partial_run_starts_with_a_refresh_at_its_own_step(pipe: Any, configure: Configure) -> None:
    """Image-to-image with strength 0.5 calls the denoiser from the middle of the sampler."""
    plan = plain_plan(pipe, configure("quant.enabled=false", "cache.interval=3"))
    x = torch.randn(2, 1, 16, 16)

    def partial(start: int) -> Tensor:
        pipe.scheduler.set_timesteps(6)
        sample = x
        with torch.no_grad():
            for timestep in pipe.scheduler.timesteps[start:]:
                sample = pipe.scheduler.step(pipe.unet(sample, timestep).sample, timestep, sample).prev_sample
        return sample

    reference = partial(5)
    cq.enable(pipe, plan)
    assert torch.equal(partial(5), reference)  # one forced refresh is the full model
    state = vars(pipe.unet)["_cachequant"]
    before = state.cache.full_steps, state.cache.cached_steps
    partial(2)  # forced at 2, scheduled at 3, cached at 4 and 5
    assert (state.cache.full_steps - before[0], state.cache.cached_steps - before[1]) == (2, 2)


def test_counts_in_the_report_are_those_of_the_schedule(pipe: Any, configure: Configure, images: Images) -> None:
    cq.enable(pipe, plain_plan(pipe, configure("quant.enabled=false")))
    images()
    assert "3 full and 3 cached steps" in cq.report(pipe)


def test_enabling_twice_and_disabling_twice_are_refused(pipe: Any, configure: Configure, images: Images) -> None:
    plan = plain_plan(pipe, configure("quant.enabled=false"))
    cq.enable(pipe, plan)
    accelerated = images()
    with pytest.raises(cq.UserError, match=r"enabled already.*disable\(pipe\)"):
        cq.enable(pipe, plan)
    assert torch.equal(images(), accelerated)
    cq.disable(pipe)
    with pytest.raises(cq.UserError, match="not enabled"):
        cq.disable(pipe)


@pytest.mark.parametrize("change", ["weights", "scheduler", "guidance"])
def test_a_plan_for_something_else_is_refused_and_nothing_is_touched(
    pipe: Any, configure: Configure, images: Images, change: str
) -> None:
    plan = plain_plan(pipe, configure("quant.enabled=false"))
    if change == "weights":
        with torch.no_grad():
            pipe.unet.conv_in.bias[0] += 1.0
    elif change == "scheduler":
        pipe = DDIMPipeline(pipe.unet, DDIMScheduler(clip_sample=True))
    else:
        plan = replace(plan, identity=replace(plan.identity, guidance="cfg"))
    modules = module_ids(pipe)
    with pytest.raises(cq.UserError, match=f"this pipeline's {change} is .* the plan was made for"):
        cq.enable(pipe, plan)
    assert module_ids(pipe) == modules
    assert "forward" not in vars(pipe.unet) and "set_timesteps" not in vars(pipe.scheduler)


def test_another_step_count_is_refused_and_the_plan_still_works(
    pipe: Any, configure: Configure, images: Images
) -> None:
    cq.enable(pipe, plain_plan(pipe, configure("quant.enabled=false")))
    accelerated = images()
    with pytest.raises(cq.UserError, match=r"20 evaluations .* the plan expects 6"):
        images(steps=20)
    assert torch.equal(images(), accelerated)


def test_a_plan_that_matches_no_layer_is_refused(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    plan = cq.calibrate(pipe, configure("method=naive"), tmp_path, quiet=True)
    assert plan.quant is not None
    renamed = replace(plan.quant, layers={f"other.{n}": layer for n, layer in plan.quant.layers.items()})
    modules = module_ids(pipe)
    with pytest.raises(cq.UserError, match=r"layers such as other\..* lacks"):
        cq.enable(pipe, replace(plan, quant=renamed))
    assert module_ids(pipe) == modules


@pytest.mark.parametrize("part", ["weights", "correction", "cache", "kind"])
def test_a_plan_whose_layers_are_of_another_shape_is_refused_and_nothing_is_touched(
    part: str, pipe: Any, configure: Configure, images: Images, tmp_path: Path
) -> None:
    """As a plan that somebody forged: its identity fits."""
    plan = cq.calibrate(pipe, configure("method=paper"), tmp_path, quiet=True)
    assert plan.quant is not None
    layers, correction = dict(plan.quant.layers), plan.correction
    name = next(name for name in layers if name in correction.layers)
    wide = {step: AffineMap.identity(99) for step in range(6)}
    if part == "weights":
        layers[name] = next(layer for layer in layers.values() if layer.widths != layers[name].widths)
    elif part == "kind":
        layers["mid_block"] = layers.pop(name)
    elif part == "correction":
        correction = replace(correction, layers={**correction.layers, name: wide})
    else:
        correction = replace(correction, cache=wide)
    reference, modules = images(), module_ids(pipe)
    with pytest.raises(cq.UserError, match="calibrate for it"):
        cq.enable(pipe, replace(plan, quant=replace(plan.quant, layers=layers), correction=correction))
    assert module_ids(pipe) == modules and torch.equal(images(), reference)


def test_unknown_backend_and_missing_plan_are_one_line(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(cq.UserError, match="backend is 'tpu', expected one of auto, simulated"):
        cq.enable(pipe, plain_plan(pipe, configure("quant.enabled=false")), backend="tpu")
    with pytest.raises(cq.UserError, match="no plan in"):
        cq.enable(pipe, tmp_path)


def test_a_saved_plan_gives_the_same_images_as_the_plan_in_memory(
    pipe: Any, configure: Configure, images: Images, tmp_path: Path
) -> None:
    plan = cq.calibrate(pipe, configure(), tmp_path / "run", quiet=True)
    cq.enable(pipe, plan)
    accelerated = images()
    cq.disable(pipe)
    cq.enable(pipe, plan.save(tmp_path / "plan"))
    assert torch.equal(images(), accelerated)


def test_more_evaluations_than_the_plan_has_are_refused(pipe: Any, configure: Configure, images: Images) -> None:
    cq.enable(pipe, plain_plan(pipe, configure("quant.enabled=false")))
    images()
    with pytest.raises(cq.UserError, match="set_timesteps"):
        pipe.unet(torch.zeros(1, 1, 16, 16), torch.tensor(0))


def test_a_scheduler_that_was_replaced_is_noticed_at_the_first_evaluation(
    pipe: Any, configure: Configure, images: Images
) -> None:
    enabled = pipe.scheduler
    cq.enable(pipe, plain_plan(pipe, configure("quant.enabled=false")))
    accelerated = images()
    pipe.scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    with pytest.raises(cq.UserError, match="on the scheduler that was enabled"):
        images()
    pipe.scheduler = enabled
    assert torch.equal(images(), accelerated)


def test_no_feature_is_held_after_a_run(pipe: Any, configure: Configure, images: Images) -> None:
    cq.enable(pipe, plain_plan(pipe, configure("quant.enabled=false")))
    images()
    assert vars(pipe.unet)["_cachequant"].cache.features == []


def test_a_wrapped_denoiser_is_left_alone(pipe: Any, configure: Configure, images: Images) -> None:
    plan, wrapped = plain_plan(pipe, configure("quant.enabled=false")), pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: wrapped(*args, **kwargs)
    foreign = pipe.unet.forward
    for attempt in (lambda: cq.enable(pipe, plan), lambda: Context.of(pipe, configure())):
        with pytest.raises(cq.UserError, match="another library wraps"):
            attempt()
    assert pipe.unet.forward is foreign and "_cachequant" not in vars(pipe.unet)


def test_layers_are_put_back_when_the_hook_cannot_be_installed(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    plan = cq.calibrate(pipe, configure("method=naive"), tmp_path, quiet=True)
    modules, plain = module_ids(pipe), pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    with pytest.raises(cq.UserError):
        cq.enable(pipe, plan)
    assert module_ids(pipe) == modules


def test_moving_an_enabled_pipeline_moves_what_disable_puts_back(
    pipe: Any, configure: Configure, tmp_path: Path
) -> None:
    cq.enable(pipe, cq.calibrate(pipe, configure("method=naive"), tmp_path, quiet=True))
    pipe.unet.to(torch.float64)
    cq.disable(pipe)
    assert all(p.dtype == torch.float64 for p in pipe.unet.parameters())


def test_the_users_progress_bar_settings_survive_calibration(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    pipe.set_progress_bar_config(disable=True, desc="mine")
    cq.calibrate(pipe, configure("method=dps"), tmp_path, quiet=True)
    assert pipe._progress_bar_config == {"disable": True, "desc": "mine"}


def test_another_structure_with_the_same_weights_is_another_model(pipe: Any, configure: Configure) -> None:
    plan = plain_plan(pipe, configure("quant.enabled=false"))
    pipe.unet.register_to_config(norm_num_groups=2)
    with pytest.raises(cq.UserError, match="this pipeline's model"):
        cq.enable(pipe, plan)
