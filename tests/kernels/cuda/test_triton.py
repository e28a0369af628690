"""The Triton kernels, run by Triton's interpreter on the CPU, against float64 and exact integers."""

from __future__ import annotations

import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

if not os.environ.get("CACHEQUANT_TEST_KERNELS"):  # make test-kernels brings it
    pytest.importorskip("triton", reason="Triton is not installed (it comes with CUDA builds of torch)")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=0: these tests need the interpreter", allow_module_level=True)

from cachequant.kernels.cuda import (
    reference,
    triton_feed_forward,
    triton_norm,
    triton_pointwise,
    triton_product,
    triton_steps,
)
from tests.kernels.cuda.interpreted import gpu_operators
from tests.kernels.operator_cases import device_cases

GRIDS = torch.tensor([[1 / 0.031, -17.0, -128.0, 127.0], [1 / 0.053, 40.0, -128.0, 127.0]])
"""Two activations' grids: inverse scale, zero, low, high."""

FOUR_BITS = torch.tensor([1 / 0.4, 3.0, -8.0, 7.0])


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Every buffer starts as rubbish: an element that a kernel leaves out shows."""
    torch.manual_seed(0)

    def full_of_rubbish(allocate):
        def made(*args, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(-77 if out.dtype is torch.int8 else float("nan"))

        return made

    for allocate in (torch.empty, torch.empty_like):
        monkeypatch.setattr(torch, allocate.__name__, full_of_rubbish(allocate))


def draw(*shape: int, dtype: torch.dtype = torch.float16, spread: float = 1.5) -> torch.Tensor:
    return (torch.randn(*shape) * spread).to(dtype)


def integers(*shape: int) -> torch.Tensor:
    made = torch.randint(-128, 128, shape, dtype=torch.int8)
    made.view(-1)[:2] = torch.tensor([-128, 127], dtype=torch.int8)
    return made


def assert_same_integers(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for values that rounding of the floating-point work before them puts on the other side of a half."""
    assert found.shape == expected.shape
    gap = (found.int() - expected.int()).abs()
    assert gap.max() <= 1
    assert (gap > 0).sum() <= max(1, 0.005 * gap.numel())


def random_maps(steps: int, width: int) -> list[torch.Tensor]:
    """Maps of layers of three columns for `load_step`: every third layer and some steps of the others have none."""
    layer, channel = (part.to(torch.int32) for part in (torch.arange(width) // 3, torch.arange(width) % 3))
    first = 3 * torch.randint(-1, steps, (steps, -(-width // 3)))
    return [layer.where(layer % 3 < 2, -1), channel, first.clamp(min=-1), torch.rand(3 * steps), torch.randn(3 * steps)]


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(("grids", "width"), [(1, 1), (3, 70), (700, 33), (2, 3000)])
def test_load_step(grids, width, mapped):
    """More grids than columns, and the other way round; layers of three columns, of which every third has no map."""
    steps = 5
    columns = [torch.randint(0, grids, (width,), dtype=torch.int32), *torch.randn(4, width)]
    maps = random_maps(steps, width) if mapped else []
    given = torch.tensor([3]), torch.randn(steps, grids, 4), torch.rand(steps, grids, 2), columns, maps
    found, expected = ([torch.full((grids, 4), torch.nan), *torch.full((3, width), torch.nan)] for _ in range(2))
    triton_steps.load_step(*given, *found)
    reference.load_step(*given, *expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "tokens", "a view"])
@pytest.mark.parametrize("channels", [4, 8])
def test_map_channels(channels, layout, dtype):
    """Four of the channels have maps; the second tensor lies in memory in another way, and has channels of its own."""
    maps, step, dim = torch.randn(3, 3, 4), torch.tensor([1]), 2 if layout == "tokens" else 1
    shape = (2, 35, channels) if layout == "tokens" else (2, channels, 5, 7)
    x, other = draw(*shape, dtype=dtype), draw(*shape[:dim], 9, *shape[dim + 1 :], dtype=dtype)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "a view":
        x, other = draw(2, channels, 7, 5, dtype=dtype).transpose(2, 3), other[:, :, :, ::2].repeat(1, 1, 1, 2)[..., :7]
    for second in (None, other):
        found = triton_steps.map_channels(x, second, maps, step, dim)
        exact = reference.map_channels(
            x.double(), None if second is None else second.double(), maps.double(), step, dim
        )
        torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        assert torch.equal(found.narrow(dim, 4, channels - 4), x.narrow(dim, 4, channels - 4))
        assert found.is_contiguous(memory_format=torch.channels_last) or layout != "channels last"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "pad", "upsample"),
    [
        ((1, 1, 1, 1), (0, 0, 0, 0), 1),
        ((2, 5, 7, 3), (1, 1, 1, 1), 1),
        ((1, 4, 6, 130), (0, 1, 0, 1), 1),
        ((2, 3, 5, 20), (1, 1, 1, 1), 2),
    ],
)
def test_quantize_image(shape, pad, upsample, dtype):
    x = draw(*shape, dtype=dtype, spread=4.0)  # about a tenth saturates
    for grid in (*GRIDS, FOUR_BITS):
        found = triton_pointwise.quantize_image(x, grid, pad, upsample)
        assert torch.equal(found, reference.quantize_image(x, grid, pad, upsample))


def test_rounding_is_to_nearest_even_and_saturates():
    grid = torch.tensor([1.0, -3.0, -128.0, 127.0])
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30, 130.4, -125.2]).view(1, 1, -1, 1)
    found = triton_pointwise.quantize_image(x, grid, (0, 0, 0, 0), 1).flatten()
    assert found.tolist() == [-3, -1, -1, -3, -5, 127, -128, 127, -128]


@pytest.mark.parametrize("centre", [-4.0, -2.0, -0.7, -0.1, 0.0, 0.3, 1.2, 3.0])
def test_the_normal_distribution_function_is_exact_to_single_precision(centre):
    """Through GELU of a product that is 0 everywhere, on a grid so fine that an error of 1e-6 would show."""
    x = centre + torch.linspace(-1e-4, 1e-4, 201)
    nothing, weight = torch.zeros(1, 16, dtype=torch.int8), torch.zeros(len(x), 16, dtype=torch.int8)
    given = triton_product.Operands(torch.ones(len(x)), x, None, 0.0, None, None)
    exact = F.gelu(x.double()) * 1e6
    grid = torch.tensor([1e6, -float(exact[100].round()), -128.0, 127.0])  # in steps of 1e-6 around the centre
    found = torch.empty(1, len(x), dtype=torch.int8)
    triton_feed_forward.activated(nothing, weight, given, grid, False, False, found, BLOCKS)
    assert ((found[0] - (exact + grid[1]).clamp(-128, 127)).abs() <= 2).all()
    assert (found[0].abs() < 127).all()


@pytest.mark.parametrize(
    ("shape", "window", "stride"),
    [((1, 1, 1, 1), (1, 1), (1, 1)), ((2, 6, 7, 19), (3, 3), (1, 1)), ((1, 9, 9, 300), (3, 3), (2, 2))],
)
def test_window_sum(shape, window, stride):
    x = integers(*shape) if shape[-1] > 1 else torch.full(shape, -5, dtype=torch.int8)
    found = triton_pointwise.window_sum(x, window, stride)
    assert torch.equal(found, reference.window_sum(x, window, stride))


@pytest.mark.parametrize(
    ("widths", "size", "groups"),
    [((4,), (1, 1), 2), ((30,), (3, 5), 5), ((64, 32), (9, 8), 32), ((40, 20), (8, 9), 4), ((20, 140), (40, 41), 4)],
)
@pytest.mark.parametrize("with_shift", [True, False])
def test_group_norm(widths, size, groups, with_shift):
    channels = sum(widths)
    parts = [draw(2, *size, width) + 3.0 for width in widths]  # a mean far from zero
    shift = draw(2, channels + 7)[:, 3 : channels + 3] if with_shift else None  # a view of wider rows
    weight, bias = draw(channels), draw(channels)
    args = (groups, 1e-5, True, GRIDS[: len(widths)].contiguous(), (1, 1, 1, 1))
    found = triton_norm.group_norm(parts, shift, weight, bias, *args)
    expected = reference.group_norm([p.double() for p in parts], shift, weight, bias, *args)
    for one, other in zip(found, expected, strict=True):
        assert_same_integers(one, other)
    raw_grids = GRIDS.flip(0)[: len(widths)].contiguous()
    both = triton_norm.group_norm(parts, shift, weight, bias, *args, raw_grids)
    wanted = [*found, *(reference.quantize(part, grid) for part, grid in zip(parts, raw_grids, strict=True))]
    assert all(torch.equal(one, other) for one, other in zip(both, wanted, strict=True))


@pytest.mark.parametrize("per_group", [1, 3, 6, 10, 18, 20, 30, 40, 60, 80, 120, 300])
@pytest.mark.parametrize("groups", [1, 2, 32])
def test_programs_of_the_moments_hold_whole_groups(per_group, groups):
    held, lanes = triton_norm.whole_groups(per_group, groups)
    assert 1 <= held <= groups and held * per_group <= lanes == 1 << (lanes.bit_length() - 1)
    assert groups == held or held * per_group > lanes / 2  # most lanes have a channel unless there are no more


def test_group_norm_without_activation_or_border():
    x, weight, bias = draw(1, 4, 4, 16), draw(16), draw(16)
    args = (4, 1e-6, False, GRIDS[:1].contiguous(), (0, 0, 0, 0))
    (found,) = triton_norm.group_norm([x], None, weight, bias, *args)
    (expected,) = reference.group_norm([x], None, weight, bias, *args)
    assert_same_integers(found, expected)


@pytest.mark.parametrize(("channels", "groups"), [(24, 4), (5000, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_group_norm_in_floating_point(dtype, channels, groups):
    """Also where one group's channels are more than a program has in flight."""
    x, weight, bias = draw(2, 5, 4, channels, dtype=dtype) + 3.0, draw(channels), draw(channels)
    found = triton_norm.group_norm_float(x, weight, bias, groups, 1e-5)
    wide = x.double().permute(0, 3, 1, 2)
    expected = F.group_norm(wide, groups, weight.double(), bias.double(), 1e-5).permute(0, 2, 3, 1)
    assert found.dtype is dtype
    tolerance = 2e-3 if dtype is torch.float16 else 1e-5
    assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("affine", "modulate"), [(True, False), (False, True), (False, False), (True, True)])
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 5, 48), (3, 2, 70)])
def test_layer_norm(shape, affine, modulate):
    b, _, c = shape
    x = draw(*shape) + 2.0
    weight, bias = (draw(c), draw(c)) if affine else (None, None)
    scale, shift = (draw(b, c), draw(b, c)) if modulate else (None, None)
    same, found = triton_norm.layer_norm(x, weight, bias, scale, shift, 1e-5, GRIDS)
    assert same is x
    assert_same_integers(found, reference.layer_norm(x, weight, bias, scale, shift, 1e-5, GRIDS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 5, 48), (3, 70, 130)])
def test_gated_residuals(shape, dtype):
    """x + gate·more against float64, alone and with the norm behind it."""
    b, _, c = shape
    x, more, gate = draw(*shape, dtype=dtype) + 2.0, draw(*shape, dtype=dtype), draw(b, c, dtype=dtype)
    scale, shift = draw(b, c, dtype=dtype), draw(b, c, dtype=dtype)
    exact = x.double() + gate.double()[:, None] * more.double()
    total, integers = triton_norm.layer_norm(x, None, None, scale, shift, 1e-5, GRIDS, (more, gate))
    for found in (total, triton_pointwise.gated_sum(x, more, gate)):
        assert found.dtype is dtype
        torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert_same_integers(integers, reference.layer_norm(total, None, None, scale, shift, 1e-5, GRIDS))


def operands(channels: int, rows: tuple[int, ...], dtype: torch.dtype, *parts: str) -> triton_product.Operands:
    wanted = {
        "shift": lambda: torch.randn(channels),
        "source": lambda: draw(*rows, channels, dtype=torch.float16 if dtype is torch.int8 else dtype),
        "row_sum": lambda: torch.randint(-999, 999, rows).float(),
        "offset": lambda: torch.randn(channels) * 0.01,
    }
    made = {name: make() if name in parts else None for name, make in wanted.items()}
    return triton_product.Operands(scale=torch.rand(channels) * 1e-3, beta=0.5, **made)


BLOCKS = triton_product.Blocks(16, 16, 32, 4, 1)
PARTS = [(), ("shift",), ("shift", "source"), ("shift", "source", "row_sum", "offset")]


def assert_product(found: torch.Tensor, total: torch.Tensor, given: triton_product.Operands) -> None:
    expected = reference.epilogue(
        total, given.scale, given.shift, given.source, given.beta, given.row_sum, given.offset, found.dtype
    )
    if found.dtype is torch.int8:
        assert_same_integers(found, expected)
    else:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int8])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (17, 33, 40), (150, 20, 7)])
def test_linear(m, n, k, dtype, parts):
    x, weight, given = (
        integers(m, k) if k > 1 else integers(m, 2)[:, :1].contiguous(),
        integers(n, k + 1)[:, :k].contiguous(),
        operands(n, (m,), dtype, *parts),
    )
    out = torch.empty(m, n, dtype=dtype)
    triton_product.linear(x, weight, given, out, BLOCKS)
    assert_product(out, reference.accumulate_linear(x, weight), given)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(
    ("shape", "n", "window", "stride"),
    [
        ((1, 3, 3, 1), 1, (3, 3), (1, 1)),
        ((2, 6, 7, 33), 20, (3, 3), (1, 1)),
        ((1, 9, 9, 16), 17, (3, 3), (2, 2)),
        ((2, 5, 4, 40), 8, (1, 1), (1, 1)),
    ],
)
def test_conv2d(shape, n, window, stride, parts):
    x, weight = integers(*shape), integers(n, *window, shape[3])
    total = reference.accumulate_conv2d(x, weight, stride)
    given = operands(n, tuple(total.shape[:3]), torch.float16, *parts)
    out = torch.empty(*total.shape, dtype=torch.float16)
    triton_product.conv2d(x, weight, stride, given, out, BLOCKS)
    assert_product(out, total, given)


@pytest.mark.parametrize("parts", [(), ("shift",), ("shift", "row_sum", "offset")])
@pytest.mark.parametrize("kind", ["geglu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 2), (17, 33, 40), (40, 20, 70)])
def test_feed_forward(m, n, k, kind, parts):
    """Tiles that overhang on every side, values and gates from the two halves of one weight."""
    gated = kind == "geglu"
    x, weight = integers(m, k), integers(n * (2 if gated else 1), k)
    given = operands(len(weight), (m,), torch.int8, *parts)
    offset = None if given.offset is None else given.offset * 0.02
    given = given._replace(source=None, scale=given.scale * 0.02, offset=offset)  # activations around 1
    out = torch.empty(m, n, dtype=torch.int8)
    triton_feed_forward.activated(x, weight, given, GRIDS[0], gated, kind == "gelu_tanh", out, BLOCKS)
    expected = reference.activated(x, weight, given.scale, given.shift, given.row_sum, given.offset, GRIDS[0], kind)
    assert_same_integers(out, expected)


@pytest.mark.parametrize("case", device_cases())
def test_kernels_return_what_their_fakes_promise(case, monkeypatch):
    """Shapes, types and strides of the kernels' results are those that torch.compile goes by, and the values the CPU's."""
    name, arguments = case.partition(":")[0], device_cases()[case]
    fake = FakeTensorMode()
    with fake:
        given = tree_map(lambda leaf: fake.from_tensor(leaf) if isinstance(leaf, torch.Tensor) else leaf, arguments)
        promised = getattr(torch.ops.cachequant, name)(*given)
    expected = getattr(torch.ops.cachequant, name)(*arguments)
    found = getattr(gpu_operators(monkeypatch), name)(*deepcopy(arguments))
    for one, other, value in zip(*map(tree_leaves, (found, promised, expected)), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
            torch.testing.assert_close(
                one.double(), value.double(), rtol=1e-2, atol=1.0 if one.dtype is torch.int8 else 1e-3
            )


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["80", "90"])
def test_every_kernel_compiles_for_a_card_that_is_not_there(capability, tmp_path):
    """Down to machine code: the interpreter accepts what the compiler does not."""
    script = Path(__file__).with_name("compile_triton.py")
    settings = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    settings["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, script, capability], env=settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"sm_{capability}" in done.stdout
