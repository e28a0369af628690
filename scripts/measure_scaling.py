"""Images a second with one worker and with several: how well sampling scales on this machine.

    python scripts/measure_scaling.py PLAN --workers 1,2 --count 512 --batch-size 16 --rounds 3 [--device cuda] [--json FILE]

Each number of workers draws the same images into an empty folder, in turn, `--rounds` times; its seconds are the median.
Loading the model is not timed, the wait for the last worker is. A batch that is drawn before and not counted leaves compiled
and tuned kernels on disk, which the first run would else make while it is timed. Choose a count that takes minutes, and a
multiple of workers × shard (64 images, or the batch size where that is larger), so that every worker has as much to do.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from cachequant.cli import guarded
from cachequant.errors import UserError
from cachequant.storage import load_json, save_json


def measure(args: argparse.Namespace, workers: int, count: int) -> dict[str, float]:
    """Draw so many images with so many workers: {workers, images, seconds}."""
    with tempfile.TemporaryDirectory() as scratch:
        note = Path(scratch) / "note.json"
        command = [sys.executable, "-m", "cachequant", "sample", str(args.plan), str(Path(scratch) / "images")]
        command += ["--count", str(count), "--set", f"sample.batch_size={args.batch_size}"]
        command += ["--device", args.device, "--devices", str(workers), "--json", str(note)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            raise UserError(f"sampling with {workers} workers ended with status {done.returncode}: see its message")
        made = load_json(note)
    return {"workers": workers, "images": made["drawn"], "seconds": made["seconds"]}


def compare(runs: list[dict[str, float]]) -> list[dict[str, Any]]:
    """A row for each number of workers: median seconds, all seconds, images a second, the speed-up over the first row, and
    that over what its additional workers promise.
    """
    rows: list[dict[str, Any]] = []
    for workers in dict.fromkeys(run["workers"] for run in runs):
        mine = [run for run in runs if run["workers"] == workers]
        seconds = [run["seconds"] for run in mine]
        rows.append(
            {"workers": workers, "images": mine[0]["images"], "seconds": statistics.median(seconds), "runs": seconds}
        )
    for row in rows:
        row["images_per_second"] = row["images"] / row["seconds"]
    first = rows[0]
    for row in rows:
        row["speed_up"] = row["images_per_second"] / first["images_per_second"]
        row["efficiency"] = row["speed_up"] / (row["workers"] / first["workers"])
    return rows


def machine() -> dict[str, Any]:
    """What it was measured on."""
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "gpus": names,
        "processor": platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="plan folder")
    parser.add_argument(
        "--workers", default="1,2", help="numbers of workers, the first is what the others are compared with"
    )
    parser.add_argument("--count", type=int, default=512, help="images")
    parser.add_argument("--batch-size", type=int, default=16, help="images at once in each worker")
    parser.add_argument("--rounds", type=int, default=1, help="times that each number is measured")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)

    def action() -> None:
        if args.rounds < 1:
            raise UserError(f"--rounds is {args.rounds}, expected at least 1")
        numbers = [int(workers) for workers in args.workers.split(",")]
        measure(args, numbers[0], args.batch_size)
        rows = compare([measure(args, workers, args.count) for _ in range(args.rounds) for workers in numbers])
        for row in rows:
            print("{workers:3d} workers {images_per_second:9.3f} images/s {speed_up:6.2f}×".format(**row))
        if args.json is not None:
            command = "python scripts/measure_scaling.py " + " ".join(argv or sys.argv[1:])
            save_json(args.json, {"rows": rows, "machine": machine(), "command": command})

    return guarded(action)


if __name__ == "__main__":
    sys.exit(main())
