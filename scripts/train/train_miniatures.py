"""Trains the three latent miniatures and the judge of drawings side by side on one device, within a time limit.

    python scripts/train/train_miniatures.py --seconds 570 --out out
    python scripts/train/train_miniatures.py --seconds 480 --out out --start-from assets

Each program runs in its own process and writes to `--work`; what is there at the end, whether or not all of them got
through, is packed into `--out` as one archive a miniature, to be unpacked in assets/. First stages that are in `--work`
already, or in the folder of `--start-from`, are kept; with `--resume` the denoisers go on from their checkpoints.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

SCRIPTS = Path(__file__).resolve().parent
REPOSITORY = SCRIPTS.parents[1]
FIRST_STAGES = {"fashion-ldm": "vqvae", "fashion-dit": "vae", "drawings-sd": "vae"}
JUDGE = "drawings-clip"
COMPILE = "--compile"
SAMPLING_SECONDS = 75
PACKING_SECONDS = 12
STATUS_SECONDS = 20


@dataclass
class Job:
    """One program, the second at which its training ends, its log and its process."""

    name: str
    arguments: list[str]
    until: float
    log: Path
    process: subprocess.Popen[bytes] | None = None
    file: IO[bytes] | None = None

    def start(self, elapsed: float, environment: dict[str, str]) -> None:
        """Runs it in the background."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.log.open("ab")
        command = [sys.executable, "-u", *self.arguments, "--minutes", f"{(self.until - elapsed) / 60.0:.3f}"]
        self.process = subprocess.Popen(command, stdout=self.file, stderr=subprocess.STDOUT, env=environment)

    def state(self) -> str:
        """Its exit status, or "runs", and the last line that it printed."""
        code = self.process.poll() if self.process else None
        lines = self.log.read_bytes()[-2000:].decode(errors="replace").replace("\r", "\n").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{'runs' if code is None else f'exit {code}'}: {last[-110:]}"

    def crashed(self) -> bool:
        """Whether it ended with an error."""
        return self.process is not None and self.process.poll() not in (None, 0)

    def stop(self) -> None:
        """Ends it if it still runs."""
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.file:
            self.file.close()


def jobs(options: argparse.Namespace) -> list[Job]:
    """The programs that are left to run."""
    logs = options.work / "logs"

    common = ["--device", options.device]
    common += ["--batch-size", str(options.batch_size)] if options.batch_size else []
    result = []

    def add(title: str, script: str, share: float, *arguments: str) -> None:
        command = [str(SCRIPTS / script), *arguments, *common]
        result.append(Job(title, command, share * options.seconds, logs / f"{title}.log"))

    for name in options.only:
        out, drawings = str(options.work / name), name.startswith("drawings")
        data = ("--data", str(options.drawings if drawings else options.fashion))
        if name == JUDGE:
            add(name, "train_drawings_clip.py", 0.4, *data, "--out", out)
            continue
        first_stage = options.work / name / FIRST_STAGES[name]
        share = 0.27 if drawings else 0.2
        if not (first_stage / "training.json").is_file():
            add(f"{name}-autoencoder", "train_autoencoder.py", share, name, *data, "--out", str(first_stage))
        arguments = [*data, "--out", out, "--wait", f"{options.seconds / 60.0:.3f}"]
        arguments += ["--judge", str(options.work / JUDGE)] if drawings else ["--samples", str(options.samples)]
        arguments += ["--checkpoint-every", "1000"]
        arguments += [COMPILE] if options.device == "cuda" else []
        arguments += ["--start-from", str(options.start_from / name)] if options.start_from else []
        resumed = options.resume and (REPOSITORY / "runs" / name / "last.ckpt").is_file()
        arguments += ["--resume"] if resumed else []
        add(name, f"train_{name.replace('-', '_')}.py", 1.0 - SAMPLING_SECONDS / options.seconds, *arguments)
    return result


def retry(crashed: list[Job], elapsed: float, environment: dict[str, str]) -> None:
    """Starts programs that crashed while compiled once more, uncompiled."""
    for job in crashed:
        if COMPILE in job.arguments and elapsed < job.until:
            print(f"{job.name} failed, again without {COMPILE}: {job.state()}", flush=True)
            job.arguments.remove(COMPILE)
            job.start(elapsed, environment)


def adopt(options: argparse.Namespace) -> None:
    """Copies the first stages, and the judge, of the folder to start from."""
    for name, part in [*FIRST_STAGES.items(), (JUDGE, "")]:
        source, target = options.start_from / name / part, options.work / name / part
        if (source / "training.json").is_file() and not target.is_dir():
            shutil.copytree(source, target)


def pack(options: argparse.Namespace) -> None:
    """One archive for each folder in the work folder."""
    options.out.mkdir(parents=True, exist_ok=True)
    for folder in sorted(path for path in options.work.iterdir() if path.is_dir()):
        path = options.out / f"{folder.name}.tar.gz"
        with tarfile.open(path, "w:gz", compresslevel=4) as archive:
            archive.add(folder, arcname=folder.name)
        print(f"{path} {path.stat().st_size / 1e6:.1f} MB", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=570.0, help="everything, packing included")
    parser.add_argument("--out", type=Path, required=True, help="folder of the archives")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "runs" / "miniatures")
    parser.add_argument("--only", nargs="+", choices=(*FIRST_STAGES, JUDGE), default=[*FIRST_STAGES, JUDGE])
    parser.add_argument("--start-from", type=Path, help="folder of exported miniatures to go on from")
    parser.add_argument("--resume", action="store_true", help="go on from checkpoints in runs/ where there are any")
    parser.add_argument("--fashion", type=Path, default=REPOSITORY / ".data" / "fashion")
    parser.add_argument("--drawings", type=Path, default=REPOSITORY / ".data" / "drawings.npz")
    parser.add_argument("--samples", type=int, default=5000, help="for the Fréchet distances")
    parser.add_argument("--batch-size", type=int, help="of every program, instead of its own")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=device)
    options = parser.parse_args(argv)
    if options.start_from:
        adopt(options)
    running = jobs(options)
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": "4", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    for job in running:
        job.start(time.monotonic() - begin, environment)
    end = begin + options.seconds - PACKING_SECONDS
    next_status = begin
    while time.monotonic() < end and any(job.process and job.process.poll() is None for job in running):
        retry([job for job in running if job.crashed()], time.monotonic() - begin, environment)
        if time.monotonic() >= next_status:
            next_status += STATUS_SECONDS
            print(f"-- {time.monotonic() - begin:.0f} s", flush=True)
            for job in running:
                print(f"   {job.name}: {job.state()}", flush=True)
        time.sleep(0.5)
    for job in running:
        job.stop()
        print(f"{job.name}: {job.state()}", flush=True)
    pack(options)


if __name__ == "__main__":
    main()
