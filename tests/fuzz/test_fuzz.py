"""A small share of `python -m tests.fuzz`: the same cases of the first seeds, and the sandbox on actions that misbehave."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import plans, yamls
from tests.fuzz.__main__ import warm_up
from tests.fuzz.sandbox import run

COUNT = 8
"""Seeds of each kind."""


def loop() -> int:
    while True:
        time.sleep(0.01)


def deaf() -> int:
    while True:
        try:
            time.sleep(0.01)
        except KeyboardInterrupt:
            continue


def take_memory() -> int:
    return len(bytearray(4 << 30))


def write_outside() -> int:
    Path("../outside").write_text("")
    return 0


def start_program() -> int:
    return os.system("true")


def say_nothing() -> int:
    return 2


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (take_memory, "traceback: MemoryError"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM) or 0, "status -15"),
        (write_outside, "touched open"),
        (start_program, "touched os.system"),
        (say_nothing, "status 2 says []"),
        (lambda: 0, None),
    ],
)
def test_the_sandbox_sees_what_goes_wrong(action: Callable[[], int], expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    problem = run(action, tmp_path / "in", [tmp_path / "in"], memory=1 << 30).problem()
    assert problem == expected or (problem is not None and expected is not None and problem.startswith(expected))


@pytest.mark.parametrize(
    ("action", "limits", "expected"),
    [
        (loop, {"seconds": 0.5}, "traceback: KeyboardInterrupt"),
        (deaf, {"seconds": 3.0, "grace": 0.5}, "status -9"),  # it must be deaf by then, on a busy machine too
    ],
)
def test_the_sandbox_ends_what_does_not_end(
    action: Callable[[], int], limits: dict[str, float], expected: str, tmp_path: Path
) -> None:
    ending = run(action, tmp_path, [tmp_path], **limits)
    problem = ending.problem()
    assert ending.stopped and problem is not None and problem.startswith(expected)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    return warm_up(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", ["yaml", "plans"])
def test_mutants_end_in_one_line_or_run(kind: str, ready: tuple[Path, list[Path]], tmp_path: Path) -> None:
    model, bases = ready
    statuses, failures = set(), []
    for seed in range(COUNT):
        folder = tmp_path / str(seed)
        folder.mkdir()
        check = yamls.check(seed, model, folder) if kind == "yaml" else plans.check(seed, bases, folder)
        ending, problem, done = check
        statuses.add(ending.status)
        failures += [f"{seed} ({done}): {problem}"] if problem else []
    assert not failures
    assert {0, 2} <= statuses  # some still run, some are refused
