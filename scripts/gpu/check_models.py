"""Whole sampling runs of trained miniatures on this GPU: real integers against the simulated backend, same noise.

    python scripts/gpu/check_models.py configs/fashion.yaml configs/fashion_dit.yaml --json models.json

Two paths that round one activation in a thousand to the other integer end in images that differ by much of the effect of
quantisation itself, so real integers are right if their images are as near to the full-precision ones as the simulated
images are (within 1 dB) and nearer to the simulated ones than these are to full precision. The exit status is 1 if a run
fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch

from cachequant.config import load_config
from cachequant.evaluation.paired import psnr
from cachequant.models.loading import load_pipeline
from cachequant.pipeline.context import Context
from cachequant.pipeline.sample import draw
from cachequant.pipeline.stages import Stages

SETTINGS = ("quant.weight_symmetric=true", "quant.attention_bits=null")
"""What the integer kernels want: no sums of activations, attention in floating point."""


def compare(config: str, overrides: list[str], device: str, count: int) -> dict[str, Any]:
    """PSNR in dB between full-precision, simulated and integer images of one plan."""
    settings = [*SETTINGS, *overrides, f"sample.count={count}", f"sample.batch_size={count}"]
    images = {}
    base = load_config(config, [*settings, "backend=simulated"])
    pipe = load_pipeline(base.model, device)
    seeds = list(range(count))
    with tempfile.TemporaryDirectory() as folder:
        context = Context.of(pipe, base)
        plan, _ = Stages.at(context, Path(folder)).plan()
    full = draw(context, None, seeds, "full")
    images["simulated"] = draw(context, plan, seeds, "simulated")
    backend = "cuda-int8" if device == "cuda" else "cpu-int8"
    images["integers"] = draw(
        Context.of(pipe, load_config(config, [*settings, f"backend={backend}"])), plan, seeds, backend
    )

    def distance(one: Any, other: Any) -> float:
        return float(psnr(one.images, other.images, 1.0).mean())

    row: dict[str, Any] = {
        "config": config,
        "overrides": overrides,
        "simulated_to_full": distance(images["simulated"], full),
        "integers_to_full": distance(images["integers"], full),
        "integers_to_simulated": distance(images["integers"], images["simulated"]),
        "seconds": {"full": full.seconds, **{name: made.seconds for name, made in images.items()}},
    }
    row["ok"] = (
        row["integers_to_full"] >= row["simulated_to_full"] - 1.0
        and row["integers_to_simulated"] >= row["simulated_to_full"]
    )
    return row


def main() -> int:
    """Every config at N = 1 and N = 5."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+")
    parser.add_argument("--count", type=int, default=64, help="images")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    given = parser.parse_args()
    rows = []
    for config in given.configs:
        for interval in (1, 5):
            try:
                row = compare(config, [*given.overrides, f"cache.interval={interval}"], given.device, given.count)
            except Exception:  # the next one may run
                row = {"config": config, "interval": interval, "ok": False, "failed": traceback.format_exc()[-2000:]}
            rows.append(row)
            given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
            print(
                {key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
