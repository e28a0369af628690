"""How planning scales: DPS to ten thousand steps, stage 1 to networks beyond a billion parameters; predicted and measured.

*DPS.* The band takes T·(2N - 1) distances of m values and the programme K·T·L' additions, L' the allowed group lengths:
time is c₁·T·(2N - 1)·m + c₂·K·T·L', so linear and quadratic in T at a fixed interval. Memory is exact: a ring of 2N - 1
features, T·2N distances, and for each of the K groups a choice per step. The constants are measured at the smallest T.

*Networks.* Transformers of the DiT family (Peebles and Xie 2023) with random weights, in float32. A trajectory takes T
evaluations; their time is predicted from operations at the rate of the next smaller network. Memory is that of the
parameters, of the ring and of one block's activations: ten times its input, four each in front of and behind GELU.
"""

from __future__ import annotations

import gc
import time
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from cachequant.evaluation.plots import points_figure
from cachequant.models.adapter import adapter
from cachequant.pipeline.calibrate import gather
from cachequant.pipeline.context import Context
from cachequant.pipeline.peak_memory import peak_memory
from cachequant.pipeline.studies.findings import Findings, Table
from cachequant.pipeline.studies.subject import StudySubject
from cachequant.schedule import DistanceBand, dps_schedule, num_groups
from cachequant.storage import load_json, save_json

STEPS = (1000, 2500, 5000, 10_000)
VALUES = 4096
"""Values of the feature that DPS is timed on; time is linear in them."""
REPEATS = 3
"""Runs of DPS, the fastest of which counts: other programs only ever make it slower."""
EVALUATIONS = 3
"""Of each network, after as many to warm up."""
ACTIVATIONS = 10
"""Inputs of a block that it holds at once: residual and normed one, the wide layer before and after GELU (four each)."""


@dataclass(frozen=True)
class Transformer:
    """One size of DiT.

    Attributes:
        depth, width, heads: blocks, channels and attention heads.
        size: of the latent, in pixels; patches of 2 give (size / 2)² tokens.
    """

    depth: int
    width: int
    heads: int
    size: int = 32

    def build(self) -> nn.Module:
        """With random weights, on torch's default device."""
        from diffusers import DiTTransformer2DModel

        return DiTTransformer2DModel(
            num_attention_heads=self.heads, attention_head_dim=self.width // self.heads, num_layers=self.depth,
            out_channels=8, sample_size=self.size,
        ).eval()  # fmt: skip


TRANSFORMERS = {
    "DiT-S/2": Transformer(12, 384, 6),
    "DiT-B/2": Transformer(12, 768, 12),
    "DiT-L/2": Transformer(24, 1024, 16),
    "DiT-XL/2": Transformer(28, 1152, 16),
    "DiT, width 1536": Transformer(28, 1536, 24),
}
"""The first four are the paper's; the last one goes on to more than a billion parameters."""


@dataclass(frozen=True)
class Solved:
    """DPS at one number of steps: seconds of the band and of the programme, bytes of each part."""

    steps: int
    groups: int
    band_seconds: float
    solve_seconds: float
    ring_bytes: int
    band_bytes: int


def dps_operations(steps: int, interval: int, values: int) -> tuple[int, int]:
    """Value pairs that the band compares, and additions of the programme."""
    length = min(2 * interval, steps)
    pairs = sum(min(step, length - 1) for step in range(steps))
    lengths = min(2 * interval, steps) - ceil(interval / 2) + 1
    return pairs * values, num_groups(steps, interval) * (steps + 1) * lengths


def dps_bytes(steps: int, interval: int, values: int) -> tuple[int, int]:
    """Ring of float32 features and band of float64 distances, exactly."""
    length = min(2 * interval, steps)
    return max(length - 1, 1) * values * 4, steps * length * 8


def measure_dps(steps: int, interval: int, values: int) -> Solved:
    """The fastest of `REPEATS` runs, of band and programme each."""
    runs = [_run_dps(steps, interval, values) for _ in range(REPEATS)]
    band, solve = min(run.band_seconds for run in runs), min(run.solve_seconds for run in runs)
    return replace(runs[0], band_seconds=band, solve_seconds=solve)


def _run_dps(steps: int, interval: int, values: int) -> Solved:
    """Stream a random walk of features [1, 1, values] and solve."""
    generator, band = torch.Generator().manual_seed(0), DistanceBand(steps, interval)
    feature, moves = torch.zeros(1, 1, values), torch.rand(steps, generator=generator) ** 2
    spent = 0.0
    for step in range(steps):
        feature = feature + moves[step] * torch.randn(1, 1, values, generator=generator)
        start = time.perf_counter()
        band.update(feature)
        spent += time.perf_counter() - start
    start = time.perf_counter()
    schedule = dps_schedule(band)
    solved = time.perf_counter() - start
    held = band.values.numel() * band.values.element_size()
    return Solved(steps, len(schedule.refresh_steps), spent, solved, band.peak_bytes, held)


def predicted_seconds(first: Solved, steps: int, interval: int, values: int) -> tuple[float, float]:
    """Of the band and the programme, from the operations and the times at the smallest number of steps."""
    here, base = (dps_operations(n, interval, values) for n in (steps, first.steps))
    return first.band_seconds * here[0] / base[0], first.solve_seconds * here[1] / base[1]


@dataclass(frozen=True)
class Evaluated:
    """One network: counts, and what its evaluations and DPS beside them took.

    Attributes:
        parameters: how many.
        flops: floating-point operations of one evaluation of one sample.
        feature: values of one sample's cached feature.
        seconds: of one evaluation of one sample; the band's share is `band_seconds`.
        parameter_bytes, ring_bytes: float32.
        peak_bytes: most that was held from building the network to the end of stage 1; None where nothing can tell.
    """

    parameters: int
    flops: float
    feature: int
    seconds: float
    band_seconds: float
    parameter_bytes: int
    ring_bytes: int
    peak_bytes: int | None = None

    @property
    def predicted_peak_bytes(self) -> int:
        """Parameters, ring and `ACTIVATIONS` times the cached feature, which is as large as a block's input."""
        return self.parameter_bytes + self.ring_bytes + 4 * ACTIVATIONS * self.feature


def count(shape: Transformer) -> tuple[int, float, int]:
    """Parameters, operations of one evaluation and values of the cached feature, without any memory."""
    with torch.device("meta"):
        network = shape.build()
        call = (torch.empty(1, 4, shape.size, shape.size), torch.zeros(1, dtype=torch.long))
        labels = torch.zeros(1, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _, feature = adapter(network).full(*call, class_labels=labels)
    return sum(p.numel() for p in network.parameters()), float(counter.get_total_flops()), feature.numel()


def measure_network(shape: Transformer, context: Context) -> Evaluated:
    """Stage 1 of a pipeline around a network with random weights: one sample, a few evaluations, the first not counted."""
    from diffusers import AutoencoderKL, DiTPipeline

    from cachequant.models.families import transformer_scheduler

    parameters, flops, _ = count(shape)
    small = _one_sample(context)
    with peak_memory(context.pipe.device) as peak:
        with context.pipe.device:
            pipe = DiTPipeline(shape.build(), AutoencoderKL(latent_channels=4), transformer_scheduler())
        outcome = Context.of(pipe, small)
        gather(outcome)  # warms up
        measured = gather(outcome)
    evaluations = outcome.num_steps
    seconds = measured.measured["trajectories_seconds"] / evaluations
    band = measured.measured["dps_seconds"] / evaluations
    feature = round(measured.measured["ring_bytes"] / 4 / max(1, min(2 * small.cache.interval, evaluations) - 1))
    held = sum(p.numel() * p.element_size() for p in pipe.transformer.parameters())
    del pipe, outcome
    gc.collect()
    ring = round(measured.measured["ring_bytes"])
    return Evaluated(parameters, flops, feature, seconds, band, held, ring, peak.bytes)


def _one_sample(context: Context) -> Any:
    """The configuration with one sample, L1 costs and `EVALUATIONS` steps."""
    config = context.config
    return replace(
        config,
        sampler=replace(config.sampler, steps=EVALUATIONS, guidance_scale=None, labels=[0], prompts=None),
        cache=replace(config.cache, interval=2, span=None, branch=0, refreshes=None),
        schedule=replace(config.schedule, cost="l1", fallback=False),
        calibration=replace(config.calibration, samples=1, dps_samples=1, dec_samples=1, batch_size=1, prompts=None),
    )


def study(subject: StudySubject, _: int) -> Findings:
    """DPS for each of `STEPS` and stage 1 of each of `TRANSFORMERS`, filed one by one."""
    context, interval = subject.context, subject.context.config.cache.interval
    solved = {n: _filed(subject, "dps", [n, interval, VALUES], Solved, lambda n=n: measure_dps(n, interval, VALUES))
              for n in tqdm(STEPS, "DPS", leave=False, disable=None)}  # fmt: skip
    networks = {
        name: _filed(
            subject, "network", [asdict(shape), "peak"], Evaluated, lambda shape=shape: measure_network(shape, context)
        )
        for name, shape in tqdm(TRANSFORMERS.items(), "networks", leave=False, disable=None)
    }
    return _findings(context, solved, networks)


def _filed(subject: StudySubject, name: str, inputs: list[Any], kind: Any, compute: Any) -> Any:
    """A measurement, kept in the run's folder for this device and number of threads."""
    device = f"{subject.context.pipe.device}, {torch.get_num_threads()} threads"
    return subject.stages.store.obtain(
        1, f"scaling_{name}", {"inputs": inputs, "device": device}, compute,
        lambda folder, value: save_json(folder / "measured.json", asdict(value)),
        lambda folder: kind(**load_json(folder / "measured.json")),
    )[0]  # fmt: skip


def network_predictions(networks: dict[str, Evaluated]) -> dict[str, float | None]:
    """Seconds of one evaluation at the rate of the network before; the first one has none."""
    found: dict[str, float | None] = {}
    rate: float | None = None
    for name, network in networks.items():
        found[name] = None if rate is None else network.flops / rate
        rate = network.flops / network.seconds
    return found


def _findings(context: Context, solved: dict[int, Solved], networks: dict[str, Evaluated]) -> Findings:
    interval, first = context.config.cache.interval, solved[min(solved)]
    predicted = {n: predicted_seconds(first, n, interval, VALUES) for n in solved}
    lines = []
    for n, each in solved.items():
        ring, band = dps_bytes(n, interval, VALUES)
        assert (ring, band) == (each.ring_bytes, each.band_bytes), "memory of DPS is not what the law says"
        seconds = (each.band_seconds, predicted[n][0], each.solve_seconds, predicted[n][1])
        everything = 4 * n * VALUES
        lines.append([str(n), str(each.groups), *(f"{s:.3f}" for s in seconds),
                      *(f"{b / 1e6:.2f}" for b in (ring, band, everything))])  # fmt: skip
    columns = ("T", "groups", "band s", "predicted", "solve s", "predicted", "ring MB", "band MB", "all features MB")
    ahead = network_predictions(networks)
    rows = []
    for name, network in networks.items():
        guess = ahead[name]
        peak = "–" if network.peak_bytes is None else f"{network.peak_bytes / 1e9:.2f}"
        texts = [f"{network.parameters / 1e6:,.0f}", peak, f"{network.predicted_peak_bytes / 1e9:.2f}"]
        texts += [f"{network.flops / 1e9:,.0f}", f"{network.seconds:.3f}", "–" if guess is None else f"{guess:.3f}"]
        rows.append([name, *texts, f"{network.band_seconds:.4f}", f"{250 * 64 * network.seconds / 3600:.2f}"])
    network_columns = (
        "network", "M parameters", "GB at most", "predicted", "GFLOP", "s an evaluation", "predicted", "DPS s an evaluation",
        "h of 64 trajectories of 250 steps",
    )  # fmt: skip
    curves = {
        "band, measured": [(float(n), each.band_seconds) for n, each in solved.items()],
        "band, predicted": [(float(n), predicted[n][0]) for n in solved],
        "programme, measured": [(float(n), each.solve_seconds) for n, each in solved.items()],
        "programme, predicted": [(float(n), predicted[n][1]) for n in solved],
    }
    times = {"measured": [(each.parameters / 1e6, each.seconds) for each in networks.values()]}
    guesses = [(networks[name].parameters / 1e6, guess) for name, guess in ahead.items() if guess is not None]
    times |= {"predicted from the one before": guesses} if guesses else {}
    figures = {
        "DPS against the number of steps": points_figure(curves, "steps", "seconds", True, "xy"),
        "One evaluation against parameters": points_figure(times, "million parameters", "seconds a sample", True, "xy"),
    }
    notes = [
        ("DPS", f"Interval {interval}, features of {VALUES:,} values. Predicted from the operations, T·(2N - 1)·m and "
         f"K·T·L', at the rate of T = {first.steps}; ring and band are exact. “all features” is what one sample would hold "
         "if nothing were streamed."),
        ("Networks", f"Random weights, float32, one sample, {EVALUATIONS} evaluations of stage 1. Predicted from operations "
         "at the rate of the network before, memory from parameters, ring and activations. The last column is measured "
         "seconds times 250·64 evaluations."),
    ]  # fmt: skip
    numbers = {
        "dps": {str(n): {**asdict(each), "predicted": predicted[n]} for n, each in solved.items()},
        "networks": {
            name: {**asdict(each), "predicted": ahead[name], "predicted_peak_bytes": each.predicted_peak_bytes}
            for name, each in networks.items()
        },
    }
    tables = [Table("DPS", columns, lines), Table("Networks", network_columns, rows)]
    return Findings(f"Scaling of planning, N = {interval}", notes, tables, figures, numbers)
