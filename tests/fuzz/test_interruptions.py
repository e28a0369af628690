"""One run of each kind that `python -m tests.fuzz` interrupts, two runs at once, and folders that cannot be written."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cachequant.cli import main
from tests.fuzz.interruptions import CONFIG, Interruption, command
from tests.fuzz.ready import ready_model
from tests.fuzz.sandbox import Ending, fork, run, wait


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ready_model(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def interruption(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Interruption:
    return Interruption(model, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("kind", ["kill", "interrupt", "limit_files"])
def test_the_next_run_ends_with_the_bytes_of_a_whole_one(kind: str, interruption: Interruption, tmp_path: Path) -> None:
    _, problem, said = getattr(interruption, kind)(3, tmp_path)
    assert problem is None, said


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Look again and again until it holds, but not for ever."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.01)


def test_the_second_of_two_runs_in_one_folder_is_refused_and_the_first_is_not_disturbed(
    model: Path, tmp_path: Path
) -> None:
    first = fork(lambda: main(command(model)), lambda: os.chdir(tmp_path))
    lock = tmp_path / "out" / ".lock"
    others = [
        command(model),
        ["calibrate", CONFIG, "elsewhere", *command(model)[4:], "--set", "output=.", "--set", "model.name=out"],
    ]
    try:
        wait_until(lambda: lock.is_file() and lock.read_text() != "", f"{lock} is there")
        os.kill(first, signal.SIGSTOP)
        endings = [run(lambda words=words: main(words), tmp_path, [tmp_path]) for words in others]
        os.kill(first, signal.SIGCONT)
        status = wait(first, 120)
    except BaseException:
        os.kill(first, signal.SIGKILL)
        raise
    assert status == 0
    for ending in endings:
        assert ending.status == 2 and ending.problem() is None
        assert f"being written by process {first}" in ending.errors


def obey_permissions() -> None:
    """Root gives up the right to write what is read-only."""
    if os.geteuid() == 0:
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None, use_errno=True).capset(header, none) == 0


def in_read_only(words: list[str], folder: Path) -> Ending:
    """A command while `folder` and everything in it is read-only."""
    places = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for place in places:
        place.chmod(0o555)
    try:
        return run(lambda: main(words), folder.parent, [folder], prepare=obey_permissions)
    finally:
        for place in places:
            place.chmod(0o755)


def test_a_folder_that_cannot_be_written_is_one_line_and_one_that_need_not_be_is_used(
    model: Path, tmp_path: Path
) -> None:
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    ended = in_read_only(command(model, "empty/out"), empty)
    assert ended.status == 2 and "cannot make folder" in ended.errors and ended.problem() is None
    ended = in_read_only(command(model, "empty"), empty)
    assert ended.status == 2 and "cannot write empty/.lock" in ended.errors and ended.problem() is None
    assert run(lambda: main(command(model)), tmp_path, [out]).status == 0
    plan = next(out.glob("plan-*"))
    ended = in_read_only(["sample", str(plan), str(plan / "more"), "--count", "2"], plan)
    assert ended.status == 2 and "choose a writable one" in ended.errors and ended.problem() is None
    ended = in_read_only(["report", str(plan), "--count", "1"], plan)
    assert ended.status == 2 and "report.html" in ended.errors and ended.problem() is None
    assert in_read_only(["inspect", str(plan)], plan).status == 0
