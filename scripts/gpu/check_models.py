"""Whole sampling runs of trained miniatures on this GPU: real integers against the simulated backend.

    python scripts/gpu/check_models.py configs/fashion.yaml configs/fashion_dit.yaml --json models.json

Every evaluation of a simulated run is computed again by the integers, from the same x_t. They are right if their
predictions are much nearer to the simulated ones than these are to full precision (`TOLERANCE` of that distance) or, in a
network that amplifies single roundings, nearer than the simulation is to itself when x_t moves by a rounding of half
precision (`NUDGE`; rounding itself would not do: TF32 rounds x_t to as many bits); and if they are as near to full
precision as the simulation is (within `EXCESS`), which no systematic error is. Over whole runs from the same noise two
paths that round one activation in a thousand to the other integer may end in images that differ by much of the effect of
quantisation itself; there the integers' images must be as near to the full-precision ones as the simulated images are
(within 1 dB). The exit status is 1 if a run fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cachequant.config import load_config
from cachequant.evaluation.paired import psnr
from cachequant.models.loading import load_pipeline
from cachequant.pipeline.at_work import at_work
from cachequant.pipeline.context import Context
from cachequant.pipeline.hook import Call
from cachequant.pipeline.sample import draw
from cachequant.pipeline.stages import Stages
from cachequant.plan import Plan

TOLERANCE = 0.7
"""Distance of integers to simulation over that of simulation to full precision, of one run's predictions."""
EXCESS = 1.1
"""Distance of integers to full precision over that of simulation to full precision, of one run's predictions."""
NUDGE = 2.0**-11
"""Relative change of x_t, at most: half precision's rounding."""
SETTINGS = ("quant.weight_symmetric=true", "quant.attention_bits=null")
"""What the integer kernels want: no sums of activations, attention in floating point."""


def compare(config: str, overrides: list[str], device: str, count: int) -> dict[str, Any]:
    """Distances between full-precision, simulated and integer runs of one plan: of images in dB, of predictions."""
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
    integers = Context.of(pipe, load_config(config, [*settings, f"backend={backend}"]))
    images["integers"] = draw(integers, plan, seeds, backend)

    def distance(one: Any, other: Any) -> float:
        return float(psnr(one.images, other.images, 1.0).mean())

    row: dict[str, Any] = {
        "config": config,
        "overrides": overrides,
        "simulated_to_full": distance(images["simulated"], full),
        "integers_to_full": distance(images["integers"], full),
        "integers_to_simulated": distance(images["integers"], images["simulated"]),
        "predictions": predictions(context, integers, plan, seeds),
        "seconds": {"full": full.seconds, **{name: made.seconds for name, made in images.items()}},
    }
    row["ok"] = row["integers_to_full"] >= row["simulated_to_full"] - 1.0 and right(**row["predictions"])
    return row


def predictions(context: Context, integers: Context, plan: Plan, seeds: list[int]) -> dict[str, float]:
    """Relative distances between predictions at the x_t of a simulated run; see `right`."""
    simulated = evaluations(context, plan, seeds)
    outputs = [evaluation.output for evaluation in simulated]
    exact, found = again(context, None, simulated), again(integers, plan, simulated)
    moved = again(context, plan, [nudged(evaluation) for evaluation in simulated])
    return {
        "simulated_to_full": apart(outputs, exact),
        "integers_to_full": apart(found, exact),
        "integers_to_simulated": apart(found, outputs),
        "nudged_to_simulated": apart(moved, outputs),
    }


def right(
    simulated_to_full: float, integers_to_full: float, integers_to_simulated: float, nudged_to_simulated: float
) -> bool:
    """Whether predictions at these distances are those of the simulation, as said above."""
    near = max(TOLERANCE * simulated_to_full, nudged_to_simulated)
    return integers_to_simulated <= near and integers_to_full <= EXCESS * simulated_to_full


@dataclass(frozen=True)
class Evaluation:
    """One call of a run's denoiser, at a step, and what came of it."""

    step: int
    call: Call
    output: Tensor


def nudged(evaluation: Evaluation) -> Evaluation:
    """The same call with every value of x_t changed by a random share of `NUDGE`, the same for equal steps."""
    x = evaluation.call.x
    generator = torch.Generator(x.device).manual_seed(evaluation.step)
    share = 2 * torch.rand(x.shape, generator=generator, device=x.device) - 1  # [B, C, H, W] in [-1, 1)
    return replace(evaluation, call=replace(evaluation.call, x=x * (1 + NUDGE * share)))


def evaluations(context: Context, plan: Plan, seeds: list[int]) -> list[Evaluation]:
    """Every denoiser call of one sampling run."""
    seen: list[Evaluation] = []
    with at_work(context, plan) as running:

        def note(call: Call) -> Tensor:
            """The plan's own step, kept."""
            output = running.step(call)
            seen.append(Evaluation(running.cache.step, replace(call, x=call.x.clone()), output.clone()))
            return output

        context.trajectories(note, running.cache, seeds, "evaluations", len(seeds))
    return seen


@torch.no_grad()
def again(context: Context, plan: Plan | None, given: list[Evaluation]) -> list[Tensor]:
    """The same calls by another backend or, without a plan, in full precision; features are its own."""
    outputs = []
    with at_work(context, plan) as running:
        running.cache.reset()
        for evaluation in given:
            running.cache.step, running.cache.context = evaluation.step, evaluation.call.context
            outputs.append(running.step(evaluation.call).clone())
    return outputs


def apart(mine: list[Tensor], theirs: list[Tensor]) -> float:
    """Root of the squared distance of predictions over their squared size, of all evaluations."""
    pairs = [(a.double(), b.double()) for a, b in zip(mine, theirs, strict=True)]
    return float((sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5)


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
