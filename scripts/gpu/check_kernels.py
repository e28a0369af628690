"""Every int8 kernel on this GPU against exact integers and float64: fresh random inputs, poisoned memory.

Prints one line per kernel and writes all cases to --json; the exit status is 1 if any case fails, 2 without a GPU.
`--quick` runs the smallest shapes only, for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from kernel_cases import LIMITS, Case, attempt, compare, grid, integers, poison, worst
from norm_cases import PADDINGS, norms
from torch import Tensor
from tqdm import tqdm

from cachequant.kernels.cuda import dispatch, ops, reference, step_ops
from cachequant.kernels.cuda.triton_feed_forward import BLOCKS as FEED_FORWARD_BLOCKS
from cachequant.kernels.cuda.triton_product import BLOCKS

CARD = "cuda"
"""Where the cases run."""

LINEAR = [
    (1, 16, 16),
    (7, 24, 48),
    (154, 320, 768),
    (200, 640, 640),
    (513, 1280, 1280),
    (4096, 320, 320),
    (64, 5120, 640),
]
"""[M, N, K]: minimal, odd, and as Stable Diffusion's."""

CONV = [
    ((1, 3, 3, 16), 16, (3, 3), (1, 1)),
    ((2, 7, 5, 32), 24, (3, 3), (1, 1)),
    ((2, 10, 10, 1280), 320, (3, 3), (1, 1)),
    ((2, 34, 34, 320), 640, (3, 3), (1, 1)),
    ((1, 66, 66, 320), 320, (3, 3), (1, 1)),
    ((2, 34, 34, 320), 320, (3, 3), (2, 2)),  # the last row and column of an even image are not read
    ((2, 33, 33, 64), 128, (3, 3), (2, 2)),  # asymmetric border: one row and one column
    ((2, 16, 16, 640), 320, (1, 1), (1, 1)),
]
"""([B, H, W, C], N, window, stride), the border already in the image."""


PARTS = ((), ("shift",), ("shift", "source"), ("shift", "source", "sums"))


def product_case(
    name: str, x: Tensor, w: Tensor, stride: tuple[int, int], dtype: torch.dtype, parts: tuple[str, ...]
) -> Case:
    """One kernel on random integers of the whole range."""
    total = reference.accumulate_linear(x, w) if x.dim() == 2 else reference.accumulate_conv2d(x, w, stride)
    n, rows = w.shape[0], tuple(total.shape[:-1])
    spread = total.float().std().clamp(min=1)
    to = 40.0 if dtype is torch.int8 else 1.0
    scale = (0.5 + torch.rand(n)) / spread * to
    shift = torch.randn(n) * to if "shift" in parts else None
    kind = torch.float16 if dtype is torch.int8 else dtype
    source = torch.randn(*rows, n).to(kind) if "source" in parts else None
    sums = torch.randint(-5000, 5000, rows).float() if "sums" in parts else None
    offset = torch.randn(n) * 1e-4 * to if "sums" in parts else None
    out = poison(torch.empty(*rows, n, dtype=dtype))
    dispatch.run_product(x, w, stride, scale, shift, source, 0.5, sums, offset, out, name=name)
    expected = reference.epilogue(total, scale, shift, source, 0.5, sums, offset, torch.float32)
    expected = reference.cast(expected, torch.int8) if dtype is torch.int8 else expected
    label = f"{list(x.shape)}x{list(w.shape)} stride {stride[0]} {'+'.join(parts) or 'plain'} {str(dtype)[6:]}"
    return compare(name, label, out, expected, LIMITS[dtype])


def exact_case(name: str, x: Tensor, w: Tensor, stride: tuple[int, int], dtype: torch.dtype) -> Case:
    """Sums small enough for the output's type to hold them: every integer must be right."""
    bound = 100 if dtype is torch.int8 else 256 if dtype is torch.bfloat16 else 2048
    few = (torch.rand(w.shape) < bound / max(1, w[0].numel())).to(torch.int8)
    small, weight = x.clamp(-1, 1), few * w.sign()
    total = (
        reference.accumulate_linear(small, weight)
        if x.dim() == 2
        else reference.accumulate_conv2d(small, weight, stride)
    )
    out = poison(torch.empty(total.shape, dtype=dtype))
    one = torch.ones(w.shape[0])
    dispatch.run_product(small, weight, stride, one, None, None, 0.0, None, None, out, name=name)
    wrong = float((out.float() != reference.cast(total.float(), dtype).float()).float().mean())
    return Case(name, f"exact {list(x.shape)}x{list(w.shape)} {str(dtype)[6:]}", wrong, 0.0, wrong == 0.0)


FIRST_FEED_FORWARD = dispatch.TRITON + "x".join(map(str, FEED_FORWARD_BLOCKS[0]))
FIRST_TRITON = dispatch.TRITON + "x".join(map(str, BLOCKS[0]))


def names_of(operation: str, channels: int, outputs: int, dtype: torch.dtype, sums: bool, triton: bool) -> list[str]:
    """Every kernel that claims to support a layer, of both architectures' compiled ones or of Triton's."""
    names: dict[str, None] = {}
    for capability in (torch.cuda.get_device_capability(), (8, 9)):
        names |= dict.fromkeys(dispatch.candidates(capability, operation, channels, outputs, dtype, sums))
    return [name for name in names if name.startswith(dispatch.TRITON) == triton]


def products(quick: bool, triton: bool) -> Iterator[Case]:
    """Linear layers and convolutions on every compiled kernel, output type and epilogue, or on Triton's.

    Triton compiles each combination when it is met, so there only the first tile meets all of them.
    """
    shapes: list[tuple[Tensor, Tensor, tuple[int, int]]] = []
    for m, n, k in LINEAR[:2] if quick else LINEAR:
        shapes.append((integers(m, k), integers(n, k), (1, 1)))
    for image, n, window, stride in CONV[:2] if quick else CONV:
        shapes.append((integers(*image), integers(n, *window, image[3]), stride))
    if triton:  # channels that only these take
        shapes.append((integers(9, 7), integers(5, 7), (1, 1)))
        shapes.append((integers(2, 6, 6, 4), integers(3, 3, 3, 4), (1, 1)))
    for (x, w, stride), dtype in itertools.product(shapes, (torch.float16, torch.bfloat16, torch.int8)):
        operation = "linear" if x.dim() == 2 else "conv2d"
        for parts in PARTS[-1:] if quick else PARTS:
            for name in names_of(operation, x.shape[-1], w.shape[0], dtype, "sums" in parts, triton):
                if not triton or (dtype is torch.float16 and parts == PARTS[-1]) or name == FIRST_TRITON:
                    yield attempt(name, f"{list(x.shape)} {parts}", product_case, name, x, w, stride, dtype, parts)
        for name in names_of(operation, x.shape[-1], w.shape[0], dtype, False, triton):
            if not triton or name == FIRST_TRITON:
                yield attempt(name, f"exact {list(x.shape)}", exact_case, name, x, w, stride, dtype)


def feed_forward_case(m: int, n: int, k: int, kind: str, sums: bool, tile: str) -> Case:
    """A product with its activation: integers off by one are rare."""
    x, w = integers(m, k), integers(2 * n if kind == "geglu" else n, k)
    scale = (0.5 + torch.rand(len(w))) / (k**0.5 * 5500)  # hidden values around 1
    shift = torch.randn(len(w))
    rows = reference.window_sum(x[None, None], (1, 1), (1, 1)).flatten() if sums else None
    offset = torch.randn(len(w)) / (k**0.5 * 74) if sums else None
    out = poison(torch.empty(m, n, dtype=torch.int8))
    dispatch.run_activated(x, w, scale, shift, rows, offset, grid(-5.0), kind, out, name=tile)
    expected = reference.activated(x, w, scale, shift, rows, offset, grid(-5.0), kind)
    return compare(f"{kind} {tile}", f"{m}x{n}x{k} {sums}", out, expected, 0.01)


def feed_forwards(quick: bool) -> Iterator[Case]:
    """Compiled kernels on all of these shapes that they support, Triton's tiles on the first three, its first one on all."""
    shapes = [(7, 24, 48), (7, 32, 48), (4096, 1280, 320), (513, 640, 640), (64, 5120, 1280), (1, 16, 16)]
    for i, (m, n, k) in enumerate(shapes[: 2 if quick else 6]):
        for kind, sums in itertools.product(("geglu", "gelu", "gelu_tanh"), (False, True)):
            for tile in dispatch.activated_candidates(torch.cuda.get_device_capability(), kind, k, n, sums):
                if not tile.startswith(dispatch.TRITON) or tile == FIRST_FEED_FORWARD or (kind == "geglu" and i < 3):
                    yield attempt(f"{kind} {tile}", f"{m}x{n}x{k}", feed_forward_case, m, n, k, kind, sums, tile)


def map_case(size: tuple[int, ...], layout: torch.memory_format, mapped: int, dtype: torch.dtype) -> Case:
    """A map of a feature or prediction by the row of its step, with a second tensor of another layout."""
    x = torch.randn(*size).to(dtype).contiguous(memory_format=layout)
    other = torch.randn(*size).to(dtype)
    maps, step = torch.randn(5, 3, mapped), torch.tensor([3])
    exact = reference.map_channels(x.double(), other.double(), maps.double(), step, 1)
    found = step_ops.map_channels(x, other, maps, step, 1)
    return compare("map_channels", f"{list(size)} {mapped} {str(dtype)[6:]}", found, exact, LIMITS[dtype])


def random_maps(steps: int, width: int) -> list[Tensor]:
    """Maps of layers of three columns for `load_step`: every third layer and some steps of the others have none."""
    layer, channel = (part.to(torch.int32) for part in (torch.arange(width) // 3, torch.arange(width) % 3))
    first = 3 * torch.randint(-1, steps, (steps, -(-width // 3)))
    return [layer.where(layer % 3 < 2, -1), channel, first.clamp(min=-1), torch.rand(3 * steps), torch.randn(3 * steps)]


def load_case(grids: int, width: int, mapped: bool) -> Case:
    """The rows of a step; the worst of the four results counts."""
    step, steps = torch.tensor([3]), 5
    owner = torch.randint(0, grids, (width,), dtype=torch.int32)
    columns = [owner, *torch.randn(4, width)]
    maps = random_maps(steps, width) if mapped else []
    tables = torch.randn(steps, grids, 4), torch.rand(steps, grids, 2)
    found, expected = ([torch.full((grids, 4), torch.nan), *torch.full((3, width), torch.nan)] for _ in range(2))
    step_ops.load_step(step, *tables, columns, maps, *found)
    reference.load_step(step, *tables, columns, maps, *expected)
    cases = [
        compare("load_step", f"{grids} {width} {mapped}", *pair, 1e-5) for pair in zip(found, expected, strict=True)
    ]
    return worst(cases)


def quantize_case(size: tuple[int, int, int], pad: list[int], upsample: int, dtype: torch.dtype) -> Case:
    """Quantisation into a padded, perhaps enlarged image: no integer may differ."""
    x = torch.randn(*size, 320).to(dtype) * 3
    left, right, top, bottom = pad
    expected = reference.quantize_image(x, grid(-17.0), (left, right, top, bottom), upsample)
    label = f"{list(size)} pad {pad} x{upsample} {str(dtype)[6:]}"
    return compare("quantize_image", label, ops.quantize_image(x, grid(-17.0), pad, upsample), expected, 0.0)


def window_case(image: tuple[int, ...], window: tuple[int, int], stride: tuple[int, int]) -> Case:
    """Sums over a convolution's window, exact."""
    x = integers(*image)
    found, expected = ops.window_sum(x, list(window), list(stride)), reference.window_sum(x, window, stride)
    return Case("window_sum", str(image), float((found != expected).float().mean()), 0.0, torch.equal(found, expected))


ATTENTIONS = ((1, 5, 3, 2, 8), (2, 256, 77, 8, 160), (2, 1024, 77, 8, 80), (2, 1024, 1024, 8, 40), (3, 256, 256, 16, 72),
              (2, 64, 64, 1, 384))  # fmt: skip
"""Batch, queries, keys, heads, width of a head."""


def attention_case(b: int, n: int, m: int, heads: int, width: int, dtype: torch.dtype) -> Case:
    """The fastest attention for a shape, operands as slices of joint projections, against softmax in float64."""
    joint = torch.randn(b, max(n, m), 3 * heads * width).to(dtype)
    q, k, v = (part[:, :rows] for part, rows in zip(joint.chunk(3, dim=2), (n, m, m), strict=True))
    wide = [t.double().unflatten(2, (heads, width)).transpose(1, 2) for t in (q, k, v)]
    weights = (wide[0] @ wide[1].transpose(2, 3) / width**0.5).softmax(dim=3)
    expected = (weights @ wide[2]).transpose(1, 2).flatten(2)
    label = f"{b}x{n}x{m}x{heads}x{width} {str(dtype)[6:]}"
    limit = {torch.float32: 1e-5}.get(dtype, 2 * LIMITS[dtype])  # torch's own rounding of the weights
    return compare("attention", label, ops.multi_head_attention(q, k, v, heads), expected, limit)


def pointwise(quick: bool) -> Iterator[Case]:
    """Quantisation, maps, attention, window sums: the operators as the network calls them."""
    sizes = [(2, 3, 5)] if quick else [(1, 1, 2), (2, 8, 8), (2, 7, 9), (2, 32, 32), (2, 64, 64), (1, 40, 33)]
    for size, dtype in itertools.product(sizes, (torch.float16, torch.bfloat16, torch.float32)):
        if dtype is not torch.float16 and size != sizes[-1]:
            continue
        for pad, upsample in zip(PADDINGS, (1, 2, 1), strict=True):
            yield attempt("quantize_image", str((size, pad)), quantize_case, size, pad, upsample, dtype)
        for channels, layout in itertools.product((4, 320), (torch.contiguous_format, torch.channels_last)):
            arguments = (size[0], channels, *size[1:]), layout, min(channels, 300), dtype
            yield attempt("map_channels", str(arguments), map_case, *arguments)
    for arguments in ((1, 1, False), (3, 70, True), (700, 33, True), (300, 90_000, True)):
        yield attempt("load_step", str(arguments), load_case, *arguments)
    for shape, dtype in itertools.product(ATTENTIONS[: 2 if quick else 6], LIMITS.keys() - {torch.int8}):
        yield attempt("attention", str(shape), attention_case, *shape, dtype)
    for image, _, window, stride in CONV[:2] if quick else CONV:
        yield attempt("window_sum", str(image), window_case, image, window, stride)


def graphs() -> Iterator[Case]:
    """The operators inside a CUDA graph: replayed on new inputs they give what they give outside."""
    x, w = torch.empty(2, 16, 16, 64, dtype=torch.float16), integers(128, 3, 3, 64)
    scale, step, gain = torch.rand(128) * 1e-3, grid(-9.0), torch.ones(64).half()
    sequence = torch.stack([step])

    def run() -> Tensor:
        (q,) = ops.group_norm_int8([x], None, gain, gain, 32, 1e-5, True, sequence, [1, 1, 1, 1])
        return ops.int8_conv2d(q, w, scale, None, None, 1.0, None, None, [1, 1], torch.float16)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        x.normal_()
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run()
    for round_ in range(3):
        x.normal_()
        sequence[0, 1] = float(round_ - 20)  # another step's zero point, from the same memory
        expected = run()
        poison(made)
        graph.replay()
        torch.cuda.synchronize()
        yield compare("cuda graph", f"replay {round_}", made, expected, 0.0)


PARTS_OF_CHECK: dict[str, Callable[[bool], Iterator[Case]]] = {
    "compiled": lambda quick: products(quick, triton=False),
    "triton": lambda quick: products(quick, triton=True),
    "norms": norms,
    "pointwise": pointwise,
    "feed-forward": feed_forwards,
    "graphs": lambda quick: graphs(),
}


def main() -> int:
    """Run everything, print a table, write the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file for all cases")
    parser.add_argument("--part", choices=tuple(PARTS_OF_CHECK), action="append", help="default: all")
    parser.add_argument("--quick", action="store_true", help="the smallest shapes only")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no GPU was found, expected a CUDA device: run this on a machine with one", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.device(CARD):
        cases = [
            case
            for part in given.part or PARTS_OF_CHECK
            for case in tqdm(PARTS_OF_CHECK[part](given.quick), desc=part, unit="case")
        ]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {len(cases)} cases")
    for kernel in dict.fromkeys(case.kernel for case in cases):
        own = [case for case in cases if case.kernel == kernel]
        failed = [case for case in own if not case.ok]
        last = worst(own)
        print(f"{'FAILED' if failed else 'ok':6} {kernel:60} {len(own) - len(failed)}/{len(own)} worst {last.error:.2e}"
              + (f"  {last.case}" if failed else ""))  # fmt: skip
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(case) for case in cases], indent=0), encoding="utf-8")
    return int(any(not case.ok for case in cases))


if __name__ == "__main__":
    sys.exit(main())
