"""The CPU's own kernels beside what they replace, shape by shape, in turn: medians of one process.

    python scripts/measure_cpu_kernels.py --rounds 15 --json cpu_kernels.json

Convolutions are those of the CIFAR-10 U-Net at batch 16 and of Stable Diffusion with guidance, Winograd's against oneDNN's;
attention is against torch's in float32, with what each errs from float64 (root mean square over that of the result).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cachequant.cli import guarded
from cachequant.errors import UserError
from cachequant.kernels import winograd
from cachequant.kernels.cpu import PackedWeight
from cachequant.kernels.fused import Grid, attention
from cachequant.kernels.reference import Geometry
from cachequant.kernels.winograd import WinogradWeight
from cachequant.storage import save_json

CONVOLUTIONS = (
    (16, 32, 128, 128), (16, 16, 256, 256), (16, 8, 256, 256), (16, 4, 256, 256),
    (2, 64, 320, 320), (2, 32, 640, 640), (2, 16, 1280, 1280), (2, 8, 1280, 1280),
)  # fmt: skip
"""Batch, height and width, input and output channels."""
ATTENTIONS = ((16, 256, 256, 1, 256), (2, 4096, 4096, 8, 40), (2, 1024, 1024, 8, 80), (2, 4096, 77, 8, 40))
"""Batch, queries, keys, heads, width of a head."""


def in_turn(calls: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, behind one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number > 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def convolution(batch: int, size: int, inner: int, outer: int, rounds: int) -> dict[str, Any]:
    """One 3×3 convolution of random integers both ways."""
    x = torch.randint(0, 256, (batch, inner, size, size), dtype=torch.uint8).contiguous(
        memory_format=torch.channels_last
    )
    values = torch.randint(-128, 128, (outer, inner, 3, 3), dtype=torch.int8)
    place, grid, scale = Geometry(True, padding=(1, 1)), Grid(0.02, 37, 8), torch.rand(outer)
    tiled, direct = WinogradWeight.of(values, None), PackedWeight.of_integers(values, None, place)
    found = in_turn(
        {
            "winograd": lambda: tiled.convolve(x, grid, scale, None),
            "onednn": lambda: direct.convolve(x, grid, scale, None),
        },
        rounds,
    )
    speed = batch * size**2 * inner * outer * 9 / found["winograd"] / 1e6
    return {
        "kernel": "convolution",
        "shape": [batch, size, inner, outer],
        "ms": found,
        "direct_gmacs_per_second": speed,
    }


def attending(batch: int, queries: int, keys: int, heads: int, width: int, rounds: int) -> dict[str, Any]:
    """Attention of normal operands both ways."""
    q, k, v = (torch.randn(batch, n, heads * width) for n in (queries, keys, keys))
    calls = {
        "cachequant": lambda: attention(q, k, v, heads, width**-0.5),
        "torch": lambda: _torch_attention(q, k, v, heads),
    }
    exact = _torch_attention(q[:1].double(), k[:1].double(), v[:1].double(), heads)
    errors = {name: float((call()[:1] - exact).norm() / exact.norm()) for name, call in calls.items()}
    shape = [batch, queries, keys, heads, width]
    return {"kernel": "attention", "shape": shape, "ms": in_turn(calls, rounds), "error": errors}


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    split = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


def measure(rounds: int, small: bool) -> Iterator[dict[str, Any]]:
    """All rows; `small` tries each kernel on one tiny shape."""
    for shape in ((2, 20, 32, 64),) if small else CONVOLUTIONS:
        yield convolution(*shape, rounds)
    for case in ((1, 60, 70, 2, 8),) if small else ATTENTIONS:
        yield attending(*case, rounds)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="one tiny shape of each kernel, to try the script")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)

    def action() -> None:
        reason = winograd.unavailable()
        if reason is not None:
            raise UserError(
                f"these kernels do not run here ({reason}), expected AVX-512 with VNNI: use another machine"
            )
        rows = []
        for row in measure(args.rounds, args.small):
            (mine, ours), (other, theirs) = row["ms"].items()
            where = "×".join(map(str, row["shape"]))
            print(
                f"{row['kernel']:12} {where:20} {mine} {ours:8.2f} ms, {other} {theirs:8.2f} ms, {theirs / ours:5.2f}×",
                flush=True,
            )
            rows.append(row)
        if args.json is not None:
            facts = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
            command = "python scripts/measure_cpu_kernels.py " + " ".join(argv or sys.argv[1:])
            save_json(args.json, {"rows": rows, "command": command, **facts})

    return guarded(action)


if __name__ == "__main__":
    sys.exit(main())
