"""The C++ operators against their plain torch reference, and that one against float64."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cachequant.kernels import fused
from cachequant.kernels.fused import Grid, Sum, attention, geglu, group_norm, layer_norm, quantize, window_sums
from cachequant.kernels.native import load_native
from cachequant.kernels.reference import centred_integers

SEEDS = st.integers(0, 2**31 - 1)
WIDTHS = st.integers(1, 5).map(lambda n: 4 * n) | st.just(48)


@pytest.fixture(params=["native", "torch"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both implementations in turn."""
    if request.param == "native" and load_native() is not None:
        pytest.skip(f"no C++ operators: {load_native()}")
    if request.param == "torch":
        monkeypatch.setattr(fused, "native", lambda _: False)
    with torch.no_grad():
        yield request.param


def assert_off_by_rounding(found: Tensor, exact: Tensor, grid: Grid, error: float = 0.0) -> None:
    """Integers of the exact value, or a neighbour where it lies on a border within float32 rounding or an error."""
    position = (exact / grid.scale + grid.zero_point).clamp(0, grid.levels)
    assert float((found.double() - position).abs().max()) <= 0.5 + 1e-3 + error / grid.scale


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero", [0, 3, 255])
def test_integers_are_exactly_those_of_the_simulation(either: str, bits: int, zero: int) -> None:
    grid = Grid(0.037, min(zero, 2**bits - 1), bits)
    x = torch.randn(3, 7, 5, 9, generator=torch.Generator().manual_seed(0)) * 10
    for order in (x, x.contiguous(memory_format=torch.channels_last)):
        q = quantize(order, grid)
        assert q.stride() == order.stride() and q.dtype == torch.uint8
        expected = centred_integers(order, grid.scale, grid.zero_point, bits) + grid.zero_point
        assert torch.equal(q.float(), expected)


@settings(deadline=None, max_examples=40)
@given(
    SEEDS,
    st.integers(1, 3),
    st.integers(8, 150),
    WIDTHS,
    st.booleans(),
    st.sampled_from(["none", "each", "one"]),
    st.integers(0, 2),
    st.booleans(),
)
def test_group_norm_of_a_sum_over_a_concat(
    seed: int, batch: int, pixels: int, width: int, concat: bool, shifts: str, outer: int, native: bool
) -> None:
    """Both implementations, every combination of terms, groups that straddle the halves, against float64."""
    if native and load_native() is not None:
        return
    draw = torch.Generator().manual_seed(seed)
    rest = 8 if concat else 0
    rand = lambda *shape: torch.randn(*shape, generator=draw) * 3 + 1  # noqa: E731
    x, other, skip = rand(batch, pixels, width), rand(batch, pixels, width), rand(batch, pixels, 8)
    sums, columns = rand(batch * pixels, outer), rand(outer, width)
    shift = None if shifts == "none" else rand(1 if shifts == "one" else batch, width + rest)
    weight, bias = rand(width + rest), rand(width + rest)
    whole = x.double() + other.double() + (sums.double() @ columns.double()).view(x.shape)
    whole = torch.cat([whole, skip.double()], 2) if concat else whole
    whole = whole if shift is None else whole + shift.double()[:, None]
    exact = F.group_norm(whole.transpose(1, 2), 4, weight.double(), bias.double(), 1e-5).transpose(1, 2)
    exact = F.silu(exact).split([width, rest] if concat else [width], 2)
    given_sum = Sum((x, other), sums if outer else None, columns if outer else None)
    parts = (given_sum, skip) if concat else (given_sum,)
    grids = (Grid(0.05, 30, 8), Grid(0.02, 200, 8))[: len(parts)]
    patch = pytest.MonkeyPatch()
    if not native:
        patch.setattr(fused, "native", lambda _: False)
    try:
        floats = group_norm(parts, weight, bias, 4, 1e-5, True, (), shift)
        integers = group_norm(parts, weight, bias, 4, 1e-5, True, grids, shift)
    finally:
        patch.undo()
    for found, expected, q, grid in zip(floats, exact, integers, grids, strict=True):
        assert float((found - expected).abs().max()) <= 3e-4 * max(float(expected.abs().max()), 1.0)
        assert float((q.double() - (expected / grid.scale + grid.zero_point).clamp(0, 255)).abs().max()) <= 0.55


def test_sums_are_settled_in_place(either: str) -> None:
    draw = torch.Generator().manual_seed(1)
    first, other = torch.randn(33, 19, generator=draw), torch.randn(33, 19, generator=draw)
    sums, columns = torch.randn(33, 2, generator=draw), torch.randn(2, 19, generator=draw)
    exact = first.double() + other.double() + sums.double() @ columns.double()
    found = Sum((first, other), sums, columns).settle()
    assert found.data_ptr() == first.data_ptr()
    assert torch.allclose(found.double(), exact, atol=1e-5)


@pytest.mark.parametrize("place", [(1, 1, 1, 1, 0, 0, 1, 1), (3, 3, 1, 1, 1, 1, 1, 1), (3, 5, 2, 1, 0, 2, 2, 1)])
def test_window_sums_are_a_convolution_with_ones(either: str, place: tuple[int, ...]) -> None:
    q = torch.randint(0, 256, (2, 7, 9, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    kernel, stride, padding, dilation = (place[i : i + 2] for i in range(0, 8, 2))
    ones = torch.ones(1, 5, *kernel, dtype=torch.float64)
    exact = F.conv2d(q.permute(0, 3, 1, 2).double() - 77, ones, None, stride, padding, dilation)
    assert torch.equal(window_sums(q, 77, place).double(), exact.flatten())


def test_layer_norm_and_geglu(either: str) -> None:
    draw = torch.Generator().manual_seed(2)
    x, weight, bias = (torch.randn(*s, generator=draw) * 2 for s in ((21, 50), (50,), (50,)))
    grids = (Grid(0.05, 120, 8), Grid(0.5, 7, 4))
    exact = F.layer_norm(x.double(), (50,), weight.double(), bias.double(), 1e-5)
    for q, grid in zip(layer_norm(x, weight, bias, 1e-5, grids), grids, strict=True):
        assert_off_by_rounding(q, exact, grid)
    value, gate = x.double().chunk(2, 1)
    assert_off_by_rounding(geglu(x, grids[0]), value * F.gelu(gate), grids[0])


def attention_error(q: Tensor, k: Tensor, v: Tensor, scale: float, integers: bool) -> float:
    """What rounding may do to attention of heads [B, H, ·, d] at most.

    Rounding on grids g changes a score by ε ≤ scale·(g_k·Σ|q| + g_q·Σ|k| + d·g_q·g_k / 2) / 2, a weight by exp(±2ε), and the
    output by (exp(2ε) - 1)·2·max|v|; float32 by 1e-5 of it.
    """
    error = 1e-5 * float(v.abs().max())
    if not integers:
        return error
    g_q, g_k = (torch.maximum(t.norm(dim=-1) / 46000, t.abs().amax(-1) / 32767) for t in (q, k))  # [B, H, ·]
    g_k = g_k.amax(-1, keepdim=True)
    lengths = q.abs().sum(-1), k.abs().sum(-1).amax(-1, keepdim=True)
    moved = scale * (g_k * lengths[0] + g_q * lengths[1] + q.shape[-1] * g_q * g_k / 2) / 2
    return error + float(torch.expm1(2 * moved.max())) * 2 * float(v.abs().max())


@pytest.mark.parametrize("kind", ["normal", "one large value", "zeros", "far apart"])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "width"), [(1, 1, 1, 4), (70, 77, 2, 40), (50, 1030, 1, 33), (9, 600, 3, 16)]
)
def test_attention(either: str, kind: str, queries: int, keys: int, heads: int, width: int) -> None:
    """Against float64 softmax attention: short last blocks, several key blocks, large scores, grids badly filled."""
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, n, heads * width, generator=draw) * 2 for n in (queries, keys, keys))
    if kind == "one large value":  # its grid is limited by 16 bits, not by its length
        q[..., 0], k[..., 0] = 1000.0, 0.0
    elif kind == "zeros":
        q[:, ::2], k[:, 1::2] = 0.0, 0.0
    elif kind == "far apart":  # every score far below 0, where padding must not count
        q, k = q.abs(), -3 * k.abs()
    split = [t.double().unflatten(2, (heads, width)).transpose(1, 2) for t in (q, k, v)]
    exact = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    found = attention(q, k, v, heads, width**-0.5)
    integers = either == "native" and hasattr(torch.ops.cachequant, "winograd")  # both need the same instructions
    error = attention_error(*split, width**-0.5, integers)
    assert float((found - exact).abs().max()) <= error
    grid = Grid(0.02, 128, 8)
    assert_off_by_rounding(attention(q, k, v, heads, width**-0.5, grid), exact, grid, error)


def test_attention_of_any_strides(either: str) -> None:
    """Slices of tokens and of channels, one context for a whole batch."""
    whole = torch.randn(2, 60, 3 * 32, generator=torch.Generator().manual_seed(5))
    context = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(6)).expand(2, 7, 32)
    for q, k, v in (
        [*whole.chunk(3, dim=2)],
        [whole[:, :50, :32]] * 3,
        [whole[:1, :1, :32]] * 3,
        [whole[..., :32], context, context],
    ):
        dense = [t.contiguous() for t in (q, k, v)]
        assert torch.equal(attention(q, k, v, 2, 0.25), attention(*dense, 2, 0.25))


@pytest.mark.skipif(load_native() is not None, reason=str(load_native()))
@pytest.mark.parametrize(("tokens", "heads", "width"), [(256, 8, 40), (256, 1, 256), (64, 8, 160)])
def test_attention_errs_at_most_half_as_much_as_with_half_precision(tokens: int, heads: int, width: int) -> None:
    """Normal operands; what float16 operands alone would do is the measure (root mean square)."""
    q, k, v = torch.randn(3, 2, tokens, heads * width, generator=torch.Generator().manual_seed(4))
    split = [t.double().unflatten(2, (heads, width)).transpose(1, 2) for t in (q, k, v)]
    exact = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    halves = F.scaled_dot_product_attention(*(t.half().double() for t in split)).transpose(1, 2).flatten(2)
    assert float((attention(q, k, v, heads, width**-0.5) - exact).norm()) <= 0.5 * float((halves - exact).norm())


def test_the_package_works_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    native = importlib.import_module("cachequant.kernels.native")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "no C++ compiler 'no-such-compiler'" in native.load_native.__wrapped__()
    monkeypatch.setenv(native.SWITCH, "0")
    assert native.load_native.__wrapped__() == "CACHEQUANT_NATIVE=0"
