"""A denoiser from its plan alone: the same images, its bytes, its memory, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

import cachequant as cq
from cachequant.config import RunConfig, load_config, repository_folder
from cachequant.models.loading import Generator, identify
from cachequant.models.skeleton import build_skeleton, remainder_of
from cachequant.plan import Plan
from cachequant.quant.convert import LayerPlan, fresh_state
from cachequant.schedule import uniform_schedule
from cachequant.storage import StoredLayers, pack_nibbles, pack_quant, save_tensors, unpack_nibbles, unpack_quant
from cachequant.types import ActivationTable, Correction, LayerQuant, QuantState

SMALL = [
    "sampler.steps=6", "cache.interval=2", "calibration.samples=2", "calibration.batch_size=2",
    "calibration.refresh_inputs=2", "calibration.cached_inputs=2", "sample.count=2", "sample.batch_size=2",
]  # fmt: skip


def changed(part: str, **values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What makes a recipe's part another one."""
    return lambda recipe: {part: {**recipe[part], "config": {**recipe[part]["config"], **values}}}


FORGED: list[tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    (lambda _: {"denoiser": {"class": "cachequant.cli.main", "config": {}}}, "no model, scheduler or pipeline"),
    (lambda _: {"denoiser": {"class": "diffusers.DDIMScheduler", "config": {}}}, "denoiser cannot be built"),
    (lambda _: {"denoiser": {"class": "", "config": {}}}, "cannot be had"),
    (lambda _: {"denoiser": "x"}, "denoiser cannot be built"),
    (lambda _: {"pipeline": "diffusers.utils.logging.os.system"}, "cannot be had"),
    (lambda _: {"pipeline": "diffusers.LDMPipeline"}, "pipeline cannot be built"),
    (lambda _: {"role": "scheduler"}, "expected unet or transformer"),
    (changed("denoiser", attention_head_dim=-8), "the plan was made for UNet2DModel"),
    (changed("denoiser", layers_per_block=2**40), "the plan was made for UNet2DModel"),
    (changed("denoiser", down_block_types=[[1]]), "the plan was made for UNet2DModel"),
    (changed("scheduler", num_train_timesteps=2**40), "the plan was made for DDIMScheduler"),
]
"""Change of a plan's recipe -> what loading it says."""


def drawn(pipe: Any, config: RunConfig) -> torch.Tensor:
    """Images of a pipeline as it is: [n, C, H, W]."""
    first = config.sample.seed
    return Generator(pipe, config.sampler)(list(range(first, first + config.sample.count)))


def configure(*overrides: str) -> RunConfig:
    return load_config(repository_folder() / "configs" / "fashion.yaml", [*SMALL, *overrides])


@pytest.fixture(scope="module")
def miniature() -> Any:
    return cq.load_pipeline("assets/fashion-ddpm", "cpu")


def tensor_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(("bits", "alone", "whole"), [(8, 0.27, 0.27), (4, 0.145, 0.145)])
def test_a_plan_is_small_and_runs_without_its_model(
    miniature: Any, tmp_path: Path, bits: int, alone: float, whole: float
) -> None:
    config = configure(f"quant.weight_bits={bits}", "quant.rounding=nearest")  # bytes do not depend on it
    plan = cq.calibrate(miniature, config, tmp_path / "run", quiet=True)
    folder = plan.save(tmp_path / "plan")
    full = sum(4 * p.numel() for p in miniature.unet.parameters())
    assert (folder / "quant.safetensors").stat().st_size <= alone * full
    assert tensor_bytes(folder) <= whole * full
    cq.enable(miniature, plan)
    expected = drawn(miniature, config)
    cq.disable(miniature)
    pipe = cq.load_quantized(folder)
    assert torch.equal(drawn(pipe.to("cpu"), config), expected)
    for change in (cq.disable, lambda p: cq.bypass(p).__enter__()):
        with pytest.raises(cq.UserError, match="loaded from its plan"):
            change(pipe)
    assert torch.equal(drawn(pipe, config), expected)


def test_the_simulation_needs_no_model_either(pipe: Any, configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    """With every layer of the paper's method, the ends and the attention operands included."""
    config = configure("method=paper", "backend=simulated")
    plan = cq.calibrate(pipe, config, tmp_path / "run", quiet=True)
    folder = plan.save(tmp_path / "plan")
    cq.enable(pipe, plan, "simulated")
    expected = drawn(pipe, config)
    cq.disable(pipe)
    assert torch.equal(drawn(cq.load_quantized(folder, "simulated"), config), expected)


def test_a_plan_without_a_denoiser_or_for_another_class_is_refused(
    pipe: Any, configure: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = configure("quant.enabled=false")
    plan = cq.calibrate(pipe, config, tmp_path / "run", quiet=True)
    with pytest.raises(cq.UserError, match="holds no denoiser"):
        cq.load_quantized(plan.save(tmp_path / "float"))
    quantised = cq.calibrate(pipe, configure(), tmp_path / "run", quiet=True)
    assert quantised.remainder is not None
    recipe: dict[str, Any] = {**quantised.remainder.recipe, "denoiser": {"class": "os.system", "config": {}}}
    foreign = replace(quantised, remainder=replace(quantised.remainder, recipe=recipe))
    with pytest.raises(cq.UserError, match="neither of diffusers nor of cachequant"):
        build_skeleton(foreign)
    for forged, message in FORGED:
        made = {**quantised.remainder.recipe, **forged(quantised.remainder.recipe)}
        folder = replace(quantised, remainder=replace(quantised.remainder, recipe=made)).save(tmp_path / "forged")
        with pytest.raises(cq.UserError, match=message) as caught:
            cq.load_quantized(folder)
        assert "\n" not in str(caught.value)
    name, tensor = next(iter(quantised.remainder.tensors.items()))
    for other in (tensor.double(), tensor[None]):
        tensors = {**quantised.remainder.tensors, name: other}
        with pytest.raises(cq.UserError, match="is not as its denoiser has it"):
            build_skeleton(replace(quantised, remainder=replace(quantised.remainder, tensors=tensors)))
    some = dict(list(quantised.remainder.tensors.items())[1:])
    with pytest.raises(cq.UserError, match="the plan lacks"):
        build_skeleton(replace(quantised, remainder=replace(quantised.remainder, tensors=some)))


@pytest.mark.parametrize("shape", [(3,), (4, 5), (5, 3, 3, 3), (1,)])
def test_two_four_bit_integers_share_a_byte(shape: tuple[int, ...]) -> None:
    values = torch.randint(0, 16, shape, dtype=torch.uint8)
    packed = pack_nibbles(values)
    assert len(packed) == -(-values.numel() // 2)
    assert torch.equal(unpack_nibbles(packed, shape), values)


def table() -> ActivationTable:
    return ActivationTable(torch.tensor([0], dtype=torch.int32), torch.tensor([0.02]), torch.tensor([128.0]), 8)


def with_tables(state: QuantState) -> QuantState:
    layers = {n: LayerQuant(s.weights, tuple(table() for _ in s.inputs), s.widths) for n, s in state.layers.items()}
    return QuantState(layers)


@pytest.mark.parametrize("bits", [4, 8])
def test_layers_are_read_one_at_a_time(tmp_path: Path, bits: int) -> None:
    network = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(6, 5), "b": torch.nn.Conv2d(6, 5, 3), "ab": torch.nn.Linear(5, 2)}
    )
    plans = {"a": LayerPlan(bits, 8), "b": LayerPlan(bits, 8, 2), "ab": LayerPlan(bits, 8)}
    state = with_tables(fresh_state(network, plans, "minmax"))
    save_tensors(tmp_path / "q", pack_quant(state))
    stored, whole = StoredLayers(tmp_path / "q"), unpack_quant(pack_quant(state))
    assert sorted(stored) == sorted(whole.layers) and len(stored) == 3
    for name in stored:
        for found, expected in zip(stored[name].weights, whole.layers[name].weights, strict=True):
            assert torch.equal(found.values, expected.values) and torch.equal(found.scale, expected.scale)
            assert found.bits == bits and torch.equal(found.zero_point, expected.zero_point)
    with pytest.raises(KeyError):
        stored["c"]


MEASURE = """
import ctypes, gc, sys, torch
torch.set_num_threads(1)
import cachequant as cq
def resident(key):
    return [int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key)][0]
cq.load_quantized(sys.argv[1])  # whatever is loaded once per process
gc.collect(); ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
before = resident("VmRSS")
pipe = cq.load_quantized(sys.argv[2])
print(resident("VmHWM") - before, file=sys.stderr)
"""


def random_plan(channels: tuple[int, ...], folder: Path) -> int:
    """A W8A8 plan of a network with random weights: bytes of its float32 parameters."""
    unet = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=channels,
        down_block_types=("DownBlock2D",) * len(channels), up_block_types=("UpBlock2D",) * len(channels),
    ).eval()  # fmt: skip
    pipe = DDIMPipeline(unet, DDIMScheduler(clip_sample=False))
    layers = (torch.nn.Conv2d, torch.nn.Linear)
    names = [n for n, m in unet.named_modules() if isinstance(m, layers) and n not in ("conv_in", "conv_out")]
    state = with_tables(fresh_state(unet, {n: LayerPlan(8, 8) for n in names}, "minmax"))
    pipe.scheduler.set_timesteps(6)
    timesteps = tuple(int(t) for t in pipe.scheduler.timesteps)
    plan = Plan(
        configure(), identify(pipe, None), timesteps, uniform_schedule(6, 2), Correction(), state, {},
        remainder_of(pipe, state),
    )  # fmt: skip
    plan.save(folder)
    return sum(4 * p.numel() for p in unet.parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_little_more_than_the_plan_itself(tmp_path: Path) -> None:
    """Peak resident memory of a fresh process, above what it holds after loading a tiny plan."""
    random_plan((32,), tmp_path / "tiny")
    full = random_plan((192, 384), tmp_path / "plan")
    arguments = [sys.executable, "-c", MEASURE, str(tmp_path / "tiny"), str(tmp_path / "plan")]
    made = subprocess.run(arguments, capture_output=True, text=True, cwd=repository_folder(), check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    peak, own = int(made.stderr.strip().splitlines()[-1]), tensor_bytes(tmp_path / "plan")
    assert own <= 0.27 * full
    assert 0.5 * own < peak < 1.3 * own
