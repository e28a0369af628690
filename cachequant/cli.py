"""The command line. Errors that a user can mend are one line and exit status 2, never a traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cachequant import cli_commands
from cachequant.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""

    def action() -> None:
        parser = build_parser()
        args = parser.parse_args(argv)
        args.run(args) if hasattr(args, "run") else parser.print_help()

    return guarded(action)


def guarded(action: Callable[[], None]) -> int:
    """Run `action`; what a user or the machine did wrong becomes one line and an exit status."""
    try:
        action()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted: finished stages are kept, run the same command to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        line = _one_line(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2
    return 0


def _one_line(error: Exception) -> str | None:
    """What to tell a user; None of an error that is ours."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())  # a name that was given may hold a line break
    if isinstance(error, OSError):
        name = str(error.filename or "a file")
        return f"cannot use {name[:80]}: {error.strerror or error}; choose another file or folder"
    kind, text = type(error).__name__, str(error)  # torch has a class for GPUs, and words for the CPU
    is_full = kind in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in text
    return "out of memory: lower calibration.batch_size and sample.batch_size" if is_full else None


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = argparse.ArgumentParser(
        prog="cachequant",
        description="Fast diffusion sampling without training: feature caching and quantisation in one plan.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    demo = _command(commands, "demo", "the whole job on an embedded model, offline, on the CPU", cli_commands.demo)
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of pictures, page and metrics.json")
    demo.epilog = "--json: the contents of metrics.json: {rows: [{name, feature_distance, psnr, ssim, …}]}"
    run = _command(commands, "run", "the six stages of a configuration, skipping what is current", cli_commands.run)
    run.add_argument("config", type=Path, help="YAML, such as configs/fashion.yaml")
    run.add_argument("--out", type=Path, help="run folder, default runs/<model.name>")
    _recon_option(run)
    _worker_options(run, device=False)
    run.epilog = "--json: {plan: folder, images: folder, refresh_steps: [int], seconds: float}"
    calibrate = _command(commands, "calibrate", "stages 1 to 5: make a plan and save it", cli_commands.calibrate)
    calibrate.add_argument("config", type=Path, help="YAML, such as configs/fashion.yaml")
    calibrate.add_argument("plan", type=Path, help="folder to write the plan to")
    _recon_option(calibrate)
    calibrate.epilog = "--json: {plan: folder, refresh_steps: [int], cost: float, uniform_cost: float}"
    sample = _command(commands, "sample", "images from a saved plan", cli_commands.sample)
    sample.add_argument("plan", type=Path, help="plan folder")
    sample.add_argument("out", type=Path, help="folder of shards (safetensors), manifest.jsonl and grid.png")
    sample.add_argument("--count", type=int, metavar="N", help="images, default sample.count of the plan")
    sample.add_argument(
        "--full", action="store_true", help="the untouched model from the same noise, every step in full"
    )
    _worker_options(sample, device=False)
    sample.epilog = (
        "Run it again to go on where it stopped. --set changes sample.* and backend only. "
        "--json: {images: folder, count: int, drawn: int, seconds: float}, the last two of this call"
    )
    evaluate = _command(
        commands, "evaluate", "judge images: FID, sFID, IS, precision, recall and others", cli_commands.evaluate, False
    )
    _evaluate_options(evaluate)
    report = _command(
        commands, "report", "one page about a plan, drawn from here and now", cli_commands.report, computes=False
    )
    report.add_argument("folder", type=Path, help="plan folder, run folder with its plans, or with --study a YAML")
    report.add_argument(
        "--study", metavar="NAME", help="error, schedule, memory, scaling or formats instead of the plan's page"
    )
    report.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of a study's YAML"
    )
    report.add_argument("--out", type=Path, metavar="FILE", help="HTML file, default report.html or study-NAME.html")
    report.add_argument("--count", type=int, metavar="N", help="images of each row, default 6; of a study, default 32")
    report.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    report.epilog = (
        "--json: {page: file, rows: [{name, psnr, ssim, seconds, …}]}; of a study {page: file, files: [file], …} with all "
        "its numbers, which also lie beside the page with a PNG of each figure. A study goes on where it was interrupted."
    )
    _add_bench(commands)
    inspect = _command(commands, "inspect", "what a plan holds", cli_commands.inspect, computes=False)
    inspect.add_argument("plan", type=Path, help="plan folder")
    inspect.epilog = "--json: {summary: text, schedule: {…}, config: {…}, provenance: {…}}"
    _add_convert(commands)
    _add_exchange(commands)
    return parser


def _add_bench(commands: Any) -> None:
    bench = _command(
        commands,
        "bench",
        "ways to run a model side by side: whole sampling runs, interleaved, medians",
        cli_commands.bench,
    )
    bench.add_argument("config", type=Path, help="YAML, such as configs/cifar10.yaml")
    bench.add_argument("--modes", metavar="A,B", help=(
        "CPU: fp32,int8,cache,cachequant (the default),compile,openvino; GPU: fp32,fp32-tf32,fp16,fp16-graph,fp16-compile,"
        "fp16-compile-cache,deepcache,cache-dit,torchao,int8,cachequant (default: all)"))  # fmt: skip
    bench.add_argument("--rounds", type=int, default=3, help="timed runs of each mode, default 3")
    bench.add_argument("--batch", type=int, help="images at once, default sample.batch_size")
    bench.add_argument(
        "--random-weights", action="store_true", help="random weights in the architecture of model.family"
    )
    bench.add_argument("--pipeline", action="store_true", help="GPU: time text encoder and decoder too")
    bench.epilog = (
        "--json: {rows: [{mode, ms_per_step, ms_full_step, ms_cached_step}], batch, …}, milliseconds per evaluation; on a "
        "GPU also {images_per_second, weight_bytes, peak_bytes, …} or {error}, written after every mode"
    )


def _add_convert(commands: Any) -> None:
    from cachequant.config_values import FAMILIES

    text = "an original checkpoint into a diffusers folder"
    convert = _command(commands, "convert", text, cli_commands.convert, computes=False)
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


def _add_exchange(commands: Any) -> None:
    text = "a plan's integers as a checkpoint of torch_quantizer"
    export = _command(commands, "export", text, cli_commands.export, computes=False)
    export.add_argument("plan", type=Path, help="plan folder")
    export.add_argument("out", type=Path, help="new file that torch.load reads, such as model_8bits_50steps.pth")
    export.epilog = (
        "--json: {checkpoint: file, layers: [name], left_out: {name: reason}, skip_layer: [int], notes: [text]}"
    )
    text = "a plan with the integers of a checkpoint of torch_quantizer"
    imports = _command(commands, "import", text, cli_commands.import_checkpoint, computes=False)
    imports.add_argument("plan", type=Path, help="plan folder of the same model and steps; it stays as it is")
    imports.add_argument("checkpoint", type=Path, help=".pth or .safetensors state dict, read weights-only")
    imports.add_argument(
        "out", type=Path, help="new folder for the plan: layers of the checkpoint, all else of the first"
    )
    imports.epilog = "--json: {plan: folder, layers: int, corrected: int}"


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


def _recon_option(command: argparse.ArgumentParser) -> None:
    """`--recon` is a change of the configuration like any other."""
    command.add_argument(
        "--recon", action="append_const", dest="set", const="quant.recon.enabled=true",
        help="train rounding and grids block by block (quant.recon)",
    )  # fmt: skip


def _evaluate_options(command: argparse.ArgumentParser) -> None:
    command.usage = "cachequant evaluate [options] images"
    command.add_argument("images", type=Path, help="folder of PNG/JPG or shards, .safetensors, or .npz")
    command.add_argument("--ref", type=Path, help=".npz batch or statistics, any image set, or fashion-mnist")
    command.add_argument("--metrics", default="fid,sfid,is,precision,recall", metavar="A,B", help=(
        "of fid, sfid, is, precision, recall, clip, psnr, ssim, lpips; of the miniatures frechet_NET and distance_NET "
        "with NET fashion_cnn or drawings_clip, and retrieval"))  # fmt: skip
    command.add_argument("--prompts", metavar="FILE", help="text of each image, one a line, for clip and retrieval")
    command.add_argument("--resize", type=int, metavar="N", help="cut square and resize; 300 for Stable Diffusion")
    command.add_argument("--weights", type=Path, metavar="DIR", help="folder of the networks' weights")
    command.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at once")
    _worker_options(command)
    command.epilog = "--json: {images: path, reference: path, metrics: {name: float}}"


def _worker_options(command: argparse.ArgumentParser, device: bool = True) -> None:
    """Where the work runs; torchrun and SLURM start their workers themselves."""
    if device:
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    command.add_argument("--devices", type=int, metavar="N", help="workers a machine, default 1")
    command.add_argument("--nodes", type=int, metavar="M", help="machines, default 1")


def stage_main(number: int, argv: Sequence[str] | None = None) -> int:
    """One numbered script: parse, load, run the stage, save."""
    from cachequant.lock import writer_lock
    from cachequant.pipeline.stages import STAGES

    name = STAGES[number - 1]
    parser = argparse.ArgumentParser(description=f"Stage {number} of 6: {name.replace('_', ' ')}.")
    parser.add_argument("config", type=Path, help="YAML, such as configs/fashion.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the configuration"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", type=Path, help="run folder, default runs/<model.name>")
    _recon_option(parser)
    args = parser.parse_args(argv)

    def action() -> None:
        """Run the stage; the last before sampling saves the plan too."""
        stages = cli_commands.stages_of(args.config, args.set, args.device, args.out, number)
        with writer_lock(stages.store.root):
            _, key = stages.run(number)
        print(f"stage {number} ({name}) is done: {stages.store.root}, {key[:12]}")
        if number == 5:
            print(f"plan: {stages.save_plan()}")

    return guarded(action)
