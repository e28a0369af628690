"""`cachequant evaluate`: one worker or two, the same numbers; what a user can mend is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cachequant.cli import main
from cachequant.evaluation.suite import METRICS, Request
from cachequant.pipeline.evaluate import evaluate
from cachequant.pipeline.workers import make_trainer

METRICS_HERE = "psnr,ssim,frechet_fashion_cnn"


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, Path]:
    """Two files of grey images, 21 each."""
    generator = torch.Generator().manual_seed(0)
    paths = tmp_path / "made.safetensors", tmp_path / "real.safetensors"
    for path in paths:
        save_file({"images": torch.rand(21, 1, 32, 32, generator=generator)}, path)
    return paths


def test_the_command_prints_and_writes_what_it_measured(
    images: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = tmp_path / "note.json"
    command = ["evaluate", str(images[0]), "--ref", str(images[1]), "--metrics", METRICS_HERE, "--device", "cpu"]
    assert main([*command, "--json", str(note)]) == 0
    found = json.loads(note.read_text())
    assert set(found) == {"images", "reference", "metrics"} and list(found["metrics"]) == sorted(
        METRICS_HERE.split(",")
    )
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert {name: float(value) for name, value in printed.items()} == pytest.approx(found["metrics"], abs=1e-4)
    again = evaluate(Request(images[0], tuple(METRICS_HERE.split(",")), images[1]), batch_size=5, device="cpu")
    assert again == pytest.approx(found["metrics"], rel=1e-6)


@pytest.mark.slow
def test_two_processes_give_the_same_numbers(images: tuple[Path, Path], tmp_path: Path) -> None:
    """Lightning starts the second one; gloo adds the sums."""
    request = Request(images[0], tuple(METRICS_HERE.split(",")), images[1])
    alone = evaluate(request, device="cpu")
    note = tmp_path / "note.json"
    command = [sys.executable, "-m", "cachequant", "evaluate", str(images[0]), "--ref", str(images[1])]
    command += ["--metrics", METRICS_HERE, "--device", "cpu", "--devices", "2", "--json", str(note)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(note.read_text())["metrics"] == pytest.approx(alone, rel=1e-6)
    assert len(done.stdout.splitlines()) == 3  # the first worker alone prints


def test_the_test_images_of_fashion_mnist_are_a_reference(
    images: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the miniature's own distance their statistics are at hand; for others they are read."""
    from cachequant.evaluation import reference
    from cachequant.evaluation.features import extract_features, load_feature_network
    from cachequant.evaluation.frechet import FeatureStatistics, frechet_distance
    from cachequant.evaluation.images import open_images

    real = torch.randint(0, 256, (30, 28, 28), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    network, gaussians = load_feature_network(), []
    for x in (open_images(images[0]).read(0, 21)[:, :1].float() / 127.5 - 1, reference.to_model_range(real)):
        statistics = FeatureStatistics(128)
        statistics.update(extract_features(network, x))
        gaussians.append(statistics.gaussian)
    monkeypatch.setattr(reference, "fashion_statistics", lambda: gaussians[1])
    found = evaluate(Request(images[0], ("frechet_fashion_cnn",), Path("fashion-mnist")), device="cpu")
    assert found is not None
    assert found["frechet_fashion_cnn"] == pytest.approx(frechet_distance(*gaussians[0], *gaussians[1]), rel=1e-5)
    monkeypatch.setattr(reference, "load_fashion_mnist", lambda split: (real, split))
    opened = reference.open_reference(Path("fashion-mnist")).images
    assert opened is not None
    expected = torch.nn.functional.pad(real, (2, 2, 2, 2))[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(opened.read(3, 7), expected[3:7])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "give --ref"),
        (["absent", "--metrics", "is"], "no images at absent"),
        (["absent", "--metrics", "fidd"], f"expected some of {', '.join(METRICS)}"),
        (["absent", "--metrics", "clip"], "give --prompts"),
        (["{made}", "--ref", "absent", "--metrics", "psnr"], "no images at absent"),
        (["{made}", "--metrics", "is", "--weights", "{folder}"], "put weights-inception-2015-12-05-6726825d.pth there"),
        (["{made}", "--metrics", "is", "--devices", "0"], "expected 1 or more"),
        (["{made}", "--metrics", "is", "--device", "cuda:77"], "device is 'cuda:77'"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, images: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [word.format(made=images[0], folder=tmp_path) for word in arguments]
    assert main(["evaluate", *filled]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_devices_follow_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its variables say how many workers there are; an option may not contradict them."""
    assert make_trainer("cpu").world_size == 1
    environment = {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1"}
    environment |= {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    trainer = make_trainer("cpu")
    assert (trainer.num_devices, trainer.num_nodes, trainer.world_size, trainer.global_rank) == (2, 2, 4, 3)
