"""Full-size networks with random weights on this GPU: real integers, as they are benched, against the simulated backend.

    python scripts/gpu/check_full_size.py configs/stable_diffusion.yaml configs/dit.yaml --json full_size.json

A few steps of the sampler, every second one cached. Each evaluation of a simulated run in float32 is computed again from the
same x_t by the integers with half precision between their products, and by the simulation in half precision. Random networks
amplify roundings: one that half precision turns the other way moves everything behind it by as much as quantisation does.
So integers are right if they are no farther from the float32 simulation than the half-precision simulation is
(`SLACK`), or near as `check_models.right` says; and if they are as near to full precision, with the same steps cached, as
the simulation is (`check_models.EXCESS`). The exit status is 1 if a network fails.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from check_models import EXCESS, Evaluation, again, apart, evaluations, nudged, right
from torch import Tensor

import cachequant as cq
from cachequant.config import RunConfig
from cachequant.models.architectures import random_pipeline
from cachequant.pipeline.bench_cuda import device_plan
from cachequant.pipeline.context import Context
from cachequant.storage import save_json

SLACK = 1.1
"""Distance of integers to simulation over that of the simulation in half precision to the one in float32, at most."""


def compare(context: Context, backend: str, half: torch.dtype) -> dict[str, Any]:
    """Relative distances of predictions at the x_t of a simulated run; the network ends in precision `half`.

    Args:
        context: in float32.
        backend: of the integers.
        half: precision between the integers' products.
    """
    plan, seeds = device_plan(context), list(range(context.config.sample.batch_size))
    context = _on(context, "simulated")
    simulated = evaluations(context, plan, seeds)
    outputs = [evaluation.output for evaluation in simulated]
    exact = again(context, replace(plan, quant=None), simulated)  # cached steps too: what is left is quantisation
    moved = again(context, plan, [nudged(each) for each in simulated])
    torch.nn.Module.to(context.adapter.denoiser, half)  # past diffusers' warning
    cast = [rounded(each, half) for each in simulated]
    halved, found = again(context, plan, cast), again(_on(context, backend), plan, cast)
    distances = {
        "simulated_to_full": apart(outputs, exact),
        "integers_to_full": apart(found, exact),
        "integers_to_simulated": apart(found, outputs),
        "nudged_to_simulated": apart(moved, outputs),
    }
    within = apart(halved, outputs)
    return {**distances, "half_to_simulated": within, "ok": is_right(distances, within)}


def is_right(distances: dict[str, float], half_to_simulated: float) -> bool:
    """Whether predictions at these distances are those of the simulation, as said above."""
    near = distances["integers_to_simulated"] <= SLACK * half_to_simulated
    same = distances["integers_to_full"] <= EXCESS * distances["simulated_to_full"]
    return (near and same) or right(**distances)


def rounded(evaluation: Evaluation, dtype: torch.dtype) -> Evaluation:
    """The same call with its floating-point tensors in another precision."""
    call = evaluation.call
    kwargs = {name: _cast(value, dtype) for name, value in call.kwargs.items()}
    return replace(evaluation, call=replace(call, x=call.x.to(dtype), kwargs=kwargs))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _on(context: Context, backend: str) -> Context:
    config: RunConfig = replace(context.config, backend=backend)
    return replace(context, config=config)


def main(argv: list[str] | None = None) -> int:
    """Every configuration, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    own = [f"sampler.steps={args.steps}", "cache.interval=2", f"sample.batch_size={args.batch}"]
    rows = []
    for path in args.configs:
        config = cq.load_config(path, [*own, *args.overrides])
        pipe = random_pipeline(config.model.family, device=torch.device(args.device))
        config.sampler.prompts = config.calibration.prompts = None
        on_gpu = args.device == "cuda"
        backend, half = ("cuda-int8", torch.float16) if on_gpu else ("cpu-int8", torch.float32)
        found = compare(Context.of(pipe, config), backend, half)
        rows.append({"config": str(path), "overrides": args.overrides, **found})
        print(
            {key: round(value, 4) if isinstance(value, float) else value for key, value in rows[-1].items()}, flush=True
        )
        card = torch.cuda.get_device_name() if on_gpu else None
        command = "python scripts/gpu/check_full_size.py " + " ".join(argv or sys.argv[1:])
        save_json(args.json, {"command": command, "card": card, "torch": torch.__version__, "rows": rows})
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
