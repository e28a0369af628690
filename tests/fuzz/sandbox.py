"""Runs an action in a forked process that is limited in time and memory and watched for what it writes where."""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

MEMORY = 3 << 30
"""Bytes that an action may map beside what its parent has."""
SECONDS, GRACE = 60.0, 15.0
"""How long an action may take before it is asked to stop (Ctrl-C), and how long it may take to do so before it is killed."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    "os.mkdir": {0: 2}, "os.rename": {0: 2, 1: 3}, "os.remove": {0: 1}, "os.rmdir": {0: 1}, "os.symlink": {1: 2},
    "os.link": {1: 3}, "os.truncate": {0: None}, "shutil.rmtree": {0: 1},
}  # fmt: skip
"""Audit event -> {place of a path that it changes among its arguments: that of the folder it is relative to}."""
_PROGRAMS = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"}


@dataclass(frozen=True)
class Ending:
    """How an action ended.

    Attributes:
        status: exit status; the negative number of a signal.
        output, errors: what it printed.
        seconds: how long it took.
        stopped: whether it was asked to stop, after `SECONDS` or by `interrupt_after`.
        outside: what it wrote outside of the allowed folders, and programs that it started.
    """

    status: int
    output: str
    errors: str
    seconds: float
    stopped: bool
    outside: tuple[str, ...]

    def problem(self) -> str | None:
        """What is wrong with this ending; None for a finished run, a one-line error or a stop that was asked for."""
        if self.outside:
            return f"touched {self.outside[0]}"
        if "Traceback" in self.errors or "Traceback" in self.output:
            return f"traceback: {self.errors.strip().splitlines()[-1][:200]}"
        lines = [line for line in self.errors.splitlines() if line.startswith(("error: ", "interrupted: "))]
        expected = {0: 0, 2: 1, 130: 1}.get(self.status)
        if expected is None or (self.status == 130 and not self.stopped):
            return f"status {self.status}: {self.errors.strip()[-200:]}"
        last = self.errors.strip().splitlines()[-1:]
        return None if len(lines) == expected and (not lines or lines == last) else f"status {self.status} says {last}"


def fork(action: Callable[[], int], prepare: Callable[[], None] = lambda: None, log: Path | None = None) -> int:
    """Start an action in a copy of this process: its id. Its output goes to `log`.out and `log`.err, default nowhere."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # an early Ctrl-C waits until the copy is ready for it
    try:
        with warnings.catch_warnings():  # newer Pythons warn of threads, of which the parent has none at work
            warnings.simplefilter("ignore", DeprecationWarning)
            process = os.fork()
        if process:
            return process
        _be_child(action, prepare, log)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _be_child(action: Callable[[], int], prepare: Callable[[], None], log: Path | None) -> NoReturn:
    """Run an action and end this process, whatever happens: nothing of the parent's may go on in it."""
    status = 70
    try:
        for number, name in ((1, ".out"), (2, ".err")):
            path = os.devnull if log is None else f"{log}{name}"
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        prepare()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = _status(action)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _status(action: Callable[[], int]) -> int:
    """Exit status of an action, with a traceback of what it raises."""
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return action()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 70


def wait(process: int, seconds: float) -> int | None:
    """Exit status of a process, the negative number of a signal; None if it is still there after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            return None
        time.sleep(0.002)


def run(
    action: Callable[[], int],
    folder: Path,
    allowed: Sequence[Path],
    seconds: float = SECONDS,
    grace: float = GRACE,
    memory: int | None = MEMORY,
    prepare: Callable[[], None] = lambda: None,
) -> Ending:
    """Run an action to its end.

    Args:
        action: returns an exit status.
        folder: it works there.
        allowed: the folders that it may write to.
        seconds: it is then asked to stop.
        grace: seconds after which it is killed.
        memory: bytes it may map beside what this process has; None is any number.
        prepare: called in the new process before it.
    """
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        watch = os.open(f"{log}.watch", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)

        def limit() -> None:
            os.chdir(folder)
            prepare()
            if memory is not None:
                bound = _mapped() + memory
                resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            _watch_writes(watch, [*allowed, Path(place)])

        start = time.monotonic()
        process = fork(action, limit, log)
        status = wait(process, seconds)
        stopped = status is None
        if status is None:
            os.kill(process, signal.SIGINT)
            status = wait(process, grace)
        if status is None:
            os.kill(process, signal.SIGKILL)
            status = wait(process, 60.0)
        assert status is not None
        took = time.monotonic() - start
        os.close(watch)
        texts = [Path(f"{log}{end}").read_text(errors="replace") for end in (".out", ".err", ".watch")]
        return Ending(status, texts[0], texts[1], took, stopped, tuple(texts[2].splitlines()))


def _mapped() -> int:
    """Bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _from_folder(arguments: tuple[Any, ...], path: int, folder: int | None) -> Any:
    """The path among an audit event's arguments, put behind the folder that it is relative to."""
    descriptor = -1 if folder is None or len(arguments) <= folder else arguments[folder]
    if descriptor is None or descriptor < 0:
        return arguments[path]
    return os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), os.fsdecode(arguments[path]))


def _watch_writes(log: int, allowed: Sequence[Path]) -> None:
    """Note every path outside of `allowed` that is opened for writing or changed, and every program that is started."""
    roots = tuple(os.path.realpath(path) + os.sep for path in allowed)

    def is_allowed(path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return True  # a descriptor that is open already
        real = os.path.realpath(os.fsdecode(path))
        return real in ("/dev/null", "/dev/full") or f"{real}{os.sep}".startswith(roots)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _PROGRAMS:
            touched: list[Any] = [f"program {arguments[0]}"]
        elif event == "open":
            path, _, flags = arguments
            touched = [path] if flags and flags & _WRITES and not is_allowed(path) else []
        elif event in _CHANGES:
            paths = [_from_folder(arguments, *places) for places in _CHANGES[event].items()]
            touched = [path for path in paths if not is_allowed(path)]
        else:
            return
        for path in touched:
            os.write(log, f"{event} {path!r}\n".encode(errors="replace"))

    sys.addaudithook(hook)
