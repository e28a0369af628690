"""Condition and no condition as one doubled batch or as two calls per evaluation: two caches, one step counter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, PNDMScheduler, UNet2DModel
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor

import cachequant as cq
from cachequant.cache.feature_cache import FeatureCache
from cachequant.config import RunConfig
from cachequant.pipeline.calibrate import gather
from cachequant.pipeline.context import Context
from cachequant.pipeline.effect import effect_weights
from cachequant.pipeline.features import gather_moments
from cachequant.pipeline.first_calls import evaluation_macs
from cachequant.pipeline.hook import Call
from cachequant.pipeline.step import accelerated_step
from cachequant.schedule import uniform_schedule
from cachequant.types import AffineMap, Correction

Configure = Callable[..., RunConfig]
CLASSES, STEPS, SCALE = 3, 8, 2.0


class NamingUNet(UNet2DModel, CacheMixin):
    """A U-Net whose calls a pipeline can name."""


class GuidedPipeline(DiffusionPipeline):
    """Class-conditional pixels with guidance, in one of the ways in which pipelines call their denoiser.

    `way`: "doubled", "two calls", or "named calls", which also swaps their order at every other evaluation.
    """

    def __init__(self, unet: Any, scheduler: Any, way: str = "doubled") -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.way = way

    @torch.no_grad()
    def __call__(
        self, class_labels: list[int], num_inference_steps: int = STEPS, generator: Any = None, output_type: str = "np"
    ) -> ImagePipelineOutput:
        generators = generator if isinstance(generator, list) else [generator] * len(class_labels)
        x = torch.cat([torch.randn(1, 1, 16, 16, generator=g) for g in generators])
        wanted, empty = torch.tensor(class_labels), torch.full((len(x),), CLASSES)
        self.scheduler.set_timesteps(num_inference_steps)
        for index, t in enumerate(self.scheduler.timesteps):
            none, some = self._predict(x, t, empty, wanted, swap=index % 2 == 1)
            x = self.scheduler.step(none + SCALE * (some - none), t, x).prev_sample
        return ImagePipelineOutput(images=x.permute(0, 2, 3, 1).numpy())

    def _predict(self, x: Tensor, t: Tensor, empty: Tensor, wanted: Tensor, swap: bool) -> tuple[Tensor, Tensor]:
        if self.way == "doubled":
            none, some = self.unet(torch.cat([x, x]), t, torch.cat([empty, wanted])).sample.chunk(2)
            return none, some
        named = self.way == "named calls"
        order = (("cond", wanted), ("uncond", empty)) if named and swap else (("uncond", empty), ("cond", wanted))
        made = {}
        for name, labels in order:
            with self.unet.cache_context(name) if named else nullcontext():
                made[name] = self.unet(x, t, class_labels=labels, return_dict=False)[0]
        return made["uncond"], made["cond"]


@pytest.fixture(params=["ddim", "plms"])
def scheduler(request: pytest.FixtureRequest) -> Any:
    if request.param == "ddim":
        return DDIMScheduler(clip_sample=False)
    return PNDMScheduler(skip_prk_steps=True, steps_offset=1)


@pytest.fixture
def guided(scheduler: Any) -> Callable[[str], Any]:
    torch.manual_seed(0)
    unet = NamingUNet(
        sample_size=16, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, norm_num_groups=4, num_class_embeds=CLASSES + 1,
    ).eval()  # fmt: skip
    with torch.no_grad():
        unet.class_embedding.weight.mul_(4.0)  # the two contexts' features must differ

    def make(way: str) -> Any:
        return GuidedPipeline(unet, scheduler, way)

    return make


def draw(pipe: Any) -> Tensor:
    return torch.from_numpy(pipe([0, 2], generator=torch.Generator().manual_seed(1)).images)


def settings(configure: Configure, *overrides: str) -> RunConfig:
    labels = ("sampler.labels=[0,1,2]", f"sampler.steps={STEPS}", "cache.interval=3")
    return configure(*labels, *overrides)


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_the_effect_of_reuse_is_that_of_the_doubled_batch(guided: Callable[[str], Any], configure: Configure) -> None:
    """Every context reuses at the same step; the changes of their features add up."""
    contexts = [Context.of(guided(way), settings(configure)) for way in ("doubled", "two calls", "named calls")]
    doubled, two, named = (effect_weights(context, probes=3, seeds=2) for context in contexts)
    assert torch.allclose(two, doubled, rtol=1e-2) and torch.allclose(named, doubled, rtol=1e-2)


@pytest.mark.parametrize("way", ["two calls", "named calls"])
def test_two_calls_give_the_images_of_the_doubled_batch(
    guided: Callable[[str], Any], configure: Configure, tmp_path: Path, way: str
) -> None:
    pipe, other = guided("doubled"), guided(way)
    reference = draw(pipe)
    assert close(draw(other), reference)
    plan = cq.calibrate(pipe, settings(configure, "method=paper", "quant.enabled=false"), tmp_path, quiet=True)
    assert plan.schedule.num_steps == STEPS + isinstance(pipe.scheduler, PNDMScheduler)
    cq.enable(pipe, plan)
    accelerated = draw(pipe)
    cq.disable(pipe)
    assert not close(accelerated, reference)
    cq.enable(other, plan)
    assert close(draw(other), accelerated)
    refreshes = len(plan.schedule.refresh_steps)
    assert f"{refreshes} full and {plan.schedule.num_steps - refreshes} cached steps" in cq.report(other)
    assert close(draw(other), accelerated)  # nothing leaked
    cq.disable(other)
    assert close(draw(other), reference)
    assert not {"forward", "cache_context"} & set(vars(other.unet)) and "step" not in vars(other.scheduler)


def test_each_context_reuses_its_own_feature(guided: Callable[[str], Any], configure: Configure) -> None:
    context = Context.of(guided("two calls"), settings(configure))
    schedule = uniform_schedule(context.num_steps, 3)
    cache, stored, reused = FeatureCache(schedule), {}, []
    inner = accelerated_step(context.adapter, cache, Correction())

    def step(call: Call) -> Tensor:
        refresh, output = cache.must_refresh, inner(call)
        if refresh:
            stored[call.context] = cache.features[0]
        else:
            reused.append((cache.step, call.context, cache.features[0] is stored[call.context]))
        return output

    context.trajectories(step, cache, [1, 2], "test", 2)
    cached = [s for s in range(context.num_steps) if not schedule.is_refresh(s)]
    assert [s for s, _, _ in reused] == sorted(cached * 2) and all(own for _, _, own in reused)
    assert len(stored) == 2 and not torch.equal(*stored.values())


def test_the_statistics_of_both_contexts_are_pooled(guided: Callable[[str], Any], configure: Configure) -> None:
    contexts = [Context.of(guided(way), settings(configure, "method=paper")) for way in ("doubled", "two calls")]
    bands = [gather(context).band for context in contexts]
    assert torch.allclose(*bands, rtol=1e-3)
    schedule = uniform_schedule(contexts[0].num_steps, 3)
    one, two = (gather_moments(context, schedule) for context in contexts)
    assert set(one) == set(two)
    for step in one:
        maps: list[AffineMap] = [one[step].solve(), two[step].solve()]
        assert torch.allclose(maps[0].scale, maps[1].scale, rtol=1e-2, atol=1e-3)
        assert torch.equal(one[step].gram[:, -1, -1], two[step].gram[:, -1, -1])  # as many pairs


def test_kept_rows_come_from_both_contexts(guided: Callable[[str], Any], configure: Configure) -> None:
    few = ("calibration.refresh_inputs=4", "calibration.cached_inputs=2")
    inputs = gather(Context.of(guided("two calls"), settings(configure, *few))).inputs
    assert all(len(entry.x) == 4 for entry in inputs)
    labels = inputs[0].kwargs["class_labels"]
    assert (labels == CLASSES).sum() == 2 and all(torch.equal(e.kwargs["class_labels"], labels) for e in inputs)


@pytest.mark.parametrize(("method", "way"), [("paper", "named calls"), ("best", "two calls")])
def test_plans_are_made_and_run_in_two_calls(
    guided: Callable[[str], Any], configure: Configure, tmp_path: Path, method: str, way: str
) -> None:
    pipe = guided(way)
    reference = draw(pipe)
    plan = cq.calibrate(pipe, settings(configure, f"method={method}"), tmp_path, quiet=True)
    cq.enable(pipe, plan)
    accelerated = draw(pipe)
    assert accelerated.isfinite().all() and 0 < (accelerated - reference).abs().mean() < 0.3 * reference.std()
    assert torch.equal(draw(pipe), accelerated)
    cq.disable(pipe)
    assert torch.equal(draw(pipe), reference)


def test_a_context_that_sits_out_a_refresh_is_refreshed_when_it_returns(
    guided: Callable[[str], Any], configure: Configure
) -> None:
    """Guidance over an interval of the steps: the empty context has nothing cached at its first call."""
    context = Context.of(guided("two calls"), settings(configure))
    cache = FeatureCache(uniform_schedule(context.num_steps, 3))
    cache.store(torch.zeros(1))
    cache.advance(True)
    assert not cache.must_refresh
    cache.context = "uncond"
    assert cache.must_refresh


@pytest.mark.parametrize("copies", [False, True])
def test_a_loop_that_never_steps_the_scheduler_counts_its_timesteps(
    guided: Callable[[str], Any], configure: Configure, tmp_path: Path, copies: bool
) -> None:
    pipe = guided("two calls")
    plms = isinstance(pipe.scheduler, PNDMScheduler)
    config = settings(configure, "method=naive", "quant.enabled=false")
    plan = cq.calibrate(pipe, config, tmp_path, quiet=True)
    cq.enable(pipe, plan)
    state = vars(pipe.unet)["_cachequant"]
    pipe.scheduler.set_timesteps(STEPS)
    x, label = torch.randn(1, 1, 16, 16), torch.tensor([0])
    table = pipe.scheduler.timesteps.tolist() if copies else pipe.scheduler.timesteps
    with torch.no_grad():
        for t in table:
            for _ in range(2):
                pipe.unet(x, t, label)
    merged = copies and plms  # a repeated value that is not an entry of the table looks like two more calls
    assert state.cache.step == plan.schedule.num_steps - 1 - merged
    cq.disable(pipe)
    refreshes = len(plan.schedule.refresh_steps)
    if not merged:
        assert (state.cache.full_steps, state.cache.cached_steps) == (refreshes, plan.schedule.num_steps - refreshes)


@pytest.mark.parametrize("when", ["before", "after"])
def test_somebody_elses_wrapper_of_the_scheduler_is_called_and_left_in_place(
    guided: Callable[[str], Any], configure: Configure, tmp_path: Path, when: str
) -> None:
    pipe = guided("doubled")
    plan = cq.calibrate(pipe, settings(configure, "method=naive", "quant.enabled=false"), tmp_path, quiet=True)
    if when == "after":
        cq.enable(pipe, plan)
    seen: list[Tensor] = []
    inner = pipe.scheduler.step

    def step(*args: Any, **kwargs: Any) -> Any:
        made = inner(*args, **kwargs)
        seen.append(made[0] if isinstance(made, tuple) else made.prev_sample)
        return made

    pipe.scheduler.step = step
    if when == "before":
        cq.enable(pipe, plan)
    draw(pipe)
    assert len(seen) == plan.schedule.num_steps
    refreshes = len(plan.schedule.refresh_steps)
    assert f"{refreshes} full and {plan.schedule.num_steps - refreshes} cached" in cq.report(pipe)
    cq.disable(pipe)
    assert vars(pipe.scheduler)["step"] is step and "set_timesteps" not in vars(pipe.scheduler)
    reference = draw(pipe)
    del pipe.scheduler.step
    assert torch.equal(draw(pipe), reference)


def test_contexts_with_other_conditioning_by_name_are_refused(
    guided: Callable[[str], Any], configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = guided("two calls")

    def predict(x: Tensor, t: Tensor, empty: Tensor, wanted: Tensor, swap: bool) -> tuple[Tensor, Tensor]:
        return pipe.unet(x, t, empty).sample, pipe.unet(x, t, wanted, mask=x).sample

    monkeypatch.setattr(pipe, "_predict", predict)
    original = type(pipe.unet).forward

    def forward(
        self: Any, sample: Tensor, timestep: Any, class_labels: Any = None, mask: Any = None, **kwargs: Any
    ) -> Any:
        return original(self, sample, timestep, class_labels, **kwargs)

    monkeypatch.setattr(type(pipe.unet), "forward", forward)
    with pytest.raises(cq.UserError, match="same conditioning by name"):
        gather(Context.of(pipe, settings(configure)))


def test_an_evaluation_costs_the_same_in_one_call_as_in_two(guided: Callable[[str], Any], configure: Configure) -> None:
    """`_calls` stops at the second evaluation, whose first call comes after both of the first one."""
    counts = {way: evaluation_macs(Context.of(guided(way), settings(configure))) for way in ("doubled", "two calls")}
    assert counts["two calls"] == counts["doubled"]
