"""Every int8 kernel on the layers of Stable Diffusion's U-Net, against torch's fp16; fills the tuning table on the way.

Times are medians of captured graphs. `--json` is rewritten after every layer, so that a run that is cut short leaves what it
has. Beside each time stands the floor: operations over the card's int8 rate, or bytes over its bandwidth.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cachequant.kernels.cuda import dispatch, ops
from cachequant.kernels.cuda.tuning import measure

INT8_RATE, BANDWIDTH = 1.4e15, 3.0e12
"""Operations and bytes a second of a Hopper card, measured on large problems; for the floor only."""

CONV = [  # (image size, input channels, output channels, stride)
    (64, 320, 320, 1), (64, 640, 320, 1), (32, 320, 640, 1), (32, 640, 640, 1), (32, 1280, 640, 1), (16, 640, 1280, 1),
    (16, 1280, 1280, 1), (8, 1280, 1280, 1), (64, 320, 320, 2), (32, 640, 640, 2), (64, 640, 640, 1), (32, 1280, 1280, 1),
]  # fmt: skip
LINEAR = [  # (pixels of one image, input channels, output channels)
    (4096, 320, 320), (4096, 320, 2560), (4096, 1280, 320), (1024, 640, 640), (1024, 640, 5120), (1024, 2560, 640),
    (256, 1280, 1280), (256, 1280, 10240), (256, 5120, 1280), (64, 1280, 1280), (77, 768, 320), (77, 768, 1280),
    (4096, 640, 320), (4096, 960, 320),
]  # fmt: skip


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda")


def layer(x: torch.Tensor, w: torch.Tensor, stride: int) -> dict[str, Any]:
    """Milliseconds of every kernel on one layer, with shift and source in the epilogue."""
    operation = "linear" if x.dim() == 2 else "conv2d"
    n = w.shape[0]
    sizes = [(s - k) // stride + 1 for s, k in zip(x.shape[1:3], w.shape[1:3], strict=True)] if x.dim() == 4 else []
    rows = (x.shape[0], *sizes)
    scale, shift = torch.rand(n, device="cuda") * 1e-4, torch.randn(n, device="cuda")
    source = torch.randn(*rows, n, device="cuda").half()
    out = torch.empty(*rows, n, device="cuda", dtype=torch.float16)
    capability = torch.cuda.get_device_capability()
    times = {}
    for name in dispatch.candidates(capability, operation, x.shape[-1], n, torch.float16, False):
        try:
            times[name] = measure(
                lambda name=name: dispatch.run_product(
                    x, w, (stride, stride), scale, shift, source, 1.0, None, None, out, name=name
                )
            )
        except Exception as error:  # Triton's errors share no base with torch's
            times[name] = math.nan
            print(f"{name}: {type(error).__name__} {str(error)[:150]}", file=sys.stderr)
    call = ops.int8_linear if x.dim() == 2 else ops.int8_conv2d
    last = (torch.float16,) if x.dim() == 2 else ([stride, stride], torch.float16)
    call(x, w, scale, shift, source, 1.0, None, None, *last)  # files the choice
    half, dense = x.half(), w.half()
    if x.dim() == 2:
        fp16 = measure(lambda: F.linear(half, dense))
    else:
        image, kernel = half.permute(0, 3, 1, 2), dense.permute(0, 3, 1, 2)
        fp16 = measure(lambda: F.conv2d(image, kernel, stride=stride))
    work = 2.0 * math.prod(rows) * w.numel()
    moved = x.numel() + w.numel() + 4.0 * math.prod(rows) * n
    return {"fp16_ms": fp16, "floor_ms": 1e3 * max(work / INT8_RATE, moved / BANDWIDTH), "int8_ms": times}


def between(batch: int) -> list[dict[str, Any]]:
    """The operators between the products, against torch's fp16 ones without quantisation."""
    grids = torch.tensor([[30.0, -9.0, -128.0, 127.0]], device="cuda")
    found = []
    for size, channels in ((64, 320), (64, 960), (32, 640), (16, 1280), (8, 1280)):
        x = torch.randn(batch, size, size, channels, device="cuda").half()
        gain = torch.randn(channels, device="cuda").half()
        image = x.permute(0, 3, 1, 2)
        rows = x.flatten(1, 2)
        pairs = {
            "group norm": (
                lambda x=x, g=gain: ops.group_norm_int8([x], None, g, g, 32, 1e-5, True, grids, [1, 1, 1, 1]),
                lambda i=image, g=gain: F.silu(F.group_norm(i, 32, g, g)),
                3.0 * x.numel(),
            ),
            "layer norm": (
                lambda r=rows, g=gain: ops.layer_norm_int8(r, g, g, None, None, 1e-5, grids),
                lambda r=rows, g=gain: F.layer_norm(r, r.shape[-1:], g, g),
                3.0 * x.numel(),
            ),
            "quantize": (
                lambda x=x: ops.quantize_image(x, grids[0], [1, 1, 1, 1], 1),
                lambda x=x: x.clone(),
                3.0 * x.numel(),
            ),
        }
        for name, (ours, theirs, moved) in pairs.items():
            found.append({
                "operator": f"{name} {batch}x{size}x{size}x{channels}", "int8_ms": measure(ours), "fp16_ms": measure(theirs),
                "floor_ms": 1e3 * moved / BANDWIDTH,
            })  # fmt: skip
    return found


def report(layers: list[dict[str, Any]]) -> None:
    """One line per layer, and the geometric mean of the speed-ups."""
    for kind in ("conv", "linear"):
        ratios = []
        for row in (row for row in layers if row["layer"].startswith(kind)):
            times = {k: v for k, v in row["int8_ms"].items() if not math.isnan(v)}
            if not times:
                print(f"{row['layer']:34} no kernel ran")
                continue
            best = min(times, key=lambda k: times[k])
            triton = min((v for k, v in times.items() if k.startswith(dispatch.TRITON)), default=math.nan)
            ratios.append(row["fp16_ms"] / times[best])
            print(
                f"{row['layer']:34} fp16 {1e3 * row['fp16_ms']:7.1f} us  int8 {1e3 * times[best]:7.1f}  triton "
                f"{1e3 * triton:7.1f}  floor {1e3 * row['floor_ms']:6.1f}  {ratios[-1]:.2f}x  {best}"
            )
        if ratios:
            print(f"{kind}: geometric mean {math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}x over fp16\n")


def main() -> int:
    """Time everything, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=2)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no GPU was found, expected a CUDA device: run this on a machine with one", file=sys.stderr)
        return 2
    made: dict[str, Any] = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "batch": given.batch}
    made["between"], made["layers"] = between(given.batch), []
    for row in made["between"]:
        print(f"{row['operator']:34} fp16 {1e3 * row['fp16_ms']:7.1f} us  int8 {1e3 * row['int8_ms']:7.1f}"
              f"  floor {1e3 * row['floor_ms']:6.1f}")  # fmt: skip
    b = given.batch
    shapes = [(f"linear {m} {k}->{n}", integers(b * m, k), integers(n, k), 1) for m, k, n in LINEAR]
    shapes += [
        (f"conv {s} {c}->{n} /{stride}", integers(b, s + 2, s + 2, c), integers(n, 3, 3, c), stride)
        for s, c, n, stride in CONV
    ]
    for name, x, w, stride in shapes:
        made["layers"].append({"layer": name, **layer(x, w, stride)})
        given.json.write_text(json.dumps(made, indent=0), encoding="utf-8")
    report(made["layers"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
