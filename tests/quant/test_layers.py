"""Quantised layers and attention against float64 arithmetic on the same grids and against the originals."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cachequant.kernels.reference import Geometry, centred_integers, product
from cachequant.quant.affine import quantize
from cachequant.quant.convert import empty_table
from cachequant.quant.layers import Layer, Mode, QuantLayer, quantize_weight
from cachequant.quant.observer import POOL, StepQuantizer
from cachequant.types import ActivationTable
from tests.quant.layer_cases import (
    assert_close,
    channels,
    clock,
    conv,
    generator,
    linear,
    on_grid,
    quantised,
    reference_products,
    table,
)

SEEDS = st.integers(0, 2**31 - 1)


@pytest.fixture(autouse=True)
def without_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


# Kernels


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(2, 8), st.floats(1e-3, 10), st.integers(0, 255))
def test_centred_integers_are_the_grids_minus_the_zero_point(seed: int, bits: int, scale: float, zero: int) -> None:
    rows = table(scale, min(zero, 2**bits - 1), bits)
    x = on_grid((200,), [rows], [200], 0)
    found = centred_integers(x, float(rows.scale[0]), float(rows.zero_point[0]), bits)
    assert torch.equal(found, quantize(x, rows.scale, rows.zero_point, bits) - rows.zero_point)
    assert not centred_integers(torch.zeros(3), scale, float(rows.zero_point[0]), bits).any()


@pytest.mark.parametrize("zero", [0, 3, 200, 255])
def test_padding_stands_for_zero_whatever_the_zero_point_is(zero: int) -> None:
    """Integers padded with the zero point itself, multiplied in int64: no rounding anywhere."""
    q = torch.randint(0, 256, (2, 6, 5, 5), generator=generator(0))
    weight = torch.randint(0, 256, (4, 6, 3, 3), generator=generator(1)) - 100
    padded = F.pad(q, (1, 1, 1, 1), value=zero) - zero
    windows = padded.unfold(2, 3, 2).unfold(3, 3, 2)  # [B, I, H', W', 3, 3]
    exact = torch.einsum("bihwkl,oikl->bohw", windows, weight)
    found = product((q - zero).float(), weight.float(), Geometry(True, stride=(2, 2), padding=(1, 1)))
    assert torch.equal(found.long(), exact)


# Weights


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.sampled_from([2, 4, 8]), st.sampled_from(["minmax", "mse"]))
def test_weights_are_integers_of_their_own_channel(seed: int, bits: int, search: str) -> None:
    weight = torch.randn(5, 6, 3, 3, generator=generator(seed)) * torch.arange(1, 6).view(5, 1, 1, 1)
    grid = quantize_weight(weight, bits, search)
    assert grid.values.dtype == torch.uint8 and grid.values.shape == weight.shape
    assert int(grid.values.max()) <= 2**bits - 1
    for channel in range(5):
        alone = quantize_weight(weight[channel : channel + 1], bits, search)
        assert torch.equal(alone.values[0], grid.values[channel])
    if search == "minmax":
        column = (5, 1, 1, 1)
        moved = (grid.values - grid.zero_point.view(column)) * grid.scale.view(column) - weight
        assert torch.all(moved.abs() <= 0.5 * grid.scale.view(column) * (1 + 1e-4))


# The integer layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("zero", [0, 7, 15])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"stride": 2},
        {"kernel_size": 1, "padding": 0},
        {"stride": (2, 1), "padding": (0, 2), "kernel_size": (3, 5)},
        {"dilation": 2, "padding": 2},
        {"padding": "same"},
    ],
    ids=str,
)
def test_a_convolution_is_its_float64_reference(geometry: dict[str, Any], bits: int, zero: int, bias: bool) -> None:
    source = conv(bias=bias, **geometry)
    rows = table(0.03, zero * (2**bits - 1) / 15, bits)
    layer = quantised(source, (rows,), (6,), bits)
    x = on_grid((2, 6, 7, 8), [rows], [6], 1)
    expected = reference_products(layer, x)[0]
    if source.bias is not None:
        expected = expected + channels(source.bias, expected, 1)
    assert_close(layer(x), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 6), (2, 4, 6), (2, 3, 4, 6)])
def test_a_linear_layer_is_its_float64_reference(shape: tuple[int, ...], bias: bool) -> None:
    source = linear(bias=bias)
    rows = table(0.02, 100, 8)
    layer = quantised(source, (rows,), (6,))
    x = on_grid(shape, [rows], [6], -1)
    expected = reference_products(layer, x)[0]
    assert_close(layer(x), expected if source.bias is None else expected + source.bias.double())


@pytest.mark.parametrize("make", [conv, linear])
@pytest.mark.parametrize("zeros", [(0, 255), (255, 0), (120, 31)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_halves_of_a_split_layer_have_their_own_grids(
    zeros: tuple[int, int], bias: bool, make: type[Layer]
) -> None:
    source = make(bias=bias)  # type: ignore[call-arg]
    rows = (table(0.05, zeros[0], 8), table(0.002, zeros[1], 8))
    layer = quantised(source, rows, (4, 2))
    dim = layer.geometry.channel_dim
    x = on_grid((2, 6, 6, 6), list(rows), [4, 2], dim)
    expected = sum(reference_products(layer, x), torch.zeros((), dtype=torch.float64))
    if source.bias is not None:
        expected = expected + channels(source.bias, expected, dim)
    assert_close(layer(x), expected)


def test_a_layer_reads_the_row_of_its_step() -> None:
    source = linear()
    rows = ActivationTable(torch.tensor([0, 3]), torch.tensor([0.02, 0.5]), torch.tensor([128.0, 10.0]), 8)
    layer = quantised(source, (rows,), (6,))
    x = torch.randn(4, 6, generator=generator(0))
    assert source.bias is not None
    for step, row in ((0, 0), (1, 0), (2, 0), (3, 1), (7, 1)):  # steps without a row take the one before
        layer.clock.step = step
        assert_close(layer(x), reference_products(layer, x, row)[0] + source.bias.double())


def test_a_layer_keeps_the_type_of_its_input() -> None:
    layer = quantised(linear(), (table(0.02, 128, 8),), (6,))
    x = torch.randn(4, 6, generator=generator(0))
    assert layer(x.double()).dtype == torch.float64
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("widths", [(6,), (4, 2)])
@pytest.mark.parametrize("make", [conv, linear])
def test_float_mode_is_the_source_bit_by_bit(make: type[Layer], widths: tuple[int, ...]) -> None:
    source = make()  # type: ignore[call-arg]
    layer = quantised(source, tuple(empty_table(8) for _ in widths), widths)
    x = torch.randn(2, 6, 6, 6, generator=generator(0))
    for mode in (Mode.FLOAT, Mode.OBSERVE, Mode.RECORD):
        layer.mode = mode
        assert torch.equal(layer(x), source(x))


def test_the_state_of_a_layer_makes_the_same_layer_again() -> None:
    source = conv()
    layer = quantised(source, (table(0.03, 4, 4, (0, 2)), table(0.01, 9, 4, (0, 2))), (4, 2), bits=4)
    again = QuantLayer(source, layer.state, clock())
    x = torch.randn(2, 6, 5, 5, generator=generator(0))
    assert torch.equal(again(x), layer(x))


def test_the_replaced_layer_is_not_in_the_module_tree() -> None:
    layer = quantised(conv(), (table(0.03, 128, 8),), (6,))
    assert list(layer.parameters()) == [] and list(layer.children()) == []
    assert list(layer.state_dict()) == []


# Observing


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.lists(st.integers(1, 20_000), min_size=1, max_size=3))
def test_the_observed_range_is_that_of_all_batches(seed: int, sizes: list[int]) -> None:
    batches = [torch.randn(n, generator=generator(seed + i)) * (i + 1) for i, n in enumerate(sizes)]
    quantizer = StepQuantizer(8, "minmax")
    for batch in batches:
        quantizer.observe(batch)
    quantizer.finish_step(4)
    everything = torch.cat(batches)
    low, high = min(float(everything.min()), 0.0), max(float(everything.max()), 0.0)
    assert quantizer.row(4)[0] == pytest.approx((high - low) / 255, rel=1e-5)


def test_the_pool_of_an_observer_is_bounded() -> None:
    quantizer = StepQuantizer(8)
    quantizer.observe(torch.randn(50 * POOL, generator=generator(0)))
    assert sum(len(values) for values in quantizer._pool) <= 2 * POOL + 2


def test_rows_belong_to_their_steps_and_a_step_without_one_takes_the_last_before_it() -> None:
    quantizer = StepQuantizer(8, "minmax")
    for step in (6, 2):  # in any order
        quantizer.observe(torch.tensor([0.0, 255.0 * step]))
        quantizer.finish_step(step)
    quantizer.finish_step(7)  # nothing was observed: no row
    assert quantizer.table.steps.tolist() == [2, 6]
    assert [quantizer.row(s)[0] for s in (2, 3, 5, 6, 9)] == [2, 2, 2, 6, 6]
    assert quantizer.row(0)[0] == 2  # before the first: the first
    loaded = StepQuantizer(8, table=quantizer.table)
    assert all(loaded.row(s) == quantizer.row(s) for s in range(10))


def test_the_fake_value_is_the_integer_times_its_scale() -> None:
    rows = table(0.02, 100, 8)
    quantizer = StepQuantizer(8, table=rows)
    x = on_grid((50,), [rows], [50], 0)
    before = x.clone()
    integers, scale = quantizer.integers(x, 0)
    torch.testing.assert_close(quantizer.fake(x, 0), integers * scale)
    assert float((quantizer.fake(x.clamp(-2, 3.1), 0) - x.clamp(-2, 3.1)).abs().max()) <= 0.5 * scale * 1.001
    assert torch.equal(x, before)
