"""Winograd's convolution of integers against exact sums, at both ends of everything."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cachequant.kernels import winograd
from cachequant.kernels.cpu import PackedWeight, TiledWeight, pack
from cachequant.kernels.fused import Grid
from cachequant.kernels.reference import Geometry
from cachequant.kernels.winograd import FEWEST, LIMIT, WinogradWeight, fits, interleaved, longest_slice
from cachequant.types import WeightGrid

runs_here = pytest.mark.skipif(winograd.unavailable() is not None, reason=str(winograd.unavailable()))
PLACE = Geometry(True, padding=(1, 1))


@pytest.fixture(params=[1, 2, 3, 7])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many threads there are, for one test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def exact(x: Tensor, weight: Tensor, zero: int) -> Tensor:
    """Σ (x - z)·w in float64, whole: [B, O, H, W]."""
    return F.conv2d(x.double() - zero, weight.double(), padding=1)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def convolve(x: Tensor, values: Tensor, offset: Tensor | None, zero: int) -> Tensor:
    """The operator's whole sums [B, O, H, W]: everything below 2²⁴ is exact in float32."""
    made = WinogradWeight.of(values, offset)
    return made.convolve(channels_last(x), Grid(1.0, zero, 8), torch.ones(len(values)), None)


@runs_here
@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31 - 1), st.integers(1, 3), st.integers(1, 19), st.integers(1, 19), st.sampled_from([32, 64, 96]),
    st.sampled_from([16, 48, 64, 80, 144]), st.sampled_from([0, 1, 37, 128, 255]), st.booleans(), st.integers(1, 127),
)  # fmt: skip
def test_it_equals_the_direct_sums(
    seed: int, batch: int, height: int, width: int, inner: int, outer: int, zero: int, moved: bool, top: int
) -> None:
    """Any image, border tiles included; weights with and without an offset; the rounding to float32 is all that differs."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (batch, inner, height, width), generator=draw, dtype=torch.uint8)
    values = torch.randint(-top - 1, top + 1, (outer, inner, 3, 3), generator=draw, dtype=torch.int8)
    offset = torch.randint(-127, 128, (outer,), generator=draw) if moved else None
    whole = values if offset is None else values.int() + offset.view(-1, 1, 1, 1)
    expected = exact(x, whole, zero)
    assert torch.equal(convolve(x, values, offset, zero), expected.float())


@runs_here
@pytest.mark.parametrize("depth", [32, 512, 1280, 3584])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("zero", [0, 255])
def test_the_largest_sums_do_not_wrap(depth: int, sign: int, zero: int) -> None:
    """Every weight ±255 and every input as far from its zero point as it gets, in slices and together."""
    values = torch.full((16, depth, 3, 3), 127 if sign > 0 else -127, dtype=torch.int8)
    x = torch.full((1, depth, 6, 5), 255 - zero, dtype=torch.uint8)
    found = convolve(x, values, torch.full((16,), sign * 128), zero)
    assert torch.equal(found, exact(x, torch.full((16, depth, 3, 3), sign * 255), zero).float())


@runs_here
def test_random_inputs_of_many_slices() -> None:
    """Sums that wrap in 32 bits many times over on the way."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randint(0, 256, (2, 1280, 16, 16), generator=draw, dtype=torch.uint8)
    values = torch.randint(-128, 128, (64, 1280, 3, 3), generator=draw, dtype=torch.int8)
    assert WinogradWeight.of(values, None).slice == 256
    assert torch.equal(convolve(x, values, None, 90), exact(x, values, 90).float())


@runs_here
@pytest.mark.parametrize("moved", [False, True])
def test_several_slices_of_several_blocks_of_many_tiles(threads: int, moved: bool) -> None:
    """What earlier slices leave is of the right tile, block and channel; more tiles than are transformed at once."""
    draw = torch.Generator().manual_seed(threads)
    x = torch.randint(0, 256, (2, 640, 33, 50), generator=draw, dtype=torch.uint8)  # 234 tiles
    values = torch.randint(-128, 128, (144, 640, 3, 3), generator=draw, dtype=torch.int8)
    offset = torch.randint(-127, 128, (144,), generator=draw) if moved else None
    whole = values.int() if offset is None else values.int() + offset.view(-1, 1, 1, 1)
    assert WinogradWeight.of(values, offset).slice < 512
    assert torch.equal(convolve(x, values, offset, 200), exact(x, whole, 200).float())


@runs_here
def test_scale_and_bias_with_any_number_of_threads(threads: int) -> None:
    """Blocks of outputs that threads do not divide evenly are divided by tiles, of which there may be too few."""
    draw = torch.Generator().manual_seed(threads)
    x = torch.randint(0, 256, (2, 32, 40, 36), generator=draw, dtype=torch.uint8)  # 180 tiles, 4 blocks of them
    values = torch.randint(-128, 128, (80, 32, 3, 3), generator=draw, dtype=torch.int8)
    scale, bias = torch.rand(80, generator=draw), torch.randn(80, generator=draw)
    found = WinogradWeight.of(values, None).convolve(channels_last(x), Grid(0.25, 7, 8), scale, bias)
    expected = exact(x, values, 7) * 0.25 * scale.view(-1, 1, 1).double() + bias.view(-1, 1, 1).double()
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize("moved", [False, True])
def test_packing_gives_back_what_it_was_given(moved: bool) -> None:
    values = torch.randint(-128, 128, (80, 64, 3, 3), dtype=torch.int8)
    offset = torch.randint(-127, 128, (80,)) if moved else None
    back, kept = WinogradWeight.of(values, offset).plain()
    assert torch.equal(back, values)
    assert kept is None if offset is None else kept is not None and torch.equal(kept.long(), offset)


def test_the_order_of_a_block_is_a_permutation_that_interleaving_undoes() -> None:
    """Interleaving 16-bit halves of 128-bit lanes, on either half of a block, yields pairs in order of channels."""
    order = interleaved()
    lanes = torch.arange(32).view(4, 8)
    low, high = lanes[:, :4].flatten(), lanes[:, 4:].flatten()  # what the two instructions take, in order
    assert torch.equal(
        torch.cat([order[:32][low], order[:32][high], order[32:][low], order[32:][high]]), torch.arange(64)
    )


def test_a_slice_is_as_long_as_its_sums_allow() -> None:
    assert longest_slice(torch.full((16, 1024), 9 * 50)) == 512
    assert longest_slice(torch.full((16, 1024), 9 * 255)) == 64 and LIMIT > 64 * 9 * 255 * 128
    one_large = torch.full((16, 1024), 1.0)
    one_large[3, 700] = LIMIT / 128 - 511
    assert longest_slice(one_large) == 256  # of 512 it would just reach the limit
    assert LIMIT > 32 * 9 * 255 * 128


def test_what_it_computes() -> None:
    weight = torch.zeros(16, 32, 3, 3, dtype=torch.int8)
    assert fits(PLACE, [1, 1], weight)
    assert not fits(PLACE, [0, 0], weight)
    assert not fits(Geometry(True, stride=(2, 2)), [1, 1], weight)
    assert not fits(Geometry(True, dilation=(2, 2)), [1, 1], weight)
    assert not fits(PLACE, [1, 1], weight[:15]) and not fits(PLACE, [1, 1], weight[:, :31])
    assert not fits(PLACE, [1, 1], torch.zeros(16, 32, 1, 1)) and not fits(PLACE, [1, 1], torch.zeros(16, 32, 3, 5))


@runs_here
@pytest.mark.parametrize("weight_zero", [0.0, 100.0, 128.0])
def test_small_images_are_convolved_directly_with_the_same_sums(weight_zero: float) -> None:
    """Below FEWEST tiles; weights that need an offset included."""
    values = torch.randint(0, 256, (32, 32, 3, 3), dtype=torch.uint8)
    grid = WeightGrid(values, torch.full((32,), 0.01), torch.full((32,), weight_zero), 8)
    packed = pack(grid, PLACE)
    assert isinstance(packed, TiledWeight) and "direct" not in vars(packed)
    for size in (4, 4 * FEWEST):
        x = channels_last(torch.randint(0, 256, (1, 32, 4, size), dtype=torch.uint8))
        found = packed.convolve(x, Grid(0.5, 3, 8), grid.scale, None)
        expected = exact(x, values.int() - int(weight_zero), 3) * 0.005
        assert float((found - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
        assert "direct" in vars(packed)


def test_without_it_oneDNN_convolves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "unavailable", lambda: "this processor has no AVX-512 with VNNI")
    grid = WeightGrid(torch.zeros(16, 32, 3, 3, dtype=torch.uint8), torch.ones(16), torch.zeros(16), 8)
    assert isinstance(pack(grid, PLACE), PackedWeight)


def test_no_operator_no_winograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "load_native", lambda: "CACHEQUANT_NATIVE=0")
    assert winograd.unavailable.__wrapped__() == "CACHEQUANT_NATIVE=0"
    monkeypatch.setattr(winograd, "load_native", lambda: None)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert winograd.unavailable.__wrapped__() is not None
