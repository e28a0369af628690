"""Seconds an image takes with each method, on real integers where they are, in turn: what corrections cost at run time.

    python scripts/measure_run_time.py configs/fashion.yaml --methods paper,best --rounds 5 [--set KEY=VALUE] [--json FILE]
    python scripts/measure_run_time.py configs/fashion.yaml --speedups 3,6,9

Every method is calibrated first, then all of them draw the same `--count` images in turn, `--rounds` times; a batch before
each draw is not counted. Rows have the medians, and their ratio to the first method's in the same rounds. With `--speedups`
the untouched model comes first, and `best` follows with each as `cache.speedup`: what was asked beside what was reached.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import cachequant as cq
from cachequant.cli import guarded
from cachequant.errors import UserError
from cachequant.pipeline.at_work import at_work, backend_of
from cachequant.pipeline.context import Context
from cachequant.pipeline.graphed_step import deployed_sampler
from cachequant.pipeline.stages import Stages
from cachequant.plan import Plan
from cachequant.storage import save_json

UNTOUCHED = "full"


def seconds_of(context: Context, plan: Plan | None, count: int, label: str) -> float:
    """Wall-clock seconds of drawing `count` images, decoded; setting up and one batch before are not counted.

    No plan is the untouched model.
    """
    size, first = context.config.sample.batch_size, context.config.sample.seed
    with at_work(context, plan) as running:
        sampler = deployed_sampler(context.pipe.scheduler, running.network)

        def run(number: int) -> None:
            seeds = list(range(first, first + number))
            images = list(context.run(running.step, running.cache, seeds, label, size, True, sampler))
            assert sum(len(part.cpu()) for part in images) == number  # waits for the device

        run(min(size, count))
        start = time.perf_counter()
        run(count)
        return time.perf_counter() - start


def compare(runs: dict[str, list[float]], count: int) -> list[dict[str, Any]]:
    """A row for each method: median seconds an image, all runs' seconds, and the median over rounds of its time over that of
    the first method in the same round.
    """
    base = next(iter(runs.values()))
    return [
        {
            "method": method,
            "seconds_per_image": statistics.median(seconds) / count,
            "runs": seconds,
            "against_first": statistics.median(mine / its for mine, its in zip(seconds, base, strict=True)),
        }
        for method, seconds in runs.items()
    ]


def settings_of(args: argparse.Namespace) -> dict[str, list[str]]:
    """Row -> its settings; with speed-ups the untouched model and one row for each, else one for each method."""
    if args.speedups is None:
        return {method: [f"method={method}"] for method in args.methods.split(",")}
    asked = {f"{float(x):g}x": ["method=best", f"cache.speedup={float(x)}"] for x in args.speedups.split(",")}
    return {UNTOUCHED: [], **asked}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate, draw in turn: {rows, backend, …}.

    Raises:
        UserError: no rounds or no images, or an unknown method.
    """
    if args.rounds < 1 or args.count < 1:
        raise UserError(f"--rounds is {args.rounds} and --count {args.count}, expected at least 1 of each")
    pipe, ready = None, dict[str, tuple[Context, Plan | None]]()
    with tempfile.TemporaryDirectory() as scratch:
        for name, settings in settings_of(args).items():
            config = cq.load_config(args.config, [*args.overrides, *settings])
            pipe = pipe or cq.load_pipeline(config.model, args.device)
            context = Context.of(pipe, config)
            stages = None if name == UNTOUCHED else Stages.at(context, args.work or Path(scratch))
            ready[name] = context, None if stages is None else stages.plan()[0]
    runs: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(args.rounds):
        for name, (context, plan) in ready.items():
            runs[name].append(seconds_of(context, plan, args.count, name))
    return {
        "rows": [row | _beside(row, *ready[row["method"]]) for row in compare(runs, args.count)],
        "backend": backend_of(context).name,
        "batch_size": context.config.sample.batch_size,
        "count": args.count,
        "evaluations": context.num_steps,
        "machine": torch.cuda.get_device_name() if pipe.device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _beside(row: dict[str, Any], context: Context, plan: Plan | None) -> dict[str, Any]:
    """How many evaluations of a run are in full; for a speed-up, what was asked and what was reached."""
    if plan is None:
        return {"full_steps": context.num_steps}
    asked = context.config.cache.speedup
    speed = {} if asked is None else {"asked": asked, "reached": 1 / row["against_first"]}
    return {"full_steps": len(plan.schedule.refresh_steps), **speed}


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--methods", default="paper,best", help="the first is what the others are compared with")
    parser.add_argument("--speedups", help="of the untouched model, such as 3,6,9; instead of --methods")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=32, help="images of a round")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="KEY=VALUE for every method")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, help="folder that keeps the stages' outputs; none: a temporary one")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)

    def action() -> None:
        found = measure(args)
        for row in found["rows"]:
            ratio = "{against_first:7.3f}× the first".format(**row)
            print("{method:14} {seconds_per_image:9.4f} s an image ".format(**row) + ratio)
        if args.json is not None:
            command = "python scripts/measure_run_time.py " + " ".join(argv or sys.argv[1:])
            save_json(args.json, found | {"command": command})

    return guarded(action)


if __name__ == "__main__":
    sys.exit(main())
