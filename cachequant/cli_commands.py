"""What the commands of the command line do, given their parsed options; printed for people, and as JSON with `--json`."""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from cachequant.errors import UserError


def _report_json(args: argparse.Namespace, value: dict[str, Any]) -> None:
    from cachequant.storage import save_json

    if args.json is not None:
        save_json(args.json, value)


def demo(args: argparse.Namespace) -> None:
    """The whole job on an embedded model."""
    from cachequant.evaluation.rows import rows_to_json
    from cachequant.lock import writer_lock
    from cachequant.pipeline.demo import run_demo

    with writer_lock(args.out):
        rows = run_demo(args.out, args.device, args.set)
    print(f"\nwrote {args.out}/report.html, grid.png, schedule.png, error.png, quality.png, metrics.json")
    _report_json(args, rows_to_json(rows))


def stages_of(
    config_path: Path, overrides: list[str], device: str, out: Path | None = None, only: int | None = None
) -> Any:
    """The stages of a configuration file on its own pipeline; `only` allows just one of them to be computed."""
    from cachequant.models.loading import load_pipeline
    from cachequant.pipeline.context import Context
    from cachequant.pipeline.stages import Stages

    config = _config_of(config_path, overrides, device)
    return Stages.at(Context.of(load_pipeline(config.model, config.device), config), out, only)


def _config_of(path: Path, overrides: list[str], device: str) -> Any:
    """A configuration file, on the device of the command line where that names one."""
    from cachequant.config import load_config

    config = load_config(path, overrides)
    if device != "auto":
        config.device = device
    return config


def run(args: argparse.Namespace) -> None:
    """The six stages, by as many workers as are asked for."""
    from cachequant.lock import writer_lock
    from cachequant.models.loading import load_pipeline
    from cachequant.pipeline.context import Context
    from cachequant.pipeline.stages import Stages
    from cachequant.pipeline.workers import make_trainer
    from cachequant.storage import load_json

    config = _config_of(args.config, args.set, args.device)
    trainer = make_trainer(config.device, args.devices, args.nodes)
    if trainer.world_size > 1 and (config.cache.budget_ms is not None or config.cache.speedup is not None):
        raise UserError(
            f"a time budget with {trainer.world_size} workers, whose clocks differ, expected one: calibrate a plan first "
            "and sample it with --devices, or set cache.refreshes"
        )
    pipe, first = load_pipeline(config.model, str(trainer.strategy.root_device)), trainer.is_global_zero
    stages = Stages.at(Context.of(pipe, config), args.out, quiet=not first)
    stages.context.generator(sampling=True)  # a prompt list that cannot be had is told now, not behind the calibration
    with writer_lock(stages.store.root) if first else nullcontext():
        if trainer.world_size > 1:
            stages.fill(trainer)
        if not first:
            return
        (plan, _), (samples, _), folder = stages.plan(), stages.samples(), stages.save_plan()
    seconds = load_json(samples.folder / "seconds.json")["seconds"]
    print(f"{plan.summary()}\nplan         {folder}\nimages       {samples.folder}/grid.png, {seconds:.1f} s")
    steps, images = list(plan.schedule.refresh_steps), str(samples.folder)
    _report_json(args, {"plan": str(folder), "images": images, "refresh_steps": steps, "seconds": seconds})


def bench(args: argparse.Namespace) -> None:
    """Ways to run a model side by side."""
    from cachequant.config import load_config
    from cachequant.models.loading import load_pipeline, torch_device
    from cachequant.pipeline.context import Context

    config = load_config(args.config, [*args.set, *([f"sample.batch_size={args.batch}"] if args.batch else [])])
    device = torch_device(config.device if args.device == "auto" else args.device)
    if args.random_weights:
        from cachequant.models.architectures import random_pipeline

        pipe = random_pipeline(config.model.family, device=device, whole=args.pipeline)
        config.sampler.prompts = config.calibration.prompts = None
        config.model.name += " with random weights"
    else:
        pipe = load_pipeline(config.model, str(device))
    context, modes = Context.of(pipe, config), tuple(args.modes.split(",")) if args.modes else None
    if device.type == "cuda":
        from cachequant.pipeline.bench_cuda import format_ratios, run_bench_cuda

        command = {"command": " ".join(["cachequant", *sys.argv[1:]])}
        result = run_bench_cuda(context, modes, args.rounds, args.pipeline, lambda r: _report_json(args, command | r))
        return print(format_ratios(result))
    if args.pipeline:
        raise UserError("--pipeline without a GPU, expected --device cuda on a machine with one: leave it out")
    from cachequant.pipeline.bench import format_bench, run_bench

    result = run_bench(context, modes or ("fp32", "int8", "cache", "cachequant"), args.rounds)
    print(format_bench(result))
    _report_json(args, result)


def calibrate(args: argparse.Namespace) -> None:
    """Stages 1 to 5, and the plan into a folder."""
    from cachequant.lock import writer_lock

    stages = stages_of(args.config, args.set, args.device)
    with writer_lock(stages.store.root):
        plan, _ = stages.plan()
        plan.save(args.plan)
    print(f"{plan.summary()}\nplan         {args.plan}")
    schedule = plan.schedule
    numbers = {"cost": schedule.cost, "uniform_cost": schedule.uniform_cost}
    _report_json(args, {"plan": str(args.plan), "refresh_steps": list(schedule.refresh_steps), **numbers})


def sample(args: argparse.Namespace) -> None:
    """Images from a plan, by as many workers as are asked for."""
    from dataclasses import asdict

    from cachequant.api import enable, load_quantized
    from cachequant.lock import writer_lock
    from cachequant.models.loading import identify, load_pipeline
    from cachequant.pipeline.sampling import sample_pipeline
    from cachequant.pipeline.workers import make_trainer
    from cachequant.plan import Plan
    from cachequant.storage import file_hash

    plan = Plan.load(args.plan, lazy=True)
    count = [] if args.count is None else [f"sample.count={args.count}"]
    config = _with_sample_settings(plan.config, [*args.set, *count])
    trainer = make_trainer(args.device, args.devices, args.nodes)
    first, device = trainer.is_global_zero, trainer.strategy.root_device
    with writer_lock(args.out) if first else nullcontext():
        with nullcontext() if first else redirect_stdout(StringIO()):
            if args.full:
                pipe = load_pipeline(config.model, str(device))
            elif plan.remainder is not None and device.type == "cpu":
                pipe = load_quantized(args.plan, config.backend)  # the full-precision denoiser is not needed
            else:
                pipe = enable(load_pipeline(config.model, str(device)), plan, config.backend)
        identity = identify(pipe, config.sampler.guidance_scale) if args.full else plan.identity
        maker = {"plan": "none" if args.full else file_hash(args.plan / "plan.json"), **asdict(identity)}
        maker |= {"backend": config.backend}
        made = sample_pipeline(pipe, config, maker, args.out, trainer)
    if made is None:
        return
    print(f"{made.shards.count} images, of which {made.drawn} drawn now in {made.seconds:.1f} s: {args.out}/grid.png")
    value = {"images": str(args.out), "count": made.shards.count, "drawn": made.drawn, "seconds": made.seconds}
    _report_json(args, value)


def _with_sample_settings(config: Any, overrides: list[str]) -> Any:
    """The plan's configuration with `sample.*` or `backend` changed; anything else would no longer fit the plan."""
    from cachequant.config import apply_overrides

    wrong = [item for item in overrides if not item.startswith(("sample.", "backend="))]
    if wrong:
        raise UserError(
            f"--set {wrong[0]} with a plan, expected sample.* keys or backend only: calibrate again to change others"
        )
    return apply_overrides(config, overrides)


def evaluate(args: argparse.Namespace) -> None:
    """Metrics of images."""
    from cachequant.evaluation.suite import Request
    from cachequant.models.prompts import read_prompts
    from cachequant.pipeline.evaluate import evaluate

    metrics = tuple(name.strip() for name in args.metrics.split(","))
    prompts = read_prompts(args.prompts)
    request = Request(args.images, metrics, args.ref, prompts, args.weights, args.resize)
    found = evaluate(request, args.batch_size, args.device, args.devices, args.nodes)
    if found is None:
        return
    for name, value in found.items():
        print(f"{name:20} {value:.4f}")
    reference = None if args.ref is None else str(args.ref)
    _report_json(args, {"images": str(args.images), "reference": reference, "metrics": found})


def report(args: argparse.Namespace) -> None:
    """A plan's page, or a study."""
    from cachequant.evaluation.rows import format_table, rows_to_json
    from cachequant.pipeline.report import write_plan_report

    count = args.count if args.count is not None else (32 if args.study else 6)
    if count < 1:
        raise UserError(f"--count is {count}, expected 1 or more images")
    if args.study:
        _study(args, count)
        return
    if args.set:
        raise UserError(f"--set {args.set[0]} without --study, expected none: a plan's page is about the plan as it is")
    out = args.out or args.folder / "report.html"
    rows = write_plan_report(args.folder, out, count, args.device)
    print(f"{format_table(rows)}\n\nwrote {out}")
    _report_json(args, {"page": str(out), **rows_to_json(rows)})


def _study(args: argparse.Namespace, count: int) -> None:
    from cachequant.pipeline.studies.registry import run_study

    findings, files = run_study(args.study, args.folder, args.set, args.device, args.out, count)
    print(f"{findings.text()}\n\nwrote {files[0]} and {len(files) - 1} files beside it")
    _report_json(args, {"page": str(files[0]), "files": [str(file) for file in files], **findings.numbers})


def inspect(args: argparse.Namespace) -> None:
    """What a plan holds."""
    from dataclasses import asdict

    from cachequant.config import config_to_dict
    from cachequant.plan import Plan

    plan = Plan.load(args.plan)
    print(plan.summary())
    for key, value in plan.provenance.items():
        if key not in ("consumers", "weight_bits"):  # lines of the summary
            print(f"{key:12} {value}")
    schedule = {**asdict(plan.schedule), "refresh_steps": list(plan.schedule.refresh_steps)}
    value = {"summary": plan.summary(), "schedule": schedule, "config": config_to_dict(plan.config)}
    _report_json(args, {**value, "provenance": plan.provenance})


def convert(args: argparse.Namespace) -> None:
    """An original checkpoint into a diffusers folder."""
    from cachequant.models.original.convert import convert

    made = convert(args.checkpoint, args.family, args.config, args.weights, args.tokenizer, args.vae)
    made.save(args.out)
    print(f"{made.summary()}\nfolder       {args.out}")
    facts = {"family": made.family, "weights": made.weights, "parameters": made.parameters(), "notes": made.notes}
    _report_json(args, {"folder": str(args.out), **facts, "used": len(made.used), "unused": made.unused})


def export(args: argparse.Namespace) -> None:
    """A plan's integers as a checkpoint of torch_quantizer."""
    from cachequant.pipeline.exchange import export_plan
    from cachequant.plan import Plan

    made = export_plan(Plan.load(args.plan))
    made.save(args.out)
    print(f"{made.summary()}\ncheckpoint   {args.out}")
    facts = {"layers": made.layers, "left_out": made.left_out, "skip_layer": made.skip_layer, "notes": made.notes}
    _report_json(args, {"checkpoint": str(args.out), **facts})


def import_checkpoint(args: argparse.Namespace) -> None:
    """A plan with the integers of a checkpoint of torch_quantizer."""
    from cachequant.pipeline.exchange import import_checkpoint as read
    from cachequant.plan import Plan

    if args.out.exists() and not (args.out.is_dir() and not any(args.out.iterdir())):
        raise UserError(f"{args.out} is there already, expected a new or an empty folder: choose another")
    made = read(Plan.load(args.plan), args.checkpoint)
    made.save(args.out)
    print(f"{made.summary()}\nplan         {args.out}")
    layers = 0 if made.quant is None else len(made.quant.layers)
    _report_json(args, {"plan": str(args.out), "layers": layers, "corrected": len(made.correction.layers)})
