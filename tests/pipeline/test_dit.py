"""A class-conditional transformer with learned sigma through all six stages, and the pipeline that drives it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cachequant as cq
from cachequant.cache.feature_cache import FeatureCache
from cachequant.cli import main
from cachequant.config import RunConfig, repository_folder
from cachequant.models.loading import class_count, class_labels, load_pipeline
from cachequant.pipeline.calibrate import choose_schedule, gather
from cachequant.pipeline.context import FRESH, Context
from cachequant.pipeline.features import gather_moments
from cachequant.pipeline.hook import Call
from cachequant.pipeline.quant_params import calibrate_quantisers, layer_plans
from cachequant.pipeline.stages import Stages
from cachequant.schedule import schedule_from_features, uniform_schedule
from cachequant.types import Correction

Configure = Callable[..., RunConfig]


@pytest.fixture
def dit() -> Any:
    """`DiTPipeline` with four blocks; its null class is number 1000 by diffusers' own convention."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=4, sample_size=8,
        patch_size=2,
    )  # fmt: skip
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            block.norm1.emb.class_embedder.embedding_table.weight.mul_(0.3)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    pipe = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def settings(configure: Configure) -> Configure:
    def make(*overrides: str) -> RunConfig:
        return configure("sampler.guidance_scale=1.5", "cache.branch=0", "cache.span=[1,2]", *overrides)

    return make


def draw(pipe: Any, labels: tuple[int, ...] = (3, 900), guidance: float = 1.5, steps: int = 6) -> Tensor:
    made = pipe(
        list(labels), guidance_scale=guidance, num_inference_steps=steps, output_type="np",
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    return torch.from_numpy(made.images)


def deltas(context: Context, seeds: list[int]) -> Tensor:
    """What the span adds, along full-precision trajectories: [T, B, tokens, C]."""
    caught: list[Tensor] = []

    def step(call: Call) -> Tensor:
        output, feature = context.adapter.full(call.x, call.timestep, **call.kwargs)
        caught.append(feature)
        return output

    cache = FeatureCache(uniform_schedule(context.num_steps, 1))
    context.trajectories(step, cache, seeds, "test", len(seeds))
    return torch.stack(caught)


def test_the_schedule_and_the_statistics_are_those_of_the_deltas(dit: Any, settings: Configure) -> None:
    context = Context.of(dit, settings("method=paper"))
    found = gather(context)
    stored = deltas(context, context.seeds())
    assert torch.allclose(found.band[1:, 1], (stored[1:] - stored[:-1]).abs().flatten(1).double().sum(1), rtol=1e-4)
    assert choose_schedule(context, found).refresh_steps == schedule_from_features(stored, 2).refresh_steps
    moments = gather_moments(context, uniform_schedule(context.num_steps, 2))
    fresh = deltas(context, context.seeds(FRESH))
    for step, sums in moments.items():
        x, y = fresh[step - 1].double(), fresh[step].double()
        assert sums.gram is not None and sums.gram.shape == (16, 3, 3)  # channels, not tokens
        assert torch.allclose(sums.error(), (y - x).square().mean(dim=(0, 1)), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("method", ["paper", "best", "naive"])
def test_all_six_stages_run_and_the_plan_accelerates_the_pipeline(
    dit: Any, settings: Configure, tmp_path: Path, method: str
) -> None:
    reference = draw(dit)
    layers = () if method == "naive" else ("correction.layers=consumers",)
    context = Context.of(dit, settings(f"method={method}", *layers))
    stages = Stages.at(context, tmp_path / "run", quiet=True)
    samples, _ = stages.samples()
    images = samples.images()
    assert images.shape == (2, 3, 16, 16) and images.float().std() > 1
    plan, _ = stages.plan()
    if method != "naive":
        assert set(plan.correction.layers) == {f"transformer_blocks.3.attn1.to_{part}" for part in "qkv"}
        assert all(m.scale.shape == (16,) for m in plan.correction.cache.values())
    # the learned variance in the last four channels is never mapped
    assert all(m.scale.shape == (4,) for m in plan.correction.output.values())
    assert bool(plan.correction.output) == (method == "best")
    cq.enable(dit, plan.save(tmp_path / "plan"))
    accelerated = draw(dit)
    assert not torch.equal(accelerated, reference)
    assert torch.equal(draw(dit), accelerated)
    with cq.bypass(dit):
        assert torch.equal(draw(dit), reference)
    cq.disable(dit)
    assert torch.equal(draw(dit), reference)


def test_interval_one_without_quantisation_is_bit_equal(dit: Any, settings: Configure, tmp_path: Path) -> None:
    reference = draw(dit)
    config = settings("cache.interval=1", "quant.enabled=false", "method=naive")
    cq.enable(dit, cq.calibrate(dit, config, tmp_path, quiet=True))
    assert torch.equal(draw(dit), reference)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy 2 in diffusers' scheduler
def test_a_multistep_solver_takes_the_place_of_ddim(dit: Any, settings: Configure, tmp_path: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler

    dit.scheduler = DPMSolverMultistepScheduler.from_config(dit.scheduler.config)
    reference = draw(dit)
    plan = cq.calibrate(dit, settings("method=best"), tmp_path, quiet=True)
    cq.enable(dit, plan)
    accelerated = draw(dit)
    assert accelerated.isfinite().all() and not torch.equal(accelerated, reference)
    assert "3 full and 3 cached steps" in cq.report(dit)
    cq.disable(dit)
    assert torch.equal(draw(dit), reference)


def test_learned_sigma_is_predicted_but_not_sampled_with(dit: Any, settings: Configure, tmp_path: Path) -> None:
    """The network's output has the variance's channels too; a plan must hand all of them to the pipeline."""
    plan = cq.calibrate(dit, settings("method=naive", "quant.enabled=false"), tmp_path, quiet=True)
    cq.enable(dit, plan)
    dit.scheduler.set_timesteps(6)
    labels = torch.tensor([0, 1000])
    with torch.no_grad():
        out = dit.transformer(
            torch.randn(2, 4, 8, 8), timestep=dit.scheduler.timesteps[:1].expand(2), class_labels=labels
        )
    assert out.sample.shape == (2, 8, 8, 8)


def test_a_run_without_guidance_is_refused_by_a_plan_for_guidance(
    dit: Any, settings: Configure, tmp_path: Path
) -> None:
    plan = cq.calibrate(dit, settings("method=naive", "quant.enabled=false"), tmp_path, quiet=True)
    cq.enable(dit, plan)
    accelerated = draw(dit)
    with pytest.raises(cq.UserError, match="this run has guidance none, the plan was made for cfg"):
        draw(dit, guidance=1.0)
    assert torch.equal(draw(dit), accelerated)


def test_layers_are_planned_and_calibrated_by_structure(dit: Any, settings: Configure) -> None:
    context = Context.of(dit, settings("method=paper", "quant.weight_bits=4"))
    plans = layer_plans(context.adapter, context.config.quant)
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    assert set(plans) == {n for n, m in dit.transformer.named_modules() if isinstance(m, kinds)}
    assert {n for n, p in plans.items() if p.weight_bits == 8} == {"pos_embed.proj", "proj_out_2"}
    without = layer_plans(context.adapter, settings("quant.time_embedding=false").quant)
    assert not context.adapter.time_names() & set(without)
    schedule = uniform_schedule(context.num_steps, 3)
    state = calibrate_quantisers(context, gather(context), schedule, Correction())
    for name, layer in state.layers.items():
        inside = name.startswith(("transformer_blocks.1.", "transformer_blocks.2."))
        assert layer.inputs[0].steps.tolist() == ([0, 3] if inside else list(range(6))), name
    assert "transformer_blocks.1.attn1.probabilities" in state.operands


def test_class_ids_are_spread_over_all_classes_and_checked() -> None:
    assert sorted(class_labels(None, 1000, list(range(90_000, 91_000)))) == list(range(1000))
    few = sorted(class_labels(None, 1000, list(range(1243, 1243 + 16))))
    assert min(b - a for a, b in itertools.pairwise(few)) > 1000 / 16 / 3
    assert class_labels([7, 8], 10, [0, 1, 2]) == [7, 8, 7]
    for classes in (1, 2, 3, 6, 1000):
        assert set(class_labels(None, classes, list(range(classes)))) == set(range(classes))
    with pytest.raises(cq.UserError, match="class id 1000, expected 0 to 999"):
        class_labels([1, 1000], 1000, [0])
    with pytest.raises(cq.UserError, match="class id -1"):
        class_labels([-1], None, [0])
    with pytest.raises(cq.UserError, match="needs class ids"):
        class_labels(None, None, [0])


def test_the_miniature_is_only_asked_for_the_classes_that_it_was_trained_on() -> None:
    pipe = load_pipeline(repository_folder() / "assets" / "fashion-dit", "cpu")
    rows = pipe.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight  # [1001, C]
    trained = rows.abs().sum(1).nonzero().flatten().tolist()
    assert trained == [*range(class_count(pipe)), 1000]  # the last stands for no class


def test_a_class_that_the_model_lacks_is_one_line(dit: Any, settings: Configure, tmp_path: Path) -> None:
    with pytest.raises(cq.UserError, match=r"sampler\.labels holds class id 1000, expected 0 to 999"):
        cq.calibrate(dit, settings("sampler.labels=[5,1000]"), tmp_path, quiet=True)


def test_the_command_line_says_it_in_one_line_and_goes_on_from_a_folder(
    dit: Any, settings: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dit.save_pretrained(tmp_path / "model")
    small = ["sampler.steps=4", "cache.span=[1,2]", "calibration.samples=2", "calibration.dec_samples=2",
             "calibration.batch_size=2", "sample.count=2", "method=paper", f"model.path={tmp_path / 'model'}"]  # fmt: skip
    options = [word for item in small for word in ("--set", item)]
    run = ["run", str(repository_folder() / "configs" / "dit.yaml"), "--device", "cpu", "--out", str(tmp_path / "run")]
    for change, message in (
        ("sampler.labels=[1000]", "class id 1000, expected 0 to 999"),
        ("sampler.steps=1001", "sampler.steps is 1001, expected at most 1000"),
        ("cache.span=[7,20]", "cache.span is [7, 20], expected"),
        ("cache.branch=1", "cache.branch is 1 for a DiTTransformer2DModel"),
    ):
        assert main([*run, *options, "--set", change]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(lines) == 1 and message in lines[0]
    assert main([*run, *options]) == 0
    assert "reads it     transformer_blocks.3.attn1.to_q: 16 of 16 input channels; corrected" in capsys.readouterr().out
