"""The ablation table: every row of the demo and more, over intervals and seeds, by Fréchet distance and paired PSNR.

    python scripts/ablation.py configs/fashion.yaml --intervals 5,10,20 --seeds 3 --samples 5000 --out ablation.json
    python scripts/ablation.py configs/fashion_dit.yaml --peers --out ablation_dit.json

Each seed has its own calibration noise and its own evaluation noise; within a seed all rows start from the same noise.
The file is written after every row; a second call goes on where the first one stopped. `--row LABEL:METHOD[,KEY=VALUE…]`
measures other configurations instead of the default rows, `--costs` the schedule of every cost. `--peers` adds other
people's caching, from the `peers` extra, and ours in full precision beside it. The network under the distances is the
miniature's judge (configs/tables/_miniatures.yaml).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cachequant as cq
from cachequant.cli import guarded
from cachequant.config import RunConfig
from cachequant.costs import COSTS
from cachequant.evaluation.features import fashion_statistics
from cachequant.evaluation.frechet import FeatureStatistics, Gaussian, frechet_distance
from cachequant.evaluation.judges import NETWORKS, DrawingFeatures, Features
from cachequant.evaluation.paired import feature_distance, finite_psnr
from cachequant.evaluation.peers import Budget, Trial, draw_peer, peers_of, require_peer
from cachequant.evaluation.rows import FULL
from cachequant.evaluation.tables import read_miniature
from cachequant.models.prompts import read_prompts
from cachequant.pipeline.context import Context
from cachequant.pipeline.peak_memory import peak_memory
from cachequant.pipeline.sample import draw
from cachequant.pipeline.stages import Stages
from cachequant.storage import save_json

ROWS = ("naive", "dps", "dec_cache", "paper", "uniform_dec", "cachequant:best")
QUANT_ONLY = (
    "quant_only:best,correction.layers=none,cache.interval=1",
    "paper_quant_only:naive,cache.interval=1",
)
FLOAT = "cachequant_float32:best,quant.enabled=false"
"""What the peers compare with: they do not quantise."""
BY_COST = ("naive", "cachequant:best", *(f"{c}:best,schedule.cost={c},schedule.fallback=false" for c in COSTS))
"""Rows of `--costs`: ours on the schedule of every cost, beside the one that our method keeps."""
NOISE, REFERENCE_NOISE = 10_000_000, 30_000_000
"""First seeds of what is judged, and of the full model's images where those are the reference."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--intervals", default="5,10,20")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=2500)
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--row", action="append", default=[], help="LABEL:METHOD[,KEY=VALUE...], instead of the default")
    rows.add_argument("--costs", action="store_true", help="a row for every schedule cost, instead of the default")
    parser.add_argument("--peers", action="store_true", help="DeepCache, or cache-dit's DBCache and TaylorSeer, too")
    parser.add_argument("--set", action="append", default=[], dest="overrides", help="KEY=VALUE for every row")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="folder that keeps the stages' outputs; none: a temporary one")
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
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
        print({k: v for k, v in shown.items() if k not in ("refresh_steps", "settings")}, flush=True)


@dataclass(frozen=True)
class Judge:
    """Measures images over the network of their miniature's judge.

    Attributes:
        title: what `distance` is.
        features: images [n, C, H, W] in [0, 1] -> [n, F].
        reference: of the distance.
        prompts: those of the judged images, for retrieval; () where there is none.
    """

    title: str
    features: Features
    reference: Gaussian
    prompts: tuple[str, ...]

    @staticmethod
    def of(config: RunConfig, device: torch.device, full: Callable[[], Tensor]) -> Judge:
        """The judge of a miniature; `full` draws the full model's images from other noise, where those are its reference.

        Raises:
            UserError: the model is none of the miniatures.
        """
        entry = read_miniature(config.model.name)
        network = next(name.removeprefix("frechet_") for name in entry.metrics if name.startswith("frechet_"))
        features = Features(NETWORKS[network](), device)
        prompts = read_prompts(config.sampler.prompts) if "retrieval" in entry.metrics else ()
        if entry.reference != FULL:
            title = f"Fréchet distance over {network} to the 10,000 test images of Fashion-MNIST"
            return Judge(title, features, fashion_statistics(), prompts)
        title = f"Fréchet distance over {network} to images of the full model from other noise"
        return Judge(title, features, _gaussian(features(full())), prompts)

    def measure(self, images: Tensor, full: Tensor, noise: list[int]) -> dict[str, float | None]:
        """distance to the reference; feature_distance and psnr (None where equal) to the full model's; retrieval."""
        mine = self.features(images)
        found: dict[str, float | None] = {
            "distance": frechet_distance(*_gaussian(mine), *self.reference),
            "feature_distance": float(feature_distance(mine, self.features(full)).mean()),
            "psnr": None if images is full else float(finite_psnr(images, full, 1.0).mean()),
        }
        network = self.features.network
        if self.prompts and isinstance(network, DrawingFeatures):
            answers, distinct = (
                [self.prompts[seed % len(self.prompts)] for seed in noise],
                list(dict.fromkeys(self.prompts)),
            )
            found["retrieval"] = float(network.found(images.to(self.features.device), answers, distinct).mean())
        return found


def _gaussian(features: Tensor) -> Gaussian:
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return statistics.gaussian


def markdown(results: list[dict[str, Any]]) -> str:
    """Distances and PSNR as "mean (seeds)" per row and interval, and the share of the naive damage that each row removes."""
    full = {r["seed"]: r["distance"] for r in results if r["row"] == FULL}
    intervals = sorted({r["interval"] for r in results if r["interval"] > 1})
    retrieval = any("retrieval" in r for r in results)
    columns = ("distance", "PSNR", "removed", "retrieval") if retrieval else ("distance", "PSNR", "removed")
    head = " | ".join(f"N = {n}: {' | '.join(columns)}" for n in intervals)
    lines = [f"| W8A8 | {head} |", "| --- |" + " --- |" * len(columns) * len(intervals)]
    found = [r["retrieval"] for r in results if r["row"] == FULL and retrieval]
    own = f"{_distance(_mean(full.values()))} | – | –" + (f" | {_mean(found):.1%}" if retrieval else "")
    lines.append(f"| full | {' | '.join(own for _ in intervals)} |")
    for row in dict.fromkeys(r["row"] for r in results if r["interval"] > 1):
        lines.append(f"| {row} | {' | '.join(_cells(results, full, row, n, retrieval) for n in intervals)} |")
    return "\n".join(lines)


def _cells(results: list[dict[str, Any]], full: dict[int, float], row: str, interval: int, retrieval: bool) -> str:
    """Distance, PSNR, share removed of one row; a seed counts where the naive row was measured with it too."""
    measured = {(r["row"], r["seed"]): r for r in results if r["interval"] == interval}
    seeds = [seed for name, seed in measured if name == row and ("naive", seed) in measured]
    if not seeds:
        return "– | – | –" + (" | –" if retrieval else "")
    mine = [measured[row, seed] for seed in seeds]
    damage = sum(measured["naive", seed]["distance"] - full[seed] for seed in seeds)
    removed = 1 - sum(r["distance"] - full[r["seed"]] for r in mine) / damage
    distance = _distance(_mean(r["distance"] for r in mine))
    text = f"{distance} ({len(seeds)}) | {_mean(r['psnr'] for r in mine):.1f} | {removed:.0%}"
    return text + (f" | {_mean(r['retrieval'] for r in mine):.1%}" if retrieval else "")


def _distance(value: float) -> str:
    """Embeddings on the unit sphere have small distances."""
    return f"{value:.2f}" if value >= 1 else f"{value:.4f}"


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
    for peer in peers_of(pipe) if args.peers else ():
        require_peer(peer)  # told now, not behind our own rows

    def other_noise() -> Tensor:
        return _full(args, pipe, [], list(range(REFERENCE_NOISE, REFERENCE_NOISE + args.samples))).images

    judge = Judge.of(base, pipe.device, other_noise)
    table.record |= {
        "command": "python scripts/ablation.py " + " ".join(argv or sys.argv[1:]),
        "machine": torch.cuda.get_device_name() if pipe.device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "distance": judge.title,
    }
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        SeedRows(args, seed, pipe, judge, table).measure()
    print(markdown(table.record["results"]))


def _full(args: argparse.Namespace, pipe: Any, settings: list[str], noise: list[int]) -> Any:
    """Images of the untouched model."""
    own = [*args.overrides, "cache.interval=1", f"sample.batch_size={args.batch_size}", *settings]
    return draw(Context.of(pipe, cq.load_config(args.config, own)), None, noise, FULL)


class SeedRows:
    """All rows of one seed."""

    def __init__(self, args: argparse.Namespace, seed: int, pipe: Any, judge: Judge, table: Table) -> None:
        self.args, self.seed, self.pipe, self.judge, self.table = args, seed, pipe, judge, table
        self.noise = list(range(NOISE + seed * args.samples, NOISE + (seed + 1) * args.samples))
        self.common = [f"calibration.seed={1243 + 1000 * seed}", f"sample.batch_size={args.batch_size}"]

    def measure(self) -> None:
        """Whatever the table lacks."""
        full = _full(self.args, self.pipe, self.common, self.noise)
        self.full = full.images
        if not self.table.has(row=FULL, seed=self.seed):
            self._add(FULL, 1, self.full, seconds=full.seconds)
        intervals = [int(n) for n in self.args.intervals.split(",")]
        chosen = self.args.row or (BY_COST if self.args.costs else ())
        default = (*ROWS, FLOAT) if self.args.peers else ROWS
        jobs = [(row, n) for n in intervals for row in (chosen or default)]
        jobs += [] if chosen else [(row, 1) for row in QUANT_ONLY]
        with tempfile.TemporaryDirectory() as scratch:
            for row, interval in jobs:
                label, overrides = split_row(row, interval)
                if not self.table.has(row=label, interval=interval, seed=self.seed):
                    self._ours(label, interval, overrides, self.args.work or Path(scratch))
        for peer in peers_of(self.pipe) if self.args.peers else ():
            for interval in intervals:
                if not self.table.has(row=peer, interval=interval, seed=self.seed):
                    self._peer(peer, interval)

    def _config(self, overrides: list[str]) -> RunConfig:
        return cq.load_config(self.args.config, [*self.args.overrides, "cache.interval=1", *self.common, *overrides])

    def _ours(self, label: str, interval: int, overrides: list[str], scratch: Path) -> None:
        context, start = Context.of(self.pipe, self._config(overrides)), time.perf_counter()
        with peak_memory(self.pipe.device) as peak:
            plan, _ = Stages.at(context, scratch, quiet=True).plan()
        calibration_seconds = time.perf_counter() - start
        made = draw(context, plan, self.noise, label)
        self._add(
            label, interval, made.images, seconds=made.seconds, calibration_seconds=calibration_seconds,
            calibration_peak_bytes=peak.bytes, full_step_share=plan.schedule.full_step_share,
            refresh_steps=list(plan.schedule.refresh_steps),
        )  # fmt: skip

    def _peer(self, peer: str, interval: int) -> None:
        """As many full steps as the uniform schedule has; its setting is chosen on this seed's calibration noise."""
        config = self._config([f"cache.interval={interval}"])
        context, start = Context.of(self.pipe, config), time.perf_counter()
        full_steps = -(-config.sampler.steps // interval)
        budget = Budget(context.num_steps, full_steps, config.cache)
        trial = Trial(context.generator(), budget, context.seeds(), config.calibration.batch_size)
        setting = trial.best(peer)
        calibration_seconds = time.perf_counter() - start
        made = draw_peer(setting, context.generator(sampling=True), self.noise, config.sample.batch_size)
        self._add(
            peer, interval, made.images, seconds=made.seconds, calibration_seconds=calibration_seconds,
            full_step_share=made.full_step_share, settings=asdict(setting)["options"],
        )  # fmt: skip

    def _add(self, row: str, interval: int, images: Tensor, **facts: Any) -> None:
        measured = self.judge.measure(images, self.full, self.noise)
        self.table.add(row=row, interval=interval, seed=self.seed, **measured, **facts)


if __name__ == "__main__":
    sys.exit(guarded(main))
