"""Runs that are killed, interrupted or out of space, and what the next run makes of what they left."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from cachequant.cli import main
from cachequant.config import repository_folder
from cachequant.storage import file_hash, load_json
from tests.fuzz.sandbox import Ending, fork, run, wait

CONFIG = str(repository_folder() / "configs" / "fashion.yaml")
SETTINGS = (
    "sampler.steps=6", "cache.interval=2", "calibration.samples=4", "calibration.batch_size=2", "sample.count=66",
    "sample.batch_size=2", "schedule.fallback=false", "device=cpu",
)  # fmt: skip
"""Of a run of some seconds; its images are two shards."""
TIMED = {"done.json", "measured.json", "seconds.json", "plan.json", ".lock"}
"""Files that hold seconds by the clock, or hashes of these."""
STAGES = 8
"""Folders of a finished run: calibrate, schedule, features, cache fit, weights, tables, quantised fit, samples."""


def command(model: Path, out: str = "out", *settings: str) -> list[str]:
    """`cachequant run` on a toy model."""
    given = [word for item in (*SETTINGS, f"model.path={model}", *settings) for word in ("--set", item)]
    return ["run", CONFIG, "--out", out, *given]


def content(out: Path) -> dict[str, str]:
    """Hashes of every file of a run folder but for those that hold seconds; of a plan's record what holds none."""
    found = {str(p.relative_to(out)): file_hash(p) for p in out.rglob("*") if p.is_file() and p.name not in TIMED}
    for path in out.glob("plan-*/plan.json"):
        record = load_json(path)
        found[str(path.relative_to(out))] = str(
            {key: record[key] for key in sorted(record) if key not in ("checksum", "provenance")}
        )
    return found


class Interruption:
    """Ends runs at random moments and checks that the next one finishes as if nothing had happened.

    Args:
        model: toy model.
        folder: for the run that nothing interrupts.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        self.model = model
        start = time.monotonic()
        self._finish(folder)
        self.seconds = time.monotonic() - start
        self.whole = content(folder / "out")
        assert len({name.split("/")[0] for name in self.whole if name[0].isdigit()}) == STAGES

    def _finish(self, folder: Path) -> Ending:
        ending = run(lambda: main(command(self.model)), folder, [folder / "out"], seconds=120)
        assert ending.status == 0, ending.errors[-500:]
        return ending

    def _check_rest(self, folder: Path, ending: Ending, said: str) -> tuple[Ending, str | None, str]:
        """The next run: it must finish, and with the bytes of the run that nothing interrupted."""
        last = run(lambda: main(command(self.model)), folder, [folder / "out"], seconds=120)
        problem = ending.problem() or last.problem()
        if problem is None and (last.status != 0 or content(folder / "out") != self.whole):
            found, whole = content(folder / "out"), self.whole
            names = sorted({*found, *whole})
            different = [name for name in names if found.get(name) != whole.get(name)]
            problem = f"the next run ended with status {last.status} and differs in {different[:3]}"
        return ending, problem, said

    def kill(self, seed: int, folder: Path) -> tuple[Ending, str | None, str]:
        """kill -9 at a random moment, in one case of four twice in a row."""
        draw, said = random.Random(f"kill {seed}"), []
        for _ in range(draw.choice((1, 1, 1, 2))):
            process = fork(lambda: main(command(self.model)), lambda: os.chdir(folder))
            moment = draw.uniform(0, self.seconds)
            if wait(process, moment) is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                wait(process, 60)
            said.append(f"{moment:.2f} s, {len(list((folder / 'out').glob('[1-6]_*')))} folders")
        return self._check_rest(folder, Ending(0, "", "", 0.0, True, ()), f"killed after {' and '.join(said)}")

    def interrupt(self, seed: int, folder: Path) -> tuple[Ending, str | None, str]:
        """Ctrl-C at a random moment."""
        moment = random.Random(f"interrupt {seed}").uniform(0.05, 0.95 * self.seconds)
        ending = run(lambda: main(command(self.model)), folder, [folder / "out"], seconds=moment)
        return self._check_rest(folder, ending, f"Ctrl-C after {moment:.2f} s")

    def limit_files(self, seed: int, folder: Path) -> tuple[Ending, str | None, str]:
        """No file may grow beyond a random size; what the run says fits."""
        size = int(10 ** random.Random(f"files {seed}").uniform(3.3, 5))

        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does when it starts
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        return self._without_room(folder, limit, f"files of at most {size} bytes", lambda: None)

    def fill_disk(self, seed: int, folder: Path) -> tuple[Ending, str | None, str]:
        """A file system of a random size, which is later made larger; only root may mount one."""
        size, out = int(10 ** random.Random(f"disk {seed}").uniform(0.9, 2.7)), str(folder / "out")
        os.mkdir(out)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", out], check=True)
        try:
            grow = ["mount", "-o", "remount,size=64m", out]
            return self._without_room(folder, lambda: None, f"{size} kB", lambda: subprocess.run(grow, check=True))
        finally:
            subprocess.run(["umount", out], check=True)

    def _without_room(
        self, folder: Path, limit: Callable[[], None], said: str, make_room: Callable[[], object]
    ) -> tuple[Ending, str | None, str]:
        ending = run(lambda: main(command(self.model)), folder, [folder / "out"], seconds=120, prepare=limit)
        left = [path.name for path in folder.rglob("*.tmp")]
        make_room()
        ended, problem, said = self._check_rest(folder, ending, said)
        return ended, problem or (f"left {left[0]}" if left else None), said
