"""The README's commands run, on models of toy size; those that cannot are listed with the reason."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent

import pytest
import torch
import yaml

from cachequant.cli import build_parser, main
from cachequant.config import load_config, repository_folder
from tests.models.original import miniature
from tests.toys import cross_unet, pixel_unet, save_toy

ROOT = repository_folder()
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = ("cachequant", "python", "make", "pip", "git")
COMMANDS = [c.strip() for c in re.findall(rf"(?:^    |`)((?:{'|'.join(PROGRAMS)}) [^`\n#]+)", TEXT, flags=re.MULTILINE)]
SMALL = (
    "sampler.steps=4", "cache.interval=2", "calibration.samples=2", "calibration.batch_size=2", "sample.count=2",
    "calibration.dps_samples=2", "calibration.dec_samples=2", "calibration.refresh_inputs=2", "calibration.cached_inputs=1",
    "sample.batch_size=2", "schedule.fallback=false", "calibration.prompts=null", "quant.rounding_samples=2",
    "quant.recon.iterations=3",
)  # fmt: skip
NOT_RUN = {
    "git clone": "needs a remote",
    "pip install": "changes the environment; `make setup`, with which CI begins, does the same",
    "make": "changes the environment, then calls what other tests call",
    "cachequant convert --family sd-v1": "needs a tokenizer from the hub; tests/models/original has such checkpoints",
    "cachequant convert --family dit-xl2": "needs a first stage from the hub; tests/models/original has such checkpoints",
    "cachequant bench configs/stable_diffusion.yaml --device cuda": "needs a GPU",
    "cachequant export": "needs a symmetric plan of wide layers; tests/pipeline/test_exchange.py has such plans",
    "cachequant import": "needs what export writes; tests/pipeline/test_exchange.py has it",
    "python scripts/ablation.py": "draws thousands of images and needs a data set; tests/test_ablation.py has its parts",
    "python scripts/reproduce.py --table cifar": "draws thousands of images; tests/test_reproduce.py runs it with few",
    "python scripts/reproduce.py --table imagenet": "needs the released checkpoint and a reference of 2 GB",
    "python -m tests.fuzz": "takes half an hour; tests/fuzz runs a share of it",
}
"""Beginnings of commands -> why a test cannot run them. They are parsed by what they call, and its --help is run."""
NEEDS_WEIGHTS = ("--ref VIRTUAL_imagenet256_labeled.npz", "lpips", "clip")
"""Of `evaluate`: run too, but networks' weights that are not there end them in one line that says what to put where."""


def reason_not_to_run(command: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if command.startswith(f"{start} ")), None)


def test_there_are_commands_and_no_idle_exception() -> None:
    assert len(COMMANDS) > 25
    assert all(any(c.startswith(f"{start} ") for c in COMMANDS) for start in NOT_RUN)
    assert all(any(part in c for c in COMMANDS) for part in NEEDS_WEIGHTS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy("pixels", tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A folder as the README has it after its first commands: a run, a plan, images of both kinds."""
    folder = tmp_path_factory.mktemp("readme")
    settings = [word for item in (*SMALL, f"model.path={model}") for word in ("--set", item)]
    assert main(["run", str(ROOT / "configs/fashion.yaml"), "--out", str(folder / "runs/fashion"), *settings]) == 0
    plan = next((folder / "runs/fashion").glob("plan-*"))
    plan.rename(folder / "PLAN")
    shutil.copytree(folder / "PLAN", folder / "runs/fashion/plan-best")
    for name, more in (("images", []), ("full", ["--full"])):
        assert main(["sample", str(folder / "PLAN"), str(folder / name), "--count", "2", *more]) == 0
    return folder


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh copy of it to work in, networks of toy size for `--random-weights`, and no hub."""
    folder = tmp_path / "here"
    shutil.copytree(place, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    toys = {"ddpm-cifar10": lambda: pixel_unet(3, layers=2), "sd-v1": lambda: cross_unet(4, 16)}
    monkeypatch.setattr("cachequant.models.architectures.random_denoiser", lambda family, *_: toys[family]())
    return folder


def shrunk(words: list[str], model: Path, folder: Path) -> list[str]:
    """A command's words with paths of the repository, toy models and few steps, images and workers."""
    words = [str(ROOT / word) if (ROOT / word).is_file() else word for word in words]
    configs = [word for word in words if word.startswith(f"{ROOT}/configs/")]
    for option, value in (("--count", "2"), ("--devices", "1"), ("--rounds", "1"), ("--batch", "2")):
        if option in words:
            words[words.index(option) + 1] = value
    if "--modes" in words and find_spec("openvino") is None:
        words[words.index("--modes") + 1] = words[words.index("--modes") + 1].replace("openvino,", "")
    if words[:1] == ["convert"]:
        content = {"state_dict": miniature.latent_weights()}
        checkpoint, config = miniature.write(folder, content, miniature.LATENT)
        return ["convert", "--family", "ldm4-bedroom", "--config", str(config), str(checkpoint), words[-1]]
    if words == [str(ROOT / "scripts/docs.py")]:
        return [*words, "--check"]  # a test writes nothing into the repository
    if not configs and words[:1] != ["demo"]:
        return words
    settings = list(SMALL)
    family = load_config(configs[0]).model.family if configs else ""
    if "--random-weights" not in words and words[:1] != ["demo"]:
        settings.append(f"model.path={save_toy(family, folder / 'model') if family else model}")
        settings.append(f"sampler.prompts={prompts(folder) if family == 'sd-v1' else 'null'}")
    return [*words, *(word for item in settings for word in ("--set", item))]


def prompts(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text("a fox\na dog\n")
    return path


def run_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """A script in this process: its exit status."""
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "path", [str(Path(words[0]).parent), *sys.path])
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("command", [c for c in COMMANDS if reason_not_to_run(c) is None])
def test_command_runs(
    command: str, here: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, *words = shlex.split(command)
    assert program in ("cachequant", "python"), f"add {program} to NOT_RUN, with the reason"
    if program == "cachequant":
        assert build_parser().parse_args(words).run
        status = main(shrunk(words, model, here))
    else:
        earlier = [f"scripts/{name}" for name in sorted(p.name for p in (ROOT / "scripts").glob("[1-6]_*.py"))]
        for script in earlier[: earlier.index(words[0])] if words[0] in earlier else []:
            assert run_script(shrunk([script, *words[1:]], model, here), monkeypatch) == 0
        status = run_script(shrunk(words, model, here), monkeypatch)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    if status == 2 and any(part in command for part in NEEDS_WEIGHTS):
        assert len(errors) == 1 and ("--weights" in errors[0] or "eval" in errors[0] or "no " in errors[0])
    else:
        assert status == 0, errors


@pytest.mark.parametrize("command", [c for c in COMMANDS if reason_not_to_run(c) is not None])
def test_command_that_cannot_run_is_understood_by_what_it_calls(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program, *words = shlex.split(command)
    if program == "cachequant":
        assert build_parser().parse_args(words).run
        with pytest.raises(SystemExit) as stop:
            build_parser().parse_args([words[0], "--help"])
        assert stop.value.code == 0
    elif program == "python":
        file = ROOT / words[1].replace(".", "/") / "__main__.py" if words[0] == "-m" else ROOT / words[0]
        assert run_script([str(file), "--help"], monkeypatch) == 0
        shown = capsys.readouterr().out
        assert all(word in shown for word in words if word.startswith("--"))
    elif program == "make":
        if shutil.which("make") is None:
            pytest.skip("no make")
        subprocess.run(["make", "-n", *words], cwd=ROOT, check=True, capture_output=True)
    else:
        assert program in ("git", "pip") and (ROOT / "pyproject.toml").is_file()


def test_linked_files_and_sections_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)]+)\)", TEXT)
    titles = [
        re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"^##+ (.+)$", TEXT, re.MULTILINE)
    ]
    assert links
    for link in links:
        assert link[1:] in titles if link.startswith("#") else (ROOT / link).is_file(), link


def test_methods_and_configurations_that_are_named_exist() -> None:
    for path in re.findall(r"configs/[\w/]+\.yaml", TEXT):
        assert (ROOT / path).is_file()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", TEXT, flags=re.DOTALL)


def test_the_library_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is printed, with fewer steps and samples."""
    example, small = blocks("python")[0], ", ".join(f'"{item}"' for item in SMALL)
    code = example.replace('"cache.interval=5"', small).replace("num_inference_steps=100", "num_inference_steps=4")
    assert small in code and "=100" not in code
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code.replace('"configs/', f'"{ROOT}/configs/'), "README.md", "exec"), names)
    assert names["images"] is not None and names["reference"] is not None
    assert (tmp_path / "plans" / "fashion-n5-w8a8" / "plan.json").is_file()


def test_a_model_is_added_in_the_three_steps_that_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder, its YAML, its commands, in a folder that holds nothing else."""
    section = TEXT.split("\n## Adding a model in three steps\n")[1].split("\n## ")[0]
    folder, settings = (
        dedent(re.findall(rf" *```{kind}\n(.*?)```", section, flags=re.DOTALL)[0]) for kind in ("python", "yaml")
    )
    steps = [shlex.split(line) for line in re.findall(r"^ +cachequant ([^\n#]+)", section, flags=re.MULTILINE)]
    assert len(steps) >= 2
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(folder, "README.md", "exec"), {})
    name = re.findall(r"cachequant run (\S+)", section)[0]
    Path(name).write_text(settings, encoding="utf-8")
    assert set(yaml.safe_load(settings)) == {"model", "sampler", "cache"}
    small = [word for item in SMALL for word in ("--set", item)]
    for words in steps:
        assert main([*words, *(small if words[0] == "run" else [])]) == 0
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
