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
SAMPLING_SECONDS = 75
PACKING_SECONDS = 12
STATUS_SECONDS = 20


@dataclass
class Job:
    """One program, its log and its process."""

    name: str
    arguments: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    file: IO[bytes] | None = None

    def start(self, environment: dict[str, str]) -> None:
        """Runs it in the background."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.log.open("wb")
        command = [sys.executable, "-u", *self.arguments]
        self.process = subprocess.Popen(command, stdout=self.file, stderr=subprocess.STDOUT, env=environment)

    def state(self) -> str:
        """Its exit status, or "runs", and the last line that it printed."""
        code = self.process.poll() if self.process else None
        lines = self.log.read_bytes()[-2000:].decode(errors="replace").replace("\r", "\n").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{'runs' if code is None else f'exit {code}'}: {last[-110:]}"

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

    def minutes(share: float) -> list[str]:
        return ["--minutes", f"{share * options.seconds / 60.0:.3f}"]

    until = 1.0 - SAMPLING_SECONDS / options.seconds
    common = ["--device", options.device]
    common += ["--batch-size", str(options.batch_size)] if options.batch_size else []
    result = []
    for name in options.only:
        data = ["--data", str(options.drawings if name.startswith("drawings") else options.fashion)]
        if name == JUDGE:
            arguments = [str(SCRIPTS / "train_drawings_clip.py"), *minutes(0.4), *common, *data]
            result.append(Job(name, [*arguments, "--out", str(options.work / name)], logs / f"{name}.log"))
            continue
        first_stage = options.work / name / FIRST_STAGES[name]
        share = 0.25 if name.startswith("drawings") else 0.15
        if not (first_stage / "training.json").is_file():
            arguments = [str(SCRIPTS / "train_autoencoder.py"), name, *minutes(share), *common, *data]
            title = f"{name}-autoencoder"
            result.append(Job(title, [*arguments, "--out", str(first_stage)], logs / f"{title}.log"))
        script = SCRIPTS / f"train_{name.replace('-', '_')}.py"
        arguments = [str(script), *minutes(until), *common, *data, "--out", str(options.work / name)]
        arguments += ["--wait", f"{(share + 0.2) * options.seconds / 60.0:.3f}", "--checkpoint-every", "1000"]
        arguments += ["--judge", str(options.work / JUDGE)] if name.startswith("drawings") else []
        arguments += ["--samples", str(options.samples)] if name.startswith("fashion") else []
        arguments += ["--compile"] if options.device == "cuda" else []
        if options.start_from:
            arguments += ["--start-from", str(options.start_from / name)]
        if options.resume and (REPOSITORY / "runs" / name / "last.ckpt").is_file():
            arguments += ["--resume"]
        result.append(Job(name, arguments, logs / f"{name}.log"))
    return result


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
    environment = {"PYTHONPATH": str(REPOSITORY), "TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": "4"}
    environment = {**environment, **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    for job in running:
        job.start(environment)
    end = begin + options.seconds - PACKING_SECONDS
    next_status = begin
    while time.monotonic() < end and any(job.process and job.process.poll() is None for job in running):
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
