"""Seconds of a user's own call, `pipe(...)`, before and after `cachequant.enable(pipe, plan)`.

    python scripts/gpu/time_enable.py configs/stable_diffusion.yaml --batch 1 --json enable.json

Random weights in half precision, the whole pipeline: text encoder, loop, decoder, images in the host's memory. The plan has
the times of a calibrated one (`cachequant.pipeline.timing_plan`). Rows are medians of `--rounds` calls behind one that does
not count. `cachequant bench --pipeline` measures the same steps from inside; this is what a user sees.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import cachequant as cq
from cachequant.cli import guarded
from cachequant.errors import UserError
from cachequant.models.adapter import device_of
from cachequant.models.architectures import random_pipeline
from cachequant.models.loading import Generator
from cachequant.pipeline.bench_cuda import device_plan
from cachequant.pipeline.context import Context
from cachequant.storage import save_json


def seconds_of(generator: Generator, seeds: list[int], rounds: int) -> list[float]:
    """Of each of `rounds` calls; images come back to the host, which waits for the device."""
    found = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        generator(seeds)
        found.append(time.perf_counter() - start)
    return found[1:]


def measure(context: Context, rounds: int) -> list[dict[str, Any]]:
    """Rows of the plain pipeline and of the enabled one, which is left as it was.

    Raises:
        UserError: no rounds.
    """
    if rounds < 1:
        raise UserError(f"--rounds is {rounds}, expected at least 1")
    generator, batch = context.generator(), context.config.sample.batch_size
    seeds = list(range(batch))
    context.pipe.set_progress_bar_config(disable=True)
    rows = [_row("plain", seconds_of(generator, seeds, rounds), batch)]
    cq.enable(context.pipe, device_plan(context), context.config.backend)
    try:
        rows.append(_row("enabled", seconds_of(generator, seeds, rounds), batch))
    finally:
        cq.disable(context.pipe)
    return rows


def _row(name: str, seconds: list[float], batch: int) -> dict[str, Any]:
    middle = statistics.median(seconds)
    return {"row": name, "seconds": middle, "images_per_second": batch / middle, "runs": seconds}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    config = cq.load_config(args.config, [*args.overrides, f"sample.batch_size={args.batch}"])
    pipe = random_pipeline(config.model.family, device=torch.device(args.device), whole=True)
    config.sampler.prompts = config.calibration.prompts = None
    if args.device == "cuda":
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                torch.nn.Module.to(part, torch.float16, memory_format=torch.channels_last)  # type: ignore[call-overload]
    context = Context.of(pipe, config)
    rows = measure(context, args.rounds)
    for row in rows:
        print(f"{row['row']:<8} {row['seconds']:8.3f} s a call {row['images_per_second']:8.2f} images/s")
    on_gpu = device_of(context.adapter.denoiser).type == "cuda"
    save_json(
        args.json,
        {
            "command": "python scripts/gpu/time_enable.py " + " ".join(argv or sys.argv[1:]),
            "model": f"{config.model.name} with random weights",
            "interval": config.cache.interval,
            "steps": context.num_steps,
            "batch": args.batch,
            "precision": "float16" if on_gpu else "float32",
            "card": torch.cuda.get_device_name() if on_gpu else None,
            "torch": torch.__version__,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    sys.exit(guarded(main))
