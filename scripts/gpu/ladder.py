"""The optimisation ladder of a U-Net step: each rung adds one thing; its milliseconds stand beside what was predicted.

Random weights, latents 64×64, one image with guidance (batch 2). A rung that fails is reported and the next one runs.
`--json` is rewritten after every rung. The last int8 rung is also compared with the simulated backend, and profiled.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.models.adapter import Adapter, adapter
from cachequant.models.architectures import random_denoiser
from cachequant.pipeline.compiled import CompiledAdapter
from cachequant.pipeline.graphs import CudaRecorder, GraphedAdapter
from cachequant.quant.convert import LayerPlan, fresh_state, install
from cachequant.quant.deploy import deploy_on_device
from cachequant.quant.device_blocks import FORWARDS
from cachequant.quant.layers import Mode, quantize_weight
from cachequant.types import LayerQuant, QuantState, Schedule

RESNETS = ("ResnetBlock2D", "UpBlock2D", "CrossAttnUpBlock2D")
BLOCKS = (*RESNETS, "BasicTransformerBlock")

PREDICTED = {
    "fp32 eager": (72.0, 13.0), "fp32 eager, TF32": (30.0, 6.0), "fp16 eager": (24.4, 4.6), "fp16 graph": (10.2, 2.7),
    "fp16 compile + graph": (6.4, 1.5), "int8 layers, asymmetric weights": (11.0, 3.0), "int8 layers": (9.5, 2.6),
    "+ resnets": (7.3, 1.9), "+ transformer blocks": (5.6, 1.5), "+ projections and samplers": (5.0, 1.35),
    "+ last norm": (4.95, 1.30), "+ keys of the prompt once": (4.8, 1.28),
}  # fmt: skip
"""Rung -> ms of a full and of a cached step of Stable Diffusion, written down before the first run."""

FORETOLD = ("sd-v1", 2)
"""The family and batch of these predictions."""


@dataclass
class Bench:
    """A network, its inputs, and two evaluations: a full step 0 and a cached step 1."""

    network: Any
    inputs: dict[str, Tensor]
    clock: FeatureCache
    structure: Adapter

    @staticmethod
    def of(network: Any, batch: int, dtype: torch.dtype, tokens: int = 77) -> Bench:
        """On the GPU, channels last; `tokens` is the length of a context."""
        network = network.to("cuda", dtype, memory_format=torch.channels_last)
        settings = network.config
        size = (batch, settings.in_channels, settings.sample_size, settings.sample_size)
        inputs = {"x": torch.randn(size, device="cuda").to(dtype), "timestep": torch.tensor(500, device="cuda")}
        if settings.get("cross_attention_dim"):
            width = settings.cross_attention_dim
            inputs["encoder_hidden_states"] = torch.randn(batch, tokens, width, device="cuda").to(dtype)
        if settings.get("num_embeds_ada_norm"):
            inputs["class_labels"] = torch.arange(batch, device="cuda")
        return Bench(network, inputs, FeatureCache(Schedule((0,), 2, 2)), adapter(network))

    def full(self, runner: Any) -> tuple[Tensor, Tensor]:
        """The whole network at step 0."""
        self.clock.step = 0
        return runner.full(**self.inputs)

    def cached(self, runner: Any, feature: Tensor) -> Tensor:
        """The tail at step 1."""
        self.clock.step = 1
        rest = {k: v for k, v in self.inputs.items() if k not in ("x", "timestep")}
        return runner.cached(self.inputs["x"], self.inputs["timestep"], None, feature, **rest)

    def graphed(self, tables: Any = None, context: Any = None) -> GraphedAdapter:
        """The steps as CUDA graphs."""
        self.structure.rebuild()
        return GraphedAdapter(self.structure, self.clock, tables, CudaRecorder(), context)

    def times(self, runner: Any) -> tuple[float, float]:
        """Median milliseconds of a full and of a cached step, inputs copied and all."""
        feature = self.full(runner)[1].clone(memory_format=torch.preserve_format)
        return measured(lambda: self.full(runner)), measured(lambda: self.cached(runner, feature))


def measured(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median milliseconds between two events around one call."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def symmetric(network: nn.Module, state: QuantState) -> QuantState:
    """The same state with weights on grids around zero, which need no sums of activations."""
    layers = {}
    for name, layer in state.layers.items():
        source: Any = network.get_submodule(name)
        parts = source.weight.split(layer.widths, dim=1)
        grids = tuple(quantize_weight(part, 8, "minmax", symmetric=True) for part in parts)
        layers[name] = LayerQuant(grids, layer.inputs, layer.widths)
    return QuantState(layers)


def calibrated(bench: Bench) -> QuantState:
    """8-bit grids of everything but the ends and the time embedding, observed on both steps."""
    left_out = bench.structure.end_names() | bench.structure.time_names()
    splits = bench.structure.splits()
    plans = {
        name: LayerPlan(8, 8, splits.get(name, 0))
        for name, module in bench.network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and name not in left_out
    }
    handle = install(bench.network, fresh_state(bench.network, plans, "minmax"), bench.clock, search="minmax")
    handle.set_mode(Mode.OBSERVE)
    bench.structure.rebuild()
    _, feature = bench.full(bench.structure)
    handle.finish_step(0)
    bench.cached(bench.structure, feature)
    handle.finish_step(1)
    state = handle.state
    handle.remove()
    bench.structure.rebuild()
    return state


@contextmanager
def deployed(bench: Bench, state: QuantState, kinds: tuple[str, ...]) -> Iterator[Any]:
    """The network on integers with these blocks fused."""
    forwards = {kind: FORWARDS[kind] for kind in FORWARDS if kind in kinds}
    shallow = bench.structure.shallow_names()
    handle = deploy_on_device(bench.network, state, bench.clock, forwards=forwards, shallow=shallow)
    try:
        yield handle
    finally:
        handle.remove()
        bench.structure.rebuild()


def compiled(bench: Bench) -> tuple[float, float]:
    """torch.compile of both steps under captured graphs."""
    bench.structure.rebuild()
    with ExitStack() as stack:
        adapter = CompiledAdapter(bench.structure, stack)
        return bench.times(GraphedAdapter(adapter, bench.clock, None, CudaRecorder()))


def fidelity(bench: Bench, state: QuantState) -> dict[str, float]:
    """Relative distances of one full step's output between the network, its simulated and its real integers.

    Half-precision activations round to the other integer now and then, so two paths differ by much of one quantisation; real
    integers are right if they are as near to the network as the simulation is.
    """
    exact = bench.full(bench.structure)[0].float()
    handle = install(bench.network, state, bench.clock)
    bench.structure.rebuild()
    simulated = bench.full(bench.structure)[0].float()
    handle.remove()
    with deployed(bench, state, tuple(FORWARDS)) as made:
        found = bench.full(bench.graphed(made.tables, made.context))[0].float()
    pairs = {"integers to network": (found, exact), "simulated to network": (simulated, exact),
             "integers to simulated": (found, simulated)}  # fmt: skip
    return {name: float((one - other).norm() / exact.norm()) for name, (one, other) in pairs.items()}


def profile(call: Callable[[], Any], rows: int = 60) -> list[dict[str, Any]]:
    """Kernels of one call by total time."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda e: -e.device_time_total)[:rows]
    return [{"kernel": e.key[:160], "us": e.device_time_total, "count": e.count} for e in events]


class Ladder:
    """Rows, printed and written as they come."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.content = path, {**header, "rungs": []}

    def add(self, name: str, run: Callable[[], tuple[float, float]]) -> None:
        """Run one rung; a failure is a row too."""
        start = time.perf_counter()
        predicted = PREDICTED[name] if (self.content["family"], self.content["batch"]) == FORETOLD else (None, None)
        try:
            ms = run()
            row = {"rung": name, "full_ms": ms[0], "cached_ms": ms[1], "predicted": predicted}
            guess = "" if predicted[0] is None else f"   predicted {predicted[0]:5.2f} and {predicted[1]:5.2f}"
            print(f"{name:34} full {ms[0]:7.2f}  cached {ms[1]:6.2f}{guess}", flush=True)
        except Exception as error:  # whatever it is, the next rung may run
            row = {"rung": name, "failed": traceback.format_exc()[-2000:]}
            print(f"{name:34} FAILED {type(error).__name__} {str(error)[:150]}", flush=True)
            torch.cuda.synchronize()
        row["seconds"] = time.perf_counter() - start
        self.content["rungs"].append(row)
        self.write()

    def write(self) -> None:
        self.path.write_text(json.dumps(self.content, indent=1), encoding="utf-8")


@torch.no_grad()
def climb(ladder: Ladder, bench: Bench, with_compile: bool, quick: bool) -> None:
    """All rungs in half precision, or the first and the last one."""
    ladder.add("fp16 eager", lambda: bench.times(bench.structure))
    ladder.add("fp16 graph", lambda: bench.times(bench.graphed()))
    state = calibrated(bench)
    even = symmetric(bench.network, state)

    def rung(name: str, given: QuantState, kinds: tuple[str, ...], keys_once: bool = False) -> None:
        def run() -> tuple[float, float]:
            with deployed(bench, given, kinds) as handle:
                return bench.times(bench.graphed(handle.tables, handle.context if keys_once else None))

        ladder.add(name, run)

    if not quick:
        rung("int8 layers, asymmetric weights", state, ())
        rung("int8 layers", even, ())
        rung("+ resnets", even, RESNETS)
        rung("+ transformer blocks", even, BLOCKS)
        rung("+ projections and samplers", even, tuple(kind for kind in FORWARDS if kind != "GroupNorm"))
        rung("+ last norm", even, tuple(FORWARDS))
    rung("+ keys of the prompt once", even, tuple(FORWARDS), keys_once=True)
    for kind, given in (("symmetric", even), ("asymmetric", state)):
        ladder.content[f"fidelity, {kind} weights"] = found = fidelity(bench, given)
        print(f"{kind} weights, " + ", ".join(f"{name} {value:.2e}" for name, value in found.items()), flush=True)
    ladder.write()
    with deployed(bench, even, tuple(FORWARDS)) as handle:
        runner = bench.graphed(handle.tables, handle.context)
        feature = bench.full(runner)[1].clone(memory_format=torch.preserve_format)
        ladder.content["profile"] = {
            "full": profile(lambda: bench.full(runner)), "cached": profile(lambda: bench.cached(runner, feature)),
        }  # fmt: skip
    for step, rows in ladder.content["profile"].items():
        print(f"{step} step: {sum(row['us'] for row in rows):.0f} us in kernels")
        for row in rows[:25]:
            print(f"{row['us']:9.1f} us {row['count']:4} x {row['kernel']}")
    ladder.write()
    if with_compile:
        ladder.add("fp16 compile + graph", lambda: compiled(bench))


def main() -> int:
    """Climb."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--family", default="sd-v1")
    parser.add_argument("--tokens", type=int, default=77, help="of the context of cross-attention")
    parser.add_argument("--batch", type=int, default=2, help="both guidance halves counted")
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which takes minutes")
    parser.add_argument("--quick", action="store_true", help="the first and the last rung, and the profile")
    parser.add_argument("--fp32", action="store_true", help="also full precision")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no GPU was found, expected a CUDA device: run this on a machine with one", file=sys.stderr)
        return 2
    header = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "family": given.family,
        "batch": given.batch,
    }
    ladder = Ladder(given.json, header)
    network = random_denoiser(given.family, device="cuda")
    if given.fp32:
        bench = Bench.of(network, given.batch, torch.float32, given.tokens)
        with torch.no_grad():
            for tf32, name in ((False, "fp32 eager"), (True, "fp32 eager, TF32")):
                torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
                ladder.add(name, lambda bench=bench: bench.times(bench.structure))
    climb(ladder, Bench.of(network, given.batch, torch.float16, given.tokens), given.compile, given.quick)
    return int(any("failed" in row for row in ladder.content["rungs"]))


if __name__ == "__main__":
    sys.exit(main())
