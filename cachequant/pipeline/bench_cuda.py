"""The bench on a GPU: whole sampling loops of one process, mode after mode, each warmed up and then timed."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache as once
from typing import Any, Protocol

import torch
from torch import Tensor

from cachequant.errors import UserError
from cachequant.models.adapter import device_of, on_card
from cachequant.models.cost import float_bytes
from cachequant.pipeline.bench_modes import MODES, Mode, Running, Setup
from cachequant.pipeline.context import Context
from cachequant.pipeline.first_calls import first_call
from cachequant.pipeline.hook import Call
from cachequant.pipeline.machine import versions
from cachequant.pipeline.memory import held_bytes
from cachequant.pipeline.timing_plan import timing_plan
from cachequant.plan import Plan
from cachequant.types import LayerQuant, QuantState

Row = dict[str, Any]


class Clock(Protocol):
    """Takes the time of a device's work."""

    def mark(self) -> Any:
        """A point in the work that was handed out so far."""
        ...

    def between(self, begin: Any, end: Any) -> float:
        """Milliseconds between two points that were passed."""
        ...

    def wait(self) -> None:
        """Until all work is done."""
        ...


class CudaClock:
    """Events on the current stream: nothing waits for the GPU while a loop runs."""

    def mark(self) -> Any:
        """An event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Milliseconds."""
        return float(begin.elapsed_time(end))

    def wait(self) -> None:
        """For the device."""
        torch.cuda.synchronize()


@dataclass
class Loops:
    """What the timed loops of one mode took.

    Attributes:
        full, cached: milliseconds of one evaluation each.
        seconds: of one loop each, from the first evaluation to the last scheduler step, or to the last evaluation where
            the pipeline goes on to decode.
        pipeline: seconds of one call of the pipeline each, empty where it is left behind its loop.
        first: output of the first evaluation [B, C, H, W].
    """

    full: list[float] = field(default_factory=list)
    cached: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    pipeline: list[float] = field(default_factory=list)
    first: Tensor | None = None


@torch.no_grad()
def run_bench_cuda(
    context: Context,
    modes: tuple[str, ...] | None = None,
    rounds: int = 3,
    whole: bool = False,
    report: Callable[[dict[str, Any]], None] = lambda result: None,
    setup: Setup | None = None,
    clock: Clock | None = None,
) -> dict[str, Any]:
    """Measure one mode after the other: {rows: [{mode, ms_per_step, ms_full_step, ms_cached_step, …}], facts}.

    A loop is the pipeline's own, with its scheduler, guidance and corrections, of `sample.batch_size` images; its timesteps
    stay on the host, where schedulers compute with them, and the denoiser reads them from a table on the device. Every mode
    draws one loop that does not count, which builds, compiles, tunes and captures, and then `rounds` that do. A mode that
    cannot run here is skipped with a line, one that fails is a row with its error.

    Args:
        context: pipeline and configuration; the pipeline's precision is changed in place, and float32 in the end.
        modes: of MODES; None is all of them.
        rounds: timed loops of each mode.
        whole: time the pipeline's whole call too: text encoder, loop and decoder.
        report: called with the result so far after each mode.
        setup, clock: how modes are made and timed; the GPU's by default.

    Raises:
        UserError: unknown mode, or a pipeline without a decoder with `whole`.
    """
    modes = tuple(MODES) if modes is None else modes
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown or not modes:
        raise UserError(f"modes has {unknown or 'nothing'}, expected some of {','.join(MODES)}: correct --modes")
    if whole and all(getattr(context.pipe, name, None) is None for name in ("vae", "vqvae")):
        raise UserError("this pipeline has no first stage, expected one that decodes: leave --pipeline out")
    setup = setup or Setup(context, once(lambda: device_plan(context)))
    timer = Timer(context, clock or CudaClock(), rounds, whole)
    result: dict[str, Any] = {"rows": [], **_facts(timer)}
    reference: Tensor | None = None
    try:
        with on_card(device_of(context.adapter.denoiser)), _host_timesteps(context):
            for name in modes:
                row, output = _row(name, setup, timer)
                reference = output if reference is None else reference
                if row is None:
                    continue
                if output is not None and reference is not None:
                    row["distance_of_first_output"] = float((output - reference).norm() / reference.norm())
                result["rows"].append(row)
                report(result)
    finally:
        setup.release()
        _precision(context, torch.float32, channels_last=False)
    return result


def _row(name: str, setup: Setup, timer: Timer) -> tuple[Row | None, Tensor | None]:
    """Run one mode: its row and its first output; (None, None) where it cannot run here."""
    mode, context = MODES[name], setup.context
    absent = mode.absent(context)
    if absent is not None:
        print(f"{name}: skipped, {absent}", flush=True)
        return None, None
    start = time.perf_counter()
    try:
        _precision(context, torch.float32 if mode.full_precision else setup.half, not mode.full_precision or mode.tf32)
        if not mode.shares:
            setup.release()
        with _products(mode.tf32):
            loops, row = timer.run(name, mode, setup)
    except Exception as error:  # whatever it is, the next mode may run
        row, loops = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}, Loops()
    finally:
        if not mode.shares:
            setup.release()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    row = {"mode": name, "note": mode.note, **row, "seconds_with_setup": time.perf_counter() - start}
    print(format_row(row), flush=True)
    return row, loops.first


class Timer:
    """Runs loops and takes their times."""

    def __init__(self, context: Context, clock: Clock, rounds: int, whole: bool) -> None:
        self.context, self.clock, self.rounds, self.whole = context, clock, rounds, whole
        first = context.config.sample.seed
        self.seeds = list(range(first, first + context.config.sample.batch_size))
        self.device = device_of(context.adapter.denoiser)
        self.timesteps = torch.tensor(context.timesteps, device=self.device)  # [T]
        self.float32_bytes = float_bytes(context.adapter.denoiser)

    def run(self, label: str, mode: Mode, setup: Setup) -> tuple[Loops, Row]:
        """One loop that does not count and `rounds` that do: their times, and medians with what else the row says."""
        warm, loops, gpu = Loops(), Loops(), self.device.type == "cuda"
        with mode.make(setup) as running:
            self._loop(label, running, warm)
            loops.first = warm.first
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            for _ in range(self.rounds):
                self._loop(label, running, loops)
            weights = held_bytes(running.holds, self.device)
        more = {
            "graphs": running.graphs,
            "simulated": dict(running.simulated),
            "weight_bytes": weights,
            "weight_share_of_fp32": weights / self.float32_bytes,
            "peak_bytes": torch.cuda.max_memory_allocated() if gpu else None,
        }
        return loops, _numbers(self, loops) | more

    def _loop(self, label: str, running: Running, loops: Loops) -> None:
        marks: list[tuple[bool, Any, Any]] = []
        began, cache = 0.0, running.cache

        def timed(call: Call) -> Tensor:
            """One evaluation between two marks of the clock."""
            nonlocal began
            if not marks:
                self.clock.wait()
                began = time.perf_counter()
            call = replace(call, timestep=self._on_device(call.timestep, cache.step))
            full, begin = cache.schedule.is_refresh(cache.step), self.clock.mark()
            output = running.step(call)
            marks.append((full, begin, self.clock.mark()))
            if loops.first is None:
                loops.first = output.float().cpu()
            return output

        self.clock.wait()
        start = time.perf_counter()
        if self.whole:
            for _ in self.context.run(timed, cache, self.seeds, label, len(self.seeds), sampler=running.sampler):
                pass
        else:
            self.context.trajectories(timed, cache, self.seeds, label, len(self.seeds), running.sampler)
        self.clock.wait()
        end = time.perf_counter()
        for full, a, b in marks:
            (loops.full if full else loops.cached).append(self.clock.between(a, b))
        loops.seconds.append(1e-3 * self.clock.between(marks[0][1], marks[-1][2]) if self.whole else end - began)
        if self.whole:
            loops.pipeline.append(end - start)

    def _on_device(self, timestep: Any, step: int) -> Tensor:
        """The timestep of `step` from the table, shaped as the pipeline gave it: nothing is copied from the host."""
        found = self.timesteps[step]
        return found.expand_as(timestep) if isinstance(timestep, Tensor) else found


def _numbers(timer: Timer, loops: Loops) -> Row:
    """Medians."""
    seconds = statistics.median(loops.seconds)
    images = statistics.median(loops.pipeline) if loops.pipeline else seconds
    return {
        "ms_per_step": 1e3 * seconds / timer.context.num_steps,
        "ms_full_step": statistics.median(loops.full) if loops.full else None,
        "ms_cached_step": statistics.median(loops.cached) if loops.cached else None,
        "full_steps": len(loops.full) // timer.rounds,
        "cached_steps": len(loops.cached) // timer.rounds,
        "seconds_per_loop": seconds,
        "seconds_per_pipeline": statistics.median(loops.pipeline) if loops.pipeline else None,
        "images_per_second": len(timer.seeds) / images,
    }


def format_row(row: Row) -> str:
    """One line of the table that grows while the bench runs."""
    if "error" in row:
        return f"{row['mode']:<19} FAILED after {row['seconds_with_setup']:.0f} s: {row['error'][:200]}"
    cells = [
        f"{row[key]:9.3f}" if row[key] is not None else f"{'–':>9}"
        for key in ("ms_per_step", "ms_full_step", "ms_cached_step")
    ]
    peak = "" if row["peak_bytes"] is None else f"  peak {row['peak_bytes'] / 2**30:6.2f} GiB"
    return (
        f"{row['mode']:<19}{''.join(cells)} ms/step, full, cached  {row['images_per_second']:8.2f} images/s"
        f"  weights {row['weight_share_of_fp32']:.3f}x fp32{peak}  {_graphs(row)}  ({row['seconds_with_setup']:.0f} s)"
    )


def _graphs(row: Row) -> str:
    """Whether the steps were graphs, and what kept them from it."""
    if row["graphs"] or not row["simulated"]:
        return "graphs" if row["graphs"] else "no graphs"
    (name, reason), *others = row["simulated"].items()
    return f"NO GRAPHS, {name}{f' and {len(others)} more' if others else ''} simulated: {reason}"


def format_ratios(result: dict[str, Any]) -> str:
    """How much faster each mode's loop is than each of the usual baselines."""
    rows = {row["mode"]: row for row in result["rows"] if "error" not in row}
    bases = [name for name in ("fp32", "fp16", "fp16-graph", "fp16-compile", "fp16-compile-cache") if name in rows]
    lines = [f"{'images/s against':<19}" + "".join(f"{base:>20}" for base in bases)]
    for name, row in rows.items():
        ratios = [row["images_per_second"] / rows[base]["images_per_second"] for base in bases]
        lines.append(f"{name:<19}" + "".join(f"{ratio:19.2f}×" for ratio in ratios))
    return "\n".join(lines)


@torch.no_grad()
def device_plan(context: Context) -> Plan:
    """The plan whose times are those of a calibrated one; its integers are in the host's memory, as a loaded plan's are."""
    plan = timing_plan(context, first_call(context))
    if plan.quant is None:
        raise UserError(
            "quant.enabled is false, expected a quantised plan for int8 and cachequant: leave these modes out"
        )
    layers = {name: _on_host(layer) for name, layer in plan.quant.layers.items()}
    return replace(plan, quant=QuantState(layers, plan.quant.operands))


def _on_host(layer: LayerQuant) -> LayerQuant:
    grids = tuple(
        replace(grid, values=grid.values.cpu(), scale=grid.scale.cpu(), zero_point=grid.zero_point.cpu())
        for grid in layer.weights
    )
    return replace(layer, weights=grids)


def _precision(context: Context, dtype: torch.dtype, channels_last: bool) -> None:
    """Cast every part of the pipeline; convolutions of half precision and TF32 are faster with channels last."""
    order = torch.channels_last if channels_last else torch.contiguous_format
    for part in context.pipe.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, dtype, memory_format=order)  # type: ignore[call-overload]  # past diffusers' warnings


@contextmanager
def _products(tf32: bool) -> Iterator[None]:
    """TF32 on or off, and cuDNN's choice by measuring."""
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        matmul, cudnn, benchmark = kept
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def _host_timesteps(context: Context) -> Iterator[None]:
    """The scheduler's timesteps stay on the host, wherever the pipeline wants them: no step waits for the GPU then."""
    scheduler = context.pipe.scheduler
    inner = scheduler.set_timesteps

    def set_timesteps(num_inference_steps: int, device: Any = None, **kwargs: Any) -> None:
        inner(num_inference_steps, **kwargs)

    scheduler.set_timesteps = set_timesteps
    try:
        yield
    finally:
        del scheduler.set_timesteps


def _facts(timer: Timer) -> dict[str, Any]:
    """Everything that a number needs beside it."""
    context, config = timer.context, timer.context.config
    return {
        "model": config.model.name,
        "batch": config.sample.batch_size,
        "guidance": config.sampler.guidance_scale,
        "evaluations": context.num_steps,
        "interval": config.cache.interval,
        "rounds": timer.rounds,
        "timed": "text encoder, loop and decoder" if timer.whole else "the loop: denoiser, scheduler, guidance",
        "plan": "activation grids of one evaluation, corrections that change nothing: the times of a calibrated plan",
        "quant": {"weight_symmetric": config.quant.weight_symmetric, "time_embedding": config.quant.time_embedding},
        "float32_bytes": timer.float32_bytes,
        "card": torch.cuda.get_device_name() if timer.device.type == "cuda" else None,
        "versions": versions(),
    }  # fmt: skip
