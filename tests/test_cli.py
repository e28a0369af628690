"""The command line's contract: what it prints and writes, and one line with status 2 for a user's mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cachequant.cli import build_parser, guarded, main, stage_main
from cachequant.config import repository_folder

ROOT = repository_folder()
CONFIG = str(ROOT / "configs" / "fashion.yaml")
SMALL = [
    "sampler.steps=4", "cache.interval=2", "calibration.samples=2", "calibration.batch_size=2", "sample.count=2",
    "sample.batch_size=2", "schedule.fallback=false",
]  # fmt: skip
SET = [word for item in SMALL for word in ("--set", item)]


def test_help_of_every_command_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out
    for command in ("demo", "run", "calibrate", "sample", "evaluate", "report", "inspect", "export", "import"):
        with pytest.raises(SystemExit) as stop:
            build_parser().parse_args([command, "--help"])
        text = capsys.readouterr().out
        assert stop.value.code == 0
        assert len(text.splitlines()) < 25 and "--json" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "absent.yaml"], "no configuration file absent.yaml"),
        (["run", CONFIG, "--set", "cache.intervall=3"], "did you mean cache.interval?"),
        (["run", CONFIG, "--set", "cache.interval=0"], "cache.interval is 0"),
        (
            ["run", CONFIG, "--set", "cache.branch=9", "--set", "method=naive"],
            "cache.branch is 9, expected 0 to 5",
        ),
        (["run", CONFIG, "--set", "sampler.steps=2000"], "expected at most 1000"),
        (["run", CONFIG, "--set", "model.path=nowhere/at/all"], "no pipeline nowhere/at/all"),
        (["run", CONFIG, "--device", "cuda:77"], "device is 'cuda:77'"),
        (["run", CONFIG, "--set", "cache.speedup=3", "--devices", "2"], "a time budget with 2 workers"),
        (["inspect", "absent"], "no plan in absent"),
        (["sample", "absent", "out"], "no plan in absent"),
    ],
)
def test_a_mistake_is_one_line_and_status_two(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not list(tmp_path.rglob("*.safetensors"))


def fill_memory() -> None:
    torch.empty(2**55)


def read_nowhere() -> None:
    Path("x" * 5000).read_text()


def run_out() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (fill_memory, "error: out of memory: lower calibration.batch_size and sample.batch_size"),
        (run_out, "error: out of memory: lower"),
        (read_nowhere, "error: cannot use xxx"),
    ],
)
def test_what_the_machine_refuses_is_one_line(
    action: Callable[[], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert guarded(action) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(message) and len(lines[0]) < 200


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    def fault() -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        guarded(fault)


def test_a_reader_that_has_seen_enough_ends_it_quietly() -> None:
    program = "import sys; from cachequant.cli import guarded; sys.exit(guarded(lambda: print('x' * 2**20)))"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141 and not errors


def test_an_unwritable_folder_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert main(["run", CONFIG, *SET, "--set", "method=naive", "--out", str(blocker / "run")]) == 2
    assert "cannot make folder" in capsys.readouterr().err


def test_run_inspect_sample_and_calibrate_work_together(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, note = str(tmp_path / "run"), tmp_path / "run.json"
    assert main(["run", CONFIG, *SET, "--out", out, "--json", str(note)]) == 0
    made = json.loads(note.read_text())
    assert set(made) == {"plan", "images", "refresh_steps", "seconds"}
    assert len(made["refresh_steps"]) == 2 and made["refresh_steps"][0] == 0
    assert (Path(made["images"]) / "grid.png").is_file()
    assert main(["inspect", made["plan"], "--json", str(note)]) == 0
    assert json.loads(note.read_text())["schedule"]["refresh_steps"] == made["refresh_steps"]
    capsys.readouterr()
    assert main(["sample", made["plan"], str(tmp_path / "images"), "--count", "1"]) == 0
    assert "1 images, of which 1 drawn now in" in capsys.readouterr().out
    assert main(["sample", made["plan"], str(tmp_path / "images"), "--count", "1", "--full"]) == 2
    assert "holds other images (of plan" in capsys.readouterr().err
    assert main(["sample", made["plan"], str(tmp_path / "images"), "--set", "cache.interval=3"]) == 2
    assert "sample.* keys or backend only" in capsys.readouterr().err


def test_numbered_scripts_run_in_order_and_share_their_outputs(tmp_path: Path) -> None:
    assert stage_main(2, [CONFIG, *SET, "--out", str(tmp_path)]) == 2
    for number in range(1, 7):
        assert stage_main(number, [CONFIG, *SET, "--set", "method=paper", "--out", str(tmp_path)]) == 0
    assert {p.name[0] for p in tmp_path.iterdir()} == set("123456p.")  # .lock


def test_each_numbered_script_is_its_stage() -> None:
    scripts = sorted((ROOT / "scripts").glob("[1-6]_*.py"))
    assert len(scripts) == 6
    for number, script in enumerate(scripts, 1):
        assert f"stage_main({number})" in script.read_text()


def test_a_killed_run_keeps_finished_stages_and_goes_on(tmp_path: Path) -> None:
    """SIGKILL after stage 1: the next run takes stage 1 as it is and finishes with no half-written file left behind."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "cachequant",
        "run",
        CONFIG,
        *SET,
        "--set",
        "method=paper",
        "--out",
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "1 schedule" in line:
                process.kill()
                break
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "1 calibrate: current" in finished.stderr
    assert not list(tmp_path.rglob("*.tmp"))
