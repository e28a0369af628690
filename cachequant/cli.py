"""The command line. Errors that a user can mend are one line and exit status 2, never a traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cachequant.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help()
        return 0
    return guarded(lambda: args.run(args))


def guarded(action: Callable[[], None]) -> int:
    """Run `action`; a user's mistake or an interruption becomes one line and an exit status."""
    try:
        action()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished stages are kept, run the same command to go on", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = argparse.ArgumentParser(
        prog="cachequant",
        description="Fast diffusion sampling without training: feature caching and quantisation in one plan.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    demo = _command(commands, "demo", "the whole job on an embedded model, offline, on the CPU", _demo)
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of pictures, page and metrics.json")
    demo.epilog = "--json: the contents of metrics.json: {rows: [{name, feature_distance, psnr, ssim, …}]}"
    run = _command(commands, "run", "the six stages of a configuration, skipping what is current", _run)
    run.add_argument("config", type=Path, help="YAML, such as configs/fashion.yaml")
    run.add_argument("--out", type=Path, help="run folder, default runs/<model.name>")
    run.epilog = "--json: {plan: folder, images: folder, refresh_steps: [int], seconds: float}"
    calibrate = _command(commands, "calibrate", "stages 1 to 5: make a plan and save it", _calibrate)
    calibrate.add_argument("config", type=Path, help="YAML, such as configs/fashion.yaml")
    calibrate.add_argument("plan", type=Path, help="folder to write the plan to")
    calibrate.epilog = "--json: {plan: folder, refresh_steps: [int], cost: float, uniform_cost: float}"
    sample = _command(commands, "sample", "images from a saved plan", _sample)
    sample.add_argument("plan", type=Path, help="plan folder")
    sample.add_argument("out", type=Path, help="folder for images.safetensors and grid.png")
    sample.epilog = "--json: {images: file, count: int, seconds: float}; --set changes sample.* and backend only"
    _add_bench(commands)
    inspect = _command(commands, "inspect", "what a plan holds", _inspect, computes=False)
    inspect.add_argument("plan", type=Path, help="plan folder")
    inspect.epilog = "--json: {summary: text, schedule: {…}, config: {…}, provenance: {…}}"
    _add_convert(commands)
    return parser


def _add_bench(commands: Any) -> None:
    bench = _command(
        commands, "bench", "ways to run a model side by side: whole sampling runs, interleaved, medians", _bench
    )
    bench.add_argument("config", type=Path, help="YAML, such as configs/cifar10.yaml")
    modes = "fp32,int8,cache,cachequant"
    bench.add_argument(
        "--modes", default=modes, help=f"of fp32,compile,openvino,int8,cache,cachequant; default {modes}"
    )
    bench.add_argument("--rounds", type=int, default=3, help="runs of each mode, default 3")
    bench.add_argument("--batch", type=int, help="images at once, default sample.batch_size")
    bench.add_argument(
        "--random-weights", action="store_true", help="the architecture of model.family with random weights"
    )
    bench.epilog = (
        "Threads are those of OMP_NUM_THREADS. --json: {rows: [{mode, ms_per_step, ms_full_step, ms_cached_step}], "
        "batch, machine, threads, versions, …}; milliseconds per evaluation and batch"
    )


def _add_convert(commands: Any) -> None:
    from cachequant.config import FAMILIES

    text = "an original checkpoint into a diffusers folder"
    convert = _command(commands, "convert", text, _convert, computes=False)
    convert.add_argument("checkpoint", type=Path, help=".ckpt, .pt, .pth or .safetensors file, read weights-only")
    convert.add_argument("out", type=Path, help="new folder")
    convert.add_argument("--family", required=True, choices=FAMILIES, help="whose checkpoint it is")
    convert.add_argument("--config", type=Path, help="its original YAML, default that of the released checkpoint")
    convert.add_argument(
        "--weights", default="auto", choices=("auto", "ema", "raw"), help="auto: EMA weights wherever the file has them"
    )
    convert.add_argument("--tokenizer", metavar="FOLDER_OR_ID", help="for sd-v1, whose checkpoint holds none")
    convert.add_argument("--vae", metavar="FOLDER_OR_ID", help="for dit-xl2, whose checkpoint holds no first stage")
    convert.epilog = (
        "--json: {folder, family, weights, parameters: {component: int}, used: int, unused: {reason: [key]}, notes}"
    )


def _command(
    commands: Any, name: str, text: str, run: Callable[[argparse.Namespace], None], computes: bool = True
) -> argparse.ArgumentParser:
    """A command with the options that all have; `computes` adds those of a configuration and a device."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    if computes:
        command.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="change a configuration key"
        )
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument("--json", type=Path, metavar="FILE", help="write one JSON object there")
    command.set_defaults(run=run)
    return command


def _report_json(args: argparse.Namespace, value: dict[str, Any]) -> None:
    from cachequant.storage import save_json

    if args.json is not None:
        save_json(args.json, value)


def _demo(args: argparse.Namespace) -> None:
    from cachequant.evaluation.rows import rows_to_json
    from cachequant.pipeline.demo import run_demo

    rows = run_demo(args.out, args.device, args.set)
    print(f"\nwrote {args.out}/report.html, grid.png, schedule.png, error.png, quality.png, metrics.json")
    _report_json(args, rows_to_json(rows))


def stages_of(
    config_path: Path, overrides: list[str], device: str, out: Path | None = None, only: int | None = None
) -> Any:
    """The stages of a configuration file on its own pipeline; `only` allows just one of them to be computed."""
    from cachequant.config import load_config
    from cachequant.models.loading import load_pipeline
    from cachequant.pipeline.context import Context
    from cachequant.pipeline.stages import Stages

    config = load_config(config_path, overrides)
    if device != "auto":
        config.device = device
    pipe = load_pipeline(config.model, config.device)
    return Stages.at(Context.of(pipe, config), out, only)


def _run(args: argparse.Namespace) -> None:
    stages = stages_of(args.config, args.set, args.device, args.out)
    stages.context.generator(sampling=True)  # a prompt list that cannot be had is told now, not behind the calibration
    (plan, _), (samples, images_key) = stages.plan(), stages.samples()
    folder, images = stages.save_plan(), stages.store.root / f"6_sample-{images_key[:12]}"
    print(f"{plan.summary()}\nplan         {folder}\nimages       {images}/grid.png, {samples.seconds:.1f} s")
    steps = list(plan.schedule.refresh_steps)
    _report_json(args, {"plan": str(folder), "images": str(images), "refresh_steps": steps, "seconds": samples.seconds})


def _bench(args: argparse.Namespace) -> None:
    from cachequant.config import load_config
    from cachequant.models.loading import load_pipeline
    from cachequant.pipeline.bench import format_bench, run_bench
    from cachequant.pipeline.context import Context

    config = load_config(args.config, [*args.set, *([f"sample.batch_size={args.batch}"] if args.batch else [])])
    if args.random_weights:
        from cachequant.models.architectures import random_pipeline

        pipe = random_pipeline(config.model.family)
        config.sampler.prompts = config.calibration.prompts = None
    else:
        pipe = load_pipeline(config.model, config.device if args.device == "auto" else args.device)
    result = run_bench(Context.of(pipe, config), tuple(args.modes.split(",")), args.rounds)
    result["model"] += " with random weights" if args.random_weights else ""
    print(format_bench(result))
    _report_json(args, result)


def _calibrate(args: argparse.Namespace) -> None:
    plan, _ = stages_of(args.config, args.set, args.device).plan()
    plan.save(args.plan)
    print(f"{plan.summary()}\nplan         {args.plan}")
    schedule = plan.schedule
    numbers = {"cost": schedule.cost, "uniform_cost": schedule.uniform_cost}
    _report_json(args, {"plan": str(args.plan), "refresh_steps": list(schedule.refresh_steps), **numbers})


def _sample(args: argparse.Namespace) -> None:
    from cachequant.api import enable, load_quantized
    from cachequant.evaluation.grid import image_grid, save_image
    from cachequant.models.loading import load_pipeline, torch_device
    from cachequant.pipeline.sample import draw_enabled
    from cachequant.plan import Plan
    from cachequant.storage import make_folder, save_tensors

    make_folder(args.out)
    plan = Plan.load(args.plan, lazy=True)
    config = _with_sample_settings(plan.config, args.set)
    if plan.remainder is not None and torch_device(args.device).type == "cpu":
        pipe = load_quantized(args.plan, config.backend)
    else:
        pipe = enable(load_pipeline(config.model, args.device), plan, config.backend)
    samples = draw_enabled(pipe, config)
    save_tensors(args.out / "images.safetensors", {"images": samples.images})
    save_image(image_grid({"samples": samples.images[:16]}), args.out / "grid.png")
    print(f"{len(samples.images)} images in {samples.seconds:.1f} s: {args.out}/grid.png")
    value = {
        "images": str(args.out / "images.safetensors"),
        "count": len(samples.images),
        "seconds": samples.seconds,
    }
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


def _inspect(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    from cachequant.config import config_to_dict
    from cachequant.plan import Plan

    plan = Plan.load(args.plan)
    print(plan.summary())
    for key, value in plan.provenance.items():
        if key != "consumers":  # lines of the summary
            print(f"{key:12} {value}")
    schedule = {**asdict(plan.schedule), "refresh_steps": list(plan.schedule.refresh_steps)}
    value = {"summary": plan.summary(), "schedule": schedule, "config": config_to_dict(plan.config)}
    _report_json(args, {**value, "provenance": plan.provenance})


def _convert(args: argparse.Namespace) -> None:
    from cachequant.models.original.convert import convert

    made = convert(args.checkpoint, args.family, args.config, args.weights, args.tokenizer, args.vae)
    made.save(args.out)
    print(f"{made.summary()}\nfolder       {args.out}")
    facts = {"family": made.family, "weights": made.weights, "parameters": made.parameters(), "notes": made.notes}
    _report_json(args, {"folder": str(args.out), **facts, "used": len(made.used), "unused": made.unused})


def stage_main(number: int, argv: Sequence[str] | None = None) -> int:
    """One numbered script: parse, load, run the stage, save."""
    from cachequant.pipeline.stages import STAGES

    name = STAGES[number - 1]
    parser = argparse.ArgumentParser(description=f"Stage {number} of 6: {name.replace('_', ' ')}.")
    parser.add_argument("config", type=Path, help="YAML, such as configs/fashion.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the configuration"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", type=Path, help="run folder, default runs/<model.name>")
    args = parser.parse_args(argv)

    def action() -> None:
        stages = stages_of(args.config, args.set, args.device, args.out, number)
        _, key = stages.run(number)
        print(f"stage {number} ({name}) is done: {stages.store.root}, {key[:12]}")
        if number == 5:
            print(f"plan: {stages.save_plan()}")

    return guarded(action)
