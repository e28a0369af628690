"""scripts/reproduce.py on miniatures with small counts: what it prints, keeps, resumes and refuses."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from torch import Tensor, nn

from cachequant.config import repository_folder
from cachequant.evaluation import measures, weights
from cachequant.evaluation.inception import Inception, InceptionFeatures
from cachequant.evaluation.tables import read_table
from cachequant.pipeline import reproduce as driver
from cachequant.pipeline import table_recipe
from cachequant.pipeline.table_recipe import Options, Recipe

SMALL = [
    "--miniature", "--count", "4", "--device", "cpu", "--set", "sampler.steps=6", "--set", "calibration.samples=2",
    "--set", "calibration.batch_size=2", "--set", "sample.batch_size=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = repository_folder() / "scripts" / "reproduce.py"
    spec = importlib.util.spec_from_file_location("reproduce_script", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What was run, as it is run."""
    seen: list[list[str]] = []
    real = driver.command_line

    def watched(argv: list[str]) -> int:
        seen.append(argv)
        return real(argv)

    monkeypatch.setattr(driver, "command_line", watched)
    return seen


def table(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    rows = csv.DictReader((path / "table.csv").read_text(encoding="utf-8").splitlines())
    return {(row["row"], row["quantity"]): row for row in rows}


@pytest.mark.slow
def test_a_table_on_the_embedded_miniature_and_again(
    script: ModuleType, commands: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "as released N=10 W8A8,naive N=10 W8A8"
    argv = ["--table", "cifar", *SMALL, "--set", "cache.interval=3", "--rows", rows, "--out", str(tmp_path)]
    assert script.main(argv) == 0
    printed = capsys.readouterr().out
    found = table(tmp_path)
    assert found["as released N=10 W8A8", "fid"]["paper"] == "4.61"
    assert float(found["naive N=10 W8A8", "psnr"]["ours"]) > 5
    assert float(found["full", "speedup"]["ours"]) == 1.0
    assert 3 < float(found["naive N=10 W8A8", "size"]["ours"]) < 4
    bops = float(found["naive N=10 W8A8", "bops_saved"]["ours"])
    record = json.loads((tmp_path / "table.json").read_text())
    assert 16 * 1.5 < bops < 16 * 3  # 2 of 6 steps in full, and 1024/64 for the bits
    assert set(record["parts"]["cifar"]) == {"full", *rows.split(",")}
    assert (tmp_path / "table.txt").read_text().strip() in printed
    assert "ours: configs/fashion.yaml, 6 steps, 4 images in batches of 2" in printed
    with Image.open(tmp_path / "quality.png") as plot:
        assert plot.size[0] > 500
    kinds = [argv[0] for argv in commands]
    assert kinds.count("run") == 2 and kinds.count("sample") == 1 and kinds.count("evaluate") == 5
    commands.clear()
    assert script.main(argv) == 0
    assert [argv[0] for argv in commands].count("evaluate") == 0
    assert table(tmp_path) == found  # times included: nothing was drawn again
    victim = next((tmp_path / "fashion").glob("full-*/images-*.safetensors"))
    victim.unlink()
    assert script.main(argv) == 0
    again = table(tmp_path)
    assert again["naive N=10 W8A8", "psnr"] == found["naive N=10 W8A8", "psnr"]  # the same noise


class Projection(nn.Module):
    """Stands in for Inception: linear features of the pixels, from a seed."""

    def forward(self, images: Tensor) -> InceptionFeatures:
        """[B, 3, 32, 32] uint8."""
        generator = torch.Generator().manual_seed(0)
        maps = [torch.randn(3 * 32 * 32, width, generator=generator).double() / 60 for width in (6, 4, 5)]
        pool, spatial, logits = (images.double().flatten(1) / 255 @ m for m in maps)
        return InceptionFeatures(pool, spatial, logits.softmax(1))


@pytest.mark.slow
def test_a_real_model_is_compared_metric_by_metric(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A toy in DDPM CIFAR-10's place, and another network in Inception's."""
    monkeypatch.setattr(Inception, "load", lambda _: Projection())
    for name, width in {"POOL": 6, "SPATIAL": 4, "CLASSES": 5}.items():
        monkeypatch.setattr(measures, name, width)
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=4,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    np.savez(tmp_path / "real.npz", arr_0=np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8))
    row, out = "as released N=10 W8A8", tmp_path / "out"
    changes = [f"model.path={tmp_path / 'model'}", "cache.branch=0", "cache.interval=3", "calibration.dps_samples=2"]
    changes += ["calibration.dec_samples=2"]
    argv = ["--table", "cifar", *SMALL[1:], "--ref", str(tmp_path / "real.npz"), "--rows", row, "--out", str(out)]
    assert script.main([*argv, *[word for change in changes for word in ("--set", change)]]) == 0
    found = table(out)
    fid = found[row, "fid"]
    assert float(fid["difference"]) == pytest.approx(float(fid["ours"]) - 4.61)
    assert {"sfid", "is", "psnr", "speedup"} <= {quantity for name, quantity in found if name == row}
    record = json.loads((out / "table.json").read_text())
    assert any(command.startswith("cachequant evaluate") and "--ref" in command for command in record["commands"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "row"),
    [("ablation", "best"), ("dit", "best N=2 W8A8"), ("sd", "paper N=2 W8A8")],
)
def test_every_latent_miniature_stands_in(name: str, row: str, script: ModuleType, tmp_path: Path) -> None:
    small = [*SMALL, "--set", "cache.interval=2", "--set", "sampler.steps=4"]
    assert script.main(["--table", name, *small, "--rows", row, "--out", str(tmp_path)]) == 0
    found = table(tmp_path)
    metric = "frechet_drawings_clip" if name == "sd" else "frechet_fashion_cnn"
    assert float(found[row, metric]["ours"]) >= 0 and float(found[row, "speedup"]["ours"]) > 0
    assert float(found[row, "psnr"]["ours"]) > 5
    if name == "sd":
        assert 0 <= float(found[row, "retrieval"]["ours"]) <= 1


def test_metrics_are_kept_for_the_networks_that_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder that --weights or the environment names, and of none."""
    judged: list[list[str]] = []

    def command(argv: list[str]) -> int:
        judged.append(argv)
        Path(argv[argv.index("--json") + 1]).write_text(json.dumps({"metrics": {"fid": float(len(judged))}}))
        return 0

    monkeypatch.setattr(driver, "command_line", command)
    monkeypatch.delenv(weights.VARIABLE, raising=False)
    for name in ("images", "first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "network.bin").write_bytes(b"x" * len(name))
    (part,) = read_table("cifar")

    def judge(folder: str | None) -> float:
        options = Options(tmp_path / "out", miniature=True, weights=None if folder is None else tmp_path / folder)
        (tmp_path / "out" / "fashion").mkdir(parents=True, exist_ok=True)
        bench = driver.Workbench(part, Recipe.of(part, options), options)
        return bench._evaluate(tmp_path / "images", ("fid",), None)["fid"]

    assert [judge(folder) for folder in (None, "first", "second", None, "second", "first")] == [1, 2, 3, 1, 3, 2]
    monkeypatch.setenv(weights.VARIABLE, str(tmp_path / "first"))
    assert judge(None) == 2 and len(judged) == 3


def test_several_workers_are_processes_of_their_own(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning starts the program again in each of them: that must be the command, not the whole table."""
    started: list[list[str]] = []

    class Failed:
        returncode = 3

    def start(command: list[str], **_: object) -> Failed:
        started.append(command)
        return Failed()

    monkeypatch.setattr(driver.subprocess, "run", start)
    argv = ["--table", "cifar", *SMALL, "--set", "cache.interval=3", "--devices", "2", "--out", str(tmp_path)]
    assert script.main(argv) == 3
    assert len(started) == 1 and started[0][1:4] == ["-m", "cachequant", "run"] and "--devices" in started[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "imagenet"], "compares with guided-diffusion's VIRTUAL_imagenet256_labeled.npz"),
        (["--table", "cifar", "--miniature", "--rows", "worst"], "row 'worst' is not in table cifar"),
        (["--table", "dit", "--miniature", "--set", "model.path=assets/nothing"], "no miniature in assets/nothing"),
        (["--table", "cifar", "--miniature", "--set", "cache.intervall=3"], "unknown key cache.intervall"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_an_absent_configuration_of_a_miniature_is_one_line(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = repository_folder()
    shutil.copytree(root / "configs", tmp_path / "configs")
    (tmp_path / "configs" / "fashion.yaml").unlink()
    monkeypatch.setattr(table_recipe, "repository_folder", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    assert script.main(["--table", "cifar", "--miniature", "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "no configuration file" in lines[0] and "fashion.yaml" in lines[0]
