"""torch_quantizer as a backend of whole runs, and its checkpoints by command, on a stand-in of its modules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from safetensors.torch import save_file
from torch import nn

import cachequant as cq
from cachequant.cli import main
from cachequant.config import RunConfig
from cachequant.evaluation.paired import psnr
from cachequant.models.loading import Generator
from cachequant.plan import Plan
from tests import torch_quantizer_stand_in

Configure = Callable[..., RunConfig]
BACKEND = "torch_quantizer"
SETTINGS = ("method=best", "quant.weight_symmetric=true", "correction.layers=all", "quant.rounding=nearest")


@pytest.fixture
def pipe() -> Any:
    """A pipeline whose inner layers are as wide as torch_quantizer takes them."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32, norm_num_groups=8,
    ).eval()  # fmt: skip
    pipe = DDIMPipeline(unet, DDIMScheduler(clip_sample=False, steps_offset=0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def plan(pipe: Any, configure: Configure, tmp_path: Path) -> Plan:
    """Symmetric W8A8, every layer's product corrected, three full steps of six."""
    return cq.calibrate(pipe, configure(*SETTINGS), tmp_path / "stages", quiet=True)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's stand-in, and the CPU as the card that it runs on."""
    torch_quantizer_stand_in.install(monkeypatch)
    monkeypatch.setattr("cachequant.kernels.backend._refuses_card", lambda _: None)


def drawn(pipe: Any, config: RunConfig) -> torch.Tensor:
    return Generator(pipe, config.sampler)(list(range(config.sample.seed, config.sample.seed + 2)))


def with_plan(pipe: Any, plan: Plan | Path, backend: str) -> torch.Tensor:
    """Images of an enabled plan, which is taken off again."""
    cq.enable(pipe, plan, backend)
    config = plan.config if isinstance(plan, Plan) else Plan.load(plan).config
    images = drawn(pipe, config)
    cq.disable(pipe)
    return images


def test_a_whole_run_is_the_simulated_one_within_its_own_error(pipe: Any, plan: Plan, card: None) -> None:
    """By 3 dB nearer to the simulated images than these are to full precision; without the plan, the model is as it was."""
    assert plan.quant is not None and len(plan.schedule.refresh_steps) < plan.schedule.num_steps
    reference = drawn(pipe, plan.config)
    simulated, found = with_plan(pipe, plan, "simulated"), with_plan(pipe, plan, BACKEND)
    apart, error = float(psnr(found, simulated, 1.0).mean()), float(psnr(simulated, reference, 1.0).mean())
    assert apart > max(33.0, error + 3.0)
    assert torch.equal(drawn(pipe, plan.config), reference)


def test_the_report_counts_its_layers_and_names_every_other_with_the_reason(pipe: Any, plan: Plan, card: None) -> None:
    assert plan.quant is not None
    cq.enable(pipe, plan, BACKEND)
    report = cq.report(pipe)
    own = [name for name, m in pipe.unet.named_modules() if type(m).__name__ == "TorchQuantizerLayer"]
    assert f"torch_quantizer: integers in the modules of torch_quantizer {torch_quantizer_stand_in.VERSION}" in report
    assert f"integers     {len(own)} layers" in report and len(own) > 10
    for name, layer in plan.quant.layers.items():
        named = f"simulated    {name}: " in report
        assert named == (name not in own)
        if len(layer.weights) == 2:
            assert f"simulated    {name}: its input is quantised in two halves" in report
    cq.disable(pipe)


def test_without_the_package_it_is_one_line_and_nothing_changes(
    pipe: Any, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(torch_quantizer_stand_in.sys.modules, "torch_quantizer", None)
    before = [(id(m), type(m)) for m in pipe.unet.modules()]
    with pytest.raises(cq.UserError) as raised:
        cq.enable(pipe, plan, BACKEND)
    line = str(raised.value)
    assert line.startswith("backend torch_quantizer does not run here (the package cannot be imported: ")
    assert "expected github.com/ThisisBillhe/torch_quantizer" in line and line.endswith("use auto or simulated")
    assert "\n" not in line and [(id(m), type(m)) for m in pipe.unet.modules()] == before
    assert "_cachequant" not in vars(pipe.unet)


def test_with_the_package_but_without_a_card_it_is_one_line(
    pipe: Any, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_quantizer_stand_in.install(monkeypatch)
    with pytest.raises(cq.UserError, match=r"torch_quantizer does not run here \(the model is on cpu\)"):
        cq.enable(pipe, plan, BACKEND)


@pytest.fixture
def folder(plan: Plan, tmp_path: Path) -> Path:
    return plan.save(tmp_path / "plan")


def read(path: Path) -> dict[str, torch.Tensor]:
    content: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return content


def test_a_plan_goes_out_and_comes_back(pipe: Any, plan: Plan, folder: Path, tmp_path: Path) -> None:
    """The same integers, zero points and maps, scales to half precision's rounding; a second trip adds none."""
    checkpoint, back, note = tmp_path / "out.pth", tmp_path / "back", tmp_path / "note.json"
    assert main(["export", str(folder), str(checkpoint), "--json", str(note)]) == 0
    facts = json.loads(note.read_text())
    assert main(["import", str(folder), str(checkpoint), str(back)]) == 0
    found = Plan.load(back)
    assert plan.quant is not None and found.quant is not None
    assert set(facts["layers"]) | set(facts["left_out"]) == set(plan.quant.layers) == set(found.quant.layers)
    for name in facts["layers"]:
        (grid,), (table,) = plan.quant.layers[name].weights, plan.quant.layers[name].inputs
        (other,), (rows,) = found.quant.layers[name].weights, found.quant.layers[name].inputs
        assert torch.equal(grid.values, other.values)
        torch.testing.assert_close(other.scale, grid.scale, rtol=1e-6, atol=0)
        places = table.steps.long()
        assert torch.equal(rows.zero_point[places], table.zero_point)
        torch.testing.assert_close(rows.scale[places], table.scale, rtol=2.0**-11, atol=0)
        for step, affine in plan.correction.layers.get(name, {}).items():
            assert torch.equal(found.correction.layers[name][step].scale, affine.scale)
            assert torch.equal(found.correction.layers[name][step].shift, affine.shift)
    assert any(plan.correction.layers.get(name) for name in facts["layers"])
    again = tmp_path / "again.pth"
    assert main(["export", str(back), str(again)]) == 0
    assert set(read(again)) == set(read(checkpoint))
    for key, value in read(checkpoint).items():
        torch.testing.assert_close(read(again)[key], value, rtol=1e-5, atol=1e-6)
    before, after = with_plan(pipe, plan, "simulated"), with_plan(pipe, back, "simulated")
    assert float(psnr(after, before, 1.0).mean()) > 33.0


def replaced_by_its_converter(model: nn.Module, skipped: list[int]) -> set[str]:
    """Names that its `QuantModel` replaces: convolutions and linear layers counted depth first, 32 channels at a time."""
    found, count = set(), 0

    def visit(module: nn.Module, prefix: str) -> None:
        nonlocal count
        for name, child in module.named_children():
            if isinstance(child, nn.Conv2d | nn.Linear):
                count += 1
                if count not in skipped and child.weight.shape[0] % 32 == child.weight.shape[1] % 32 == 0:
                    found.add(prefix + name)
            else:
                visit(child, f"{prefix}{name}.")

    visit(model, "")
    return found


def test_the_layers_to_skip_are_those_that_its_converter_would_leave_random(
    pipe: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = tmp_path / "note.json"
    assert main(["export", str(folder), str(tmp_path / "out.pth"), "--json", str(note)]) == 0
    facts = json.loads(note.read_text())
    assert replaced_by_its_converter(pipe.unet, facts["skip_layer"]) == set(facts["layers"])
    assert replaced_by_its_converter(pipe.unet, []) > set(facts["layers"])
    printed = capsys.readouterr().out
    assert "left out     up_blocks.0.resnets.0.conv1: its input is quantised in two halves" in printed
    for text in ("it caches nothing", "corrections of the cached feature are not in it", str(facts["skip_layer"])):
        assert text in printed


def test_a_bias_of_the_checkpoint_is_kept(plan: Plan, folder: Path, tmp_path: Path) -> None:
    """As an offset of the correction: a·p + (b + its bias - the model's) + the model's."""
    checkpoint, other = tmp_path / "out.pth", tmp_path / "other.safetensors"
    assert main(["export", str(folder), str(checkpoint)]) == 0
    content, name = read(checkpoint), "mid_block.resnets.0.conv1"
    content[f"{name}.bias"] += 3.0
    save_file(content, other)
    assert main(["import", str(folder), str(other), str(tmp_path / "back")]) == 0
    found, before = Plan.load(tmp_path / "back").correction.layers[name], plan.correction.layers[name]
    assert set(found) == set(range(plan.schedule.num_steps))
    for step, affine in found.items():
        shift = before[step].shift if step in before else torch.zeros(64)
        torch.testing.assert_close(affine.shift, shift + 3.0)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that fails."""
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_what_is_there_is_never_overwritten(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "out.pth"
    checkpoint.write_bytes(b"mine")
    assert "expected a new file" in refused(["export", str(folder), str(checkpoint)], capsys)
    assert checkpoint.read_bytes() == b"mine"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["export", str(folder), str(tmp_path / "new.pth")]) == 0
    line = refused(["import", str(folder), str(tmp_path / "new.pth"), str(folder)], capsys)
    assert "expected a new or an empty folder" in line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def other_steps(content: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One evaluation fewer."""
    ends = ("act_delta", "act_zp", "delta", "channel_sum", "correction_scale", "correction_shift")
    return {key: value[1:] if key.endswith(ends) else value for key, value in content.items()}


def other_model(content: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Layers of another name."""
    return {f"model.{key}": value for key, value in content.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_steps, "has 5 steps"),
        (other_model, "is not of the plan's model"),
        (lambda _: {"weight": torch.ones(1)}, "holds no '*.int_weight'"),
        (lambda content: {k: v for k, v in content.items() if "act_zp" not in k}, "it lacks act_zp"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line_and_makes_no_plan(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Any], Any], message: str
) -> None:
    checkpoint, back = tmp_path / "out.pth", tmp_path / "back"
    assert main(["export", str(folder), str(checkpoint)]) == 0
    torch.save(change(read(checkpoint)), tmp_path / "other.pth")
    assert message in refused(["import", str(folder), str(tmp_path / "other.pth"), str(back)], capsys)
    (tmp_path / "cut.pth").write_bytes(checkpoint.read_bytes()[:5000])
    assert "truncated" in refused(["import", str(folder), str(tmp_path / "cut.pth"), str(back)], capsys)
    assert not back.exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("quant.weight_symmetric=false", "asymmetric weights"),
        ("quant.activation_bits=4", "4-bit activations"),
        ("quant.enabled=false", "this plan quantises nothing"),
    ],
)
def test_a_plan_that_it_cannot_hold_is_one_line_and_writes_no_file(
    pipe: Any, configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    config = configure("method=naive", "quant.weight_symmetric=true", setting)
    folder = cq.calibrate(pipe, config, tmp_path / "stages", quiet=True).save(tmp_path / "plan")
    assert message in refused(["export", str(folder), str(tmp_path / "out.pth")], capsys)
    assert not (tmp_path / "out.pth").exists()


def test_a_plan_of_caching_alone_takes_the_layers_of_a_checkpoint(
    pipe: Any, configure: Configure, plan: Plan, folder: Path, tmp_path: Path
) -> None:
    """It holds no denoiser, so the model is read from where its configuration says."""
    pipe.save_pretrained(tmp_path / "model")
    settings = ("method=naive", "quant.enabled=false", f"model.path={tmp_path / 'model'}")
    caching = cq.calibrate(pipe, configure(*settings), tmp_path / "other", quiet=True).save(tmp_path / "caching")
    assert main(["export", str(folder), str(tmp_path / "out.pth")]) == 0
    assert main(["import", str(caching), str(tmp_path / "out.pth"), str(tmp_path / "back")]) == 0
    found = Plan.load(tmp_path / "back")
    assert found.quant is not None and plan.quant is not None and set(found.quant.layers) < set(plan.quant.layers)
    assert with_plan(pipe, tmp_path / "back", "simulated").isfinite().all()
