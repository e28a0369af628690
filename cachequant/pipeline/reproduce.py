"""One of the paper's tables, measured: every row calibrated, sampled and judged by the commands that a user would type.

What a command made is kept by content: stage outputs and images as `cachequant run` keeps them, metrics under the hash of
the images, the reference, the metrics and the networks that the user names. So a second call only does what is missing.
"""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from cachequant import __version__
from cachequant.cli import main as command_line
from cachequant.config import RunConfig, load_config
from cachequant.errors import UserError
from cachequant.evaluation.plots import save_figure
from cachequant.evaluation.rows import FULL
from cachequant.evaluation.table_figure import table_figure
from cachequant.evaluation.tables import Comparison, Figures, Part, Row, read_table, to_csv
from cachequant.evaluation.weights import named_folder
from cachequant.lock import writer_lock
from cachequant.models.cost import float_bytes, plan_bytes, run_macs
from cachequant.models.loading import load_pipeline, torch_device
from cachequant.models.prompts import read_prompts
from cachequant.pipeline.context import Context
from cachequant.pipeline.first_calls import evaluation_macs
from cachequant.pipeline.table_recipe import Options, Recipe
from cachequant.plan import Plan
from cachequant.storage import content_hash, file_hash, load_json, save_json, write_atomically

SEEDS = 10_000_000
"""How far the seeds of a reference of the untouched model's images lie from those that are judged."""
FLOAT_BITS = 32


class CommandFailed(Exception):
    """A command ended with a status other than 0, having said why."""

    def __init__(self, status: int) -> None:
        super().__init__(f"a command ended with status {status}")
        self.status = status


def reproduce(table: str, options: Options) -> list[Comparison]:
    """Measure a table and write table.txt, table.csv, table.json and quality.png: a comparison for each part.

    Raises:
        UserError: an unknown table or row, a missing reference or miniature.
        CommandFailed: a command failed; it has printed its reason.
    """
    parts = read_table(table)
    recipes = [Recipe.of(part, options) for part in parts]
    known = {row.name for part in parts for row in part.rows}
    unknown = sorted(set(options.rows) - known)
    if unknown:
        raise UserError(f"row {unknown[0]!r} is not in table {table}, expected some of {', '.join(sorted(known))}")
    with writer_lock(options.out):
        comparisons, commands = [], []
        for part, recipe in zip(parts, recipes, strict=True):
            bench = Workbench(part, recipe, options)
            comparisons.append(Comparison.of(part, bench.measure(), recipe.metrics[0], recipe.subject))
            commands += bench.commands
            _write(table, options, comparisons, commands)
    return comparisons


def _write(table: str, options: Options, comparisons: list[Comparison], commands: list[str]) -> None:
    texts = {"table.txt": "\n\n".join(c.text() for c in comparisons) + "\n", "table.csv": to_csv(comparisons)}
    for name, text in texts.items():
        write_atomically(options.out / name, partial(_save, text))
    record: dict[str, Any] = {"table": table, "miniature": options.miniature, "cachequant": __version__}
    on_gpu = torch_device(options.device).type == "cuda"
    record |= {"torch": torch.__version__, "device": options.device, "threads": torch.get_num_threads()}
    record["machine"] = torch.cuda.get_device_name() if on_gpu else platform.machine()
    record["commands"] = commands
    record["parts"] = {c.part.name: {row: dict(figures) for row, figures in c.ours.items()} for c in comparisons}
    save_json(options.out / "table.json", record)
    save_figure(table_figure(comparisons), options.out / "quality.png")


def _save(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


@dataclass
class Workbench:
    """Measures the rows of one part.

    Attributes:
        part, recipe, options: what and how.
        commands: what was run, in order.
    """

    part: Part
    recipe: Recipe
    options: Options
    commands: list[str] = field(default_factory=list)
    _prints: dict[Path, str] = field(default_factory=dict)
    _drawn: set[Path] = field(default_factory=set)

    def measure(self) -> dict[str, Figures]:
        """Row -> metrics, `seconds` an image, `bytes`, `bops`."""
        wanted = self.options.rows
        rows = [row for row in self.part.rows if row.set and (not wanted or row.name in wanted)]
        if not rows:
            return {}
        costs = self._step_costs(rows[0])
        made = {row.name: self._run(row) for row in rows}
        plan = Path(made[rows[0].name]["plan"])
        full = self._full(plan, self._config(rows[0]))
        found: dict[str, Figures] = {FULL: {**self._judge(full, full, plan), **costs.of(None), **_seconds(full)}}
        for name, record in made.items():
            images = Path(record["images"])
            cost = costs.of(Plan.load(record["plan"], lazy=True))
            found[name] = {**self._judge(images, full, plan), **cost, **_seconds(images)}
        return found

    def _overrides(self, row: Row) -> list[str]:
        return [*(row.set or ()), *self.recipe.overrides]

    def _config(self, row: Row) -> RunConfig:
        return load_config(self.recipe.config, self._overrides(row))

    def _run(self, row: Row) -> dict[str, Any]:
        """Plan and images of a row."""
        self._say(row.name)
        sets = [word for item in self._overrides(row) for word in ("--set", item)]
        return self._command("run", str(self.recipe.config), "--out", str(self._folder / "stages"), *sets)

    def _full(self, plan: Path, config: RunConfig, shift: int = 0) -> Path:
        """The untouched model's images of the same seeds, or of others."""
        first = config.sample.seed + shift
        key = content_hash([asdict(part) for part in (config.model, config.sampler, config.sample)])
        out = self._folder / f"full-{first}-{key[:12]}"
        if out not in self._drawn:
            self._say(f"{FULL}, seeds from {first}")
            self._command("sample", str(plan), str(out), "--full", "--set", f"sample.seed={first}")
            self._drawn.add(out)
        return out

    def _judge(self, images: Path, full: Path, plan: Path) -> dict[str, float]:
        """All metrics of some images."""
        reference = self.recipe.reference
        if reference == FULL:
            reference = str(self._full(plan, Plan.load(plan, lazy=True).config, SEEDS))
        found = self._evaluate(images, self.recipe.metrics, reference, self.recipe.resize)
        if images == full:
            return found
        return found | self._evaluate(images, self.recipe.paired, str(full))

    def _evaluate(
        self, images: Path, metrics: tuple[str, ...], reference: str | None, resize: int | None = None
    ) -> dict[str, float]:
        """Metrics of a folder of shards, computed once for what is in it."""
        prompts = load_config(self.recipe.config, list(self.recipe.overrides)).sampler.prompts
        arguments = ["--metrics", ",".join(metrics)]
        arguments += ["--ref", reference] if reference else []
        arguments += ["--prompts", prompts] if prompts else []
        arguments += ["--resize", str(resize)] if resize else []
        arguments += ["--weights", str(self.options.weights)] if self.options.weights else []
        weights = named_folder(self.options.weights)
        seen = [self._print(images), *(None if p is None else self._print(Path(p)) for p in (reference, weights))]
        key = content_hash(
            {"seen": seen, "prompts": list(read_prompts(prompts)), "metrics": list(metrics), "resize": resize}
        )
        kept = self._folder / "metrics" / f"{key[:24]}.json"
        if not kept.is_file():
            record = self._command("evaluate", str(images), *arguments)
            save_json(kept, record["metrics"])
        found: dict[str, float] = load_json(kept)
        return found

    def _print(self, path: Path) -> str:
        """What a set of images is, by content; of a folder that is not ours by names and sizes."""
        if path not in self._prints:
            if (path / "manifest.jsonl").is_file():
                self._prints[path] = file_hash(path / "manifest.jsonl")  # holds the sha256 of each shard
            elif path.is_dir():
                files = sorted(p for p in path.rglob("*") if p.is_file())
                self._prints[path] = content_hash([[str(p.relative_to(path)), p.stat().st_size] for p in files])
            else:
                self._prints[path] = file_hash(path) if path.is_file() else str(path)
        return self._prints[path]

    def _command(self, *words: str) -> dict[str, Any]:
        """Run `cachequant`, in a process of its own where that starts others: what it wrote with --json.

        Raises:
            CommandFailed: it failed.
        """
        out, options = self._folder / "command.json", self.options
        several = options.devices is not None and options.devices > 1
        argv = [*words, "--device", options.device, *(["--devices", str(options.devices)] if several else [])]
        self.commands.append("cachequant " + shlex.join(argv))
        argv += ["--json", str(out)]
        if several:
            command = [sys.executable, "-m", "cachequant", *argv]
            status = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
        else:
            with redirect_stdout(StringIO()):
                status = command_line(argv)
        if status:
            raise CommandFailed(status)
        record: dict[str, Any] = load_json(out)
        out.unlink()
        return record

    def _step_costs(self, row: Row) -> Costs:
        """What an evaluation costs; the cut of the network is the same in all rows."""
        config = self._config(row)
        context = Context.of(load_pipeline(config.model, self.options.device), config)
        return Costs(*evaluation_macs(context), float_bytes(context.adapter.denoiser), context.num_steps)

    @property
    def _folder(self) -> Path:
        return self.options.out / self.recipe.config.stem  # parts on one model share their stages

    def _say(self, text: str) -> None:
        print(f"— {self.part.name}: {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates of a full and of a cached evaluation of one image, bytes in float32, evaluations."""

    full: float
    cached: float
    bytes: int
    num_steps: int

    def of(self, plan: Plan | None) -> dict[str, float]:
        """`bytes` of the denoiser; `bops` of an average evaluation, in units of 10¹².

        Multiply-accumulates × weight bits × activation bits (section 4.1); layers that keep other bits are not told apart.
        """
        macs = run_macs(self.full, self.cached, plan, self.num_steps) / self.num_steps
        bits = FLOAT_BITS**2
        if plan is not None and plan.quant is not None:
            bits = plan.config.quant.weight_bits * plan.config.quant.activation_bits
        size = self.bytes if plan is None else plan_bytes(self.bytes, plan)
        return {"bytes": float(size), "bops": macs * bits / 1e12}


def _seconds(images: Path) -> Mapping[str, float]:
    """Seconds an image, by the clock of those who drew them."""
    record = load_json(images / "seconds.json")
    return {"seconds": record["seconds"] / record["drawn"]} if record["drawn"] else {}
