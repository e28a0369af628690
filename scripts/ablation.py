"""The ablation table: every row of the demo and more, over intervals and seeds, by Fréchet distance and paired PSNR.

    python scripts/ablation.py configs/fashion.yaml --intervals 5,10,20 --seeds 3 --samples 5000 --out ablation.json

Each seed has its own calibration noise and its own evaluation noise; within a seed all rows start from the same noise.
The file is written after every row; a second call goes on where the first one stopped. `--row LABEL:METHOD[,KEY=VALUE…]`
measures other configurations instead of the default rows. The distance is over the features of assets/fashion-cnn.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cachequant as cq
from cachequant.evaluation.fashion_mnist import load_fashion_mnist, to_model_range
from cachequant.evaluation.features import FashionCNN, extract_features, load_feature_network
from cachequant.evaluation.frechet import FeatureStatistics, frechet_distance
from cachequant.evaluation.paired import psnr
from cachequant.pipeline.context import Context
from cachequant.pipeline.sample import draw
from cachequant.pipeline.stages import Stages
from cachequant.storage import save_json

ROWS = ("naive", "dps", "dec_cache", "paper", "uniform_dec", "cachequant:best")
QUANT_ONLY = (
    "quant_only:best,correction.layers=none,cache.interval=1",
    "paper_quant_only:naive,cache.interval=1",
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--intervals", default="5,10,20")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=2500)
    parser.add_argument(
        "--row", action="append", default=[], help="LABEL:METHOD[,KEY=VALUE...], instead of the default"
    )
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="KEY=VALUE for every row")
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's idx files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    return parser.parse_args(argv)


class Table:
    """Results measured so far, on disk after each row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"results": []}

    def has(self, **key: Any) -> bool:
        """Whether this row was measured."""
        return any(all(r[k] == v for k, v in key.items()) for r in self.record["results"])

    def add(self, **row: Any) -> None:
        """File a row and print it."""
        self.record["results"].append(row)
        save_json(self.path, self.record)
        print(
            {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items() if k != "refresh_steps"},
            flush=True,
        )


class Judge:
    """Fréchet distance to the test set, and PSNR to the full-precision images of the same noise."""

    def __init__(self, data: Path | None, device: torch.device) -> None:
        self.network: FashionCNN = load_feature_network()
        self.device = device
        images, _ = load_fashion_mnist("test", data)
        self.reference = self._statistics(to_model_range(images))

    def _statistics(self, images: Tensor) -> FeatureStatistics:
        statistics = FeatureStatistics(channels=128)
        statistics.update(extract_features(self.network, images, batch_size=1000, device=self.device))
        return statistics

    def distance(self, images: Tensor) -> float:
        """Fréchet FashionCNN distance of images [n, 1, 32, 32] in [0, 1]."""
        made, ref = self._statistics(images * 2 - 1), self.reference
        return frechet_distance(made.mean, made.covariance, ref.mean, ref.covariance)


def markdown(results: list[dict[str, Any]]) -> str:
    """Distances and PSNR as "mean (seeds)" per row and interval, and the share of the naive damage that each row removes."""
    full = {r["seed"]: r["distance"] for r in results if r["row"] == "full"}
    intervals = sorted({r["interval"] for r in results if r["interval"] > 1})
    head = " | ".join(f"N = {n}: distance | PSNR | removed" for n in intervals)
    lines = [f"| W8A8 | {head} |", "| --- |" + " --- | --- | --- |" * len(intervals)]
    lines.append(f"| full | {' | '.join(f'{_mean(full.values()):.2f} | – | –' for _ in intervals)} |")
    for row in dict.fromkeys(r["row"] for r in results if r["interval"] > 1):
        lines.append(f"| {row} | {' | '.join(_cells(results, full, row, n) for n in intervals)} |")
    return "\n".join(lines)


def _cells(results: list[dict[str, Any]], full: dict[int, float], row: str, interval: int) -> str:
    """Distance, PSNR, share removed of one row; a seed counts where the naive row was measured with it too."""
    measured = {(r["row"], r["seed"]): r for r in results if r["interval"] == interval}
    seeds = [seed for name, seed in measured if name == row and ("naive", seed) in measured]
    if not seeds:
        return "– | – | –"
    mine = [measured[row, seed] for seed in seeds]
    damage = sum(measured["naive", seed]["distance"] - full[seed] for seed in seeds)
    removed = 1 - sum(r["distance"] - full[r["seed"]] for r in mine) / damage
    return f"{_mean(r['distance'] for r in mine):.2f} ({len(seeds)}) | {_mean(r['psnr'] for r in mine):.1f} | {removed:.0%}"


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def split_row(row: str, interval: int) -> tuple[str, list[str]]:
    """ "LABEL:METHOD,KEY=VALUE" -> label and overrides; a bare name is label and method."""
    label, _, rest = row.partition(":")
    method, *extra = (rest or label).split(",")
    return label, [f"cache.interval={interval}", f"method={method}", *extra]


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing."""
    args = parse(argv)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = (
        True  # products of 8-bit integers stay exact
    )
    torch.backends.cudnn.benchmark = True
    table, base = Table(args.out), cq.load_config(args.config, [*args.overrides, "cache.interval=1"])
    pipe = cq.load_pipeline(base.model, args.device)
    judge = Judge(args.data, pipe.device)
    table.record |= {
        "command": "python scripts/ablation.py " + " ".join(argv or sys.argv[1:]),
        "machine": torch.cuda.get_device_name() if pipe.device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "distance": "Fréchet FashionCNN distance to the 10,000 test images",
    }
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        measure_seed(args, seed, pipe, judge, table)
    print(markdown(table.record["results"]))


def measure_seed(args: argparse.Namespace, seed: int, pipe: Any, judge: Judge, table: Table) -> None:
    """All rows of one seed."""
    noise = list(range(10_000_000 + seed * args.samples, 10_000_000 + (seed + 1) * args.samples))
    common = [
        *args.overrides,
        "cache.interval=1",
        f"calibration.seed={1243 + 1000 * seed}",
        f"sample.batch_size={args.batch_size}",
    ]
    full = draw(Context.of(pipe, cq.load_config(args.config, common)), None, noise, "full")
    if not table.has(row="full", seed=seed):
        table.add(
            row="full",
            interval=1,
            seed=seed,
            distance=judge.distance(full.images),
            psnr=None,
            seconds=full.seconds,
        )
    intervals = [int(n) for n in args.intervals.split(",")]
    jobs = [(row, n) for n in intervals for row in (args.row or ROWS)]
    jobs += [] if args.row else [(row, 1) for row in QUANT_ONLY]
    with tempfile.TemporaryDirectory() as scratch:
        for row, interval in jobs:
            label, overrides = split_row(row, interval)
            if table.has(row=label, interval=interval, seed=seed):
                continue
            config = cq.load_config(args.config, [*common, *overrides])
            context, start = Context.of(pipe, config), time.perf_counter()
            plan, _ = Stages.at(context, Path(scratch), quiet=True).plan()
            calibration_seconds = time.perf_counter() - start
            made = draw(context, plan, noise, label)
            table.add(
                row=label, interval=interval, seed=seed, distance=judge.distance(made.images),
                psnr=float(psnr(made.images, full.images, 1.0).clamp(max=99).mean()), seconds=made.seconds,
                calibration_seconds=calibration_seconds, refresh_steps=list(plan.schedule.refresh_steps),
            )  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except cq.UserError as error:
        sys.exit(f"error: {error}")
