"""Quantised layers and attention against float64 arithmetic on the same grids and against the originals."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.correction import Moments, fit_affine, solve_held_out
from cachequant.kernels.reference import Geometry, centred_integers, product
from cachequant.quant.affine import quantize
from cachequant.quant.attention import OPERANDS
from cachequant.quant.convert import LayerPlan, QuantizedNetwork, empty_table, fresh_state, install
from cachequant.quant.layers import Layer, Mode, QuantLayer, quantize_weight
from cachequant.quant.observer import POOL, StepQuantizer
from cachequant.types import ActivationTable, AffineMap, Correction, LayerQuant, QuantState, Schedule

SEEDS = st.integers(0, 2**31 - 1)


@pytest.fixture(autouse=True)
def without_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


def clock(step: int = 0, steps: int = 10) -> FeatureCache:
    return FeatureCache(Schedule(tuple(range(0, steps, 2)), steps, 2), step=step)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def table(scale: float, zero_point: float, bits: int, steps: tuple[int, ...] = (0,)) -> ActivationTable:
    rows = len(steps)
    return ActivationTable(
        torch.tensor(steps, dtype=torch.int32),
        torch.full((rows,), scale),
        torch.full((rows,), float(zero_point)),
        bits,
    )


def conv(seed: int = 0, bias: bool = True, **kwargs: Any) -> nn.Conv2d:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"in_channels": 6, "out_channels": 5, "kernel_size": 3, "padding": 1, **kwargs}
    return nn.Conv2d(bias=bias, **options)


def linear(seed: int = 0, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(6, 5, bias=bias)


def quantised(source: Layer, tables: tuple[ActivationTable, ...], widths: tuple[int, ...], bits: int = 8) -> QuantLayer:
    grids = tuple(quantize_weight(w, bits, "minmax") for w in source.weight.split(widths, dim=1))
    return QuantLayer(source, LayerQuant(grids, tables, widths), clock())


def on_grid(shape: tuple[int, ...], parts: list[ActivationTable], widths: list[int], dim: int) -> Tensor:
    """Values up to two steps beyond each segment's grid, no nearer than 0.1 step to a rounding border."""
    segments = []
    for i, (part, width) in enumerate(zip(parts, widths, strict=True)):
        size = list(shape)
        size[dim] = width
        scale, zero, levels = float(part.scale[0]), float(part.zero_point[0]), 2**part.bits - 1
        integers = torch.randint(int(-zero) - 2, int(levels - zero) + 3, size, generator=generator(i)).float()
        segments.append(scale * (integers + 0.8 * torch.rand(size, generator=generator(9 + i)) - 0.4))
    return torch.cat(segments, dim)


def real(layer: QuantLayer, x: Tensor, row: int = 0) -> list[tuple[Tensor, Tensor]]:
    """(x_q, w_q) of every segment in float64, by the definition of the grid."""
    dim = layer.geometry.channel_dim
    pairs = []
    for part, grid, rows in zip(x.double().split(layer.widths, dim), layer.weights, layer.state.inputs, strict=True):
        scale, zero = rows.scale[row].double(), rows.zero_point[row].double()
        rounded = (quantize(part, scale, zero, rows.bits) - zero) * scale
        column = (-1, *[1] * (grid.values.dim() - 1))
        weight = (grid.values.double() - grid.zero_point.double().view(column)) * grid.scale.double().view(column)
        pairs.append((rounded, weight))
    return pairs


def reference_products(layer: QuantLayer, x: Tensor, row: int = 0) -> list[Tensor]:
    return [product(a, w, layer.geometry) for a, w in real(layer, x, row)]


def channels(values: Tensor, like: Tensor, dim: int) -> Tensor:
    shape = [1] * like.dim()
    shape[dim] = -1
    return values.double().view(shape)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    difference = (found.double() - expected.double()).abs().max()
    assert float(difference) <= tolerance * max(float(expected.abs().max()), 1.0)


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


# Corrections


@pytest.mark.parametrize("make", [conv, linear])
@pytest.mark.parametrize("widths", [(6,), (4, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_correction_acts_on_the_h_product_alone_and_before_the_bias(
    make: type[Layer], widths: tuple[int, ...], bias: bool
) -> None:
    source = make(bias=bias)  # type: ignore[call-arg]
    rows = [table(0.05, 128, 8, (0, 1)), table(0.03, 90, 8, (0, 1))][: len(widths)]
    layer = quantised(source, tuple(rows), widths)
    dim = layer.geometry.channel_dim
    x = on_grid((2, 6, 6, 6), rows, list(widths), dim)
    plain = layer(x)
    fit = AffineMap(torch.randn(5, generator=generator(0)), torch.randn(5, generator=generator(1)))
    layer.set_corrections({0: fit})
    first, *rest = reference_products(layer, x)
    expected = fit.to("cpu", torch.float64).apply(first, channel_dim=dim) + sum(rest)
    if source.bias is not None:
        expected = expected + channels(source.bias, expected, dim)
    assert_close(layer(x), expected)
    layer.clock.step = 1  # a step without a map
    assert torch.equal(layer(x), plain)
    layer.clock.step = 0
    layer.set_corrections({})
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("make", [conv, linear])
@pytest.mark.parametrize("widths", [(6,), (4, 2)])
def test_pair_mode_regresses_the_exact_on_the_integer_product_without_bias(
    make: type[Layer], widths: tuple[int, ...]
) -> None:
    source = make()  # type: ignore[call-arg]
    rows = [table(0.3, 8, 4), table(0.2, 8, 4)][: len(widths)]
    layer = quantised(source, tuple(rows), widths, bits=4)
    dim = layer.geometry.channel_dim
    layer.mode = Mode.PAIR
    batches = [torch.randn(2, 6, 6, 6, generator=generator(i)) for i in range(2)]
    rounded, exact = [], []
    for x in batches:
        assert torch.equal(layer(x), source(x))
        rounded.append(reference_products(layer, x)[0])
        h = x.double().narrow(dim, 0, widths[0])
        exact.append(product(h, source.weight[:, : widths[0]].double(), layer.geometry))
    fit, expected = layer.moments[0].solve(), fit_affine(torch.cat(rounded), torch.cat(exact), dim % 4)
    torch.testing.assert_close(fit.scale, expected.scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fit.shift, expected.shift, rtol=1e-4, atol=1e-5)


def test_pair_mode_works_in_the_networks_own_precision() -> None:
    source = linear().bfloat16()
    layer = quantised(source, (table(0.02, 128, 8),), (6,))
    layer.mode = Mode.PAIR
    x = torch.randn(40, 6, generator=generator(0)).bfloat16()
    assert torch.equal(layer(x), source(x))
    torch.testing.assert_close(layer.moments[0].solve().scale, torch.ones(5), rtol=0, atol=0.1)


@pytest.mark.parametrize("make", [conv, linear])
@pytest.mark.parametrize("widths", [(6,), (4, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_fit_mode_centres_the_residual_and_never_enlarges_the_error(
    make: type[Layer], widths: tuple[int, ...], bias: bool
) -> None:
    source = make(bias=bias)  # type: ignore[call-arg]
    rows = [table(0.4, 7, 4), table(0.5, 6, 4)][: len(widths)]
    layer = quantised(source, tuple(rows), widths, bits=4)
    dim = layer.geometry.channel_dim
    truth = torch.randn(2, 6, 8, 8 if dim == 1 else 6, generator=generator(0))
    drifted = 0.8 * truth + 0.1  # what the accelerated network hands to this layer
    if dim == -1:
        truth, drifted = truth.expand(-1, -1, -1, 6), drifted.expand(-1, -1, -1, 6)
    before = layer(drifted)
    layer.mode = Mode.RECORD
    target = layer(truth).clone()
    layer.mode = Mode.FIT
    fitted = layer(drifted)

    def per_channel(x: Tensor) -> Tensor:
        return x.double().movedim(dim, 0).flatten(1)

    residual = per_channel(target - fitted)
    assert float(residual.mean(1).abs().max()) < 1e-5
    assert torch.all(residual.square().sum(1) <= per_channel(target - before).square().sum(1) * (1 + 1e-6))
    layer.mode = Mode.QUANTIZED  # the fit stays
    assert_close(layer(drifted), fitted)


def test_a_fit_needs_a_recorded_target_each_time() -> None:
    layer = quantised(linear(), (table(0.02, 128, 8),), (6,))
    x = torch.randn(4, 6, generator=generator(0))
    layer.mode = Mode.RECORD
    layer(x)
    layer.mode = Mode.FIT
    layer(x)
    with pytest.raises(AssertionError, match="RECORD"):
        layer(x)


def test_a_fit_of_chunks_is_the_fit_of_their_pairs_together() -> None:
    x, truth = (torch.randn(60, 6, generator=generator(seed)) for seed in (0, 1))
    whole, parts = (quantised(linear(), (table(0.4, 7, 4),), (6,), bits=4) for _ in range(2))
    for layer, sizes in ((whole, (60,)), (parts, (10, 30, 20))):
        layer.mode = Mode.RECORD
        layer(torch.full((3, 6), 1e6))  # of a step that no fit followed
        layer.start_fit(new_step=True)
        for part in truth.split(sizes):
            layer(part)
        layer.mode = Mode.FIT
        for part in x.split(sizes):
            layer(part)
    assert_close(parts.corrections[0].scale, whole.corrections[0].scale)
    assert_close(parts.corrections[0].shift, whole.corrections[0].shift)
    parts.start_fit(new_step=True)
    parts.mode = Mode.RECORD
    parts(truth)
    parts.mode = Mode.FIT
    parts(x)
    assert_close(parts.corrections[0].scale, whole.corrections[0].scale)  # nothing of the step before is left


def test_a_held_out_fit_is_that_of_every_other_sample_on_the_rest() -> None:
    x, truth = (torch.randn(60, 6, generator=generator(seed)) for seed in (0, 1))
    layer = quantised(linear(), (table(0.4, 7, 4),), (6,), bits=4)
    layer.held_out = True
    layer.mode = Mode.RECORD
    target = layer(truth)
    layer.mode = Mode.QUANTIZED
    product_alone = layer(x) - layer.source.bias
    layer.mode = Mode.FIT
    layer(x)
    halves = (Moments(), Moments())
    for half, moments in enumerate(halves):
        moments.update((product_alone[half::2],), (target - layer.source.bias)[half::2])
    expected = solve_held_out(halves)
    assert_close(layer.corrections[0].scale, expected.scale)
    assert_close(layer.corrections[0].shift, expected.shift)


def test_a_strong_ridge_keeps_the_scale_and_still_centres() -> None:
    layer = quantised(linear(), (table(0.4, 7, 4),), (6,), bits=4)
    layer.ridge = 1e9
    x = torch.randn(50, 6, generator=generator(0))
    layer.mode = Mode.RECORD
    target = layer(x)
    layer.mode = Mode.FIT
    residual = target - layer(x)
    torch.testing.assert_close(layer.corrections[0].scale, torch.ones(5), rtol=0, atol=1e-6)
    assert float(residual.double().mean(0).abs().max()) < 1e-5


def test_new_rows_reach_an_epilogue_that_was_folded_before() -> None:
    layer = quantised(linear(), (table(0.5, 8, 4),), (6,))
    x = torch.randn(40, 6, generator=generator(0))
    layer.clock.step = 1
    layer(x)  # folds the epilogue of step 1 with the row of step 0
    layer.mode = Mode.OBSERVE
    layer(x)
    layer.finish_step(1)
    layer.mode = Mode.QUANTIZED
    again = QuantLayer(layer.source, layer.state, layer.clock)
    assert torch.equal(layer(x), again(x))


# A whole network


def unet() -> nn.Module:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
    ).eval()


def conditional_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()


NETWORKS = pytest.mark.parametrize("make", [unet, conditional_unet])


def run(network: nn.Module, seed: int = 0) -> Tensor:
    x = torch.randn(2, 3, 8, 8, generator=generator(seed))
    conditional = type(network).__name__ == "UNet2DConditionModel"
    cond = {"encoder_hidden_states": torch.randn(2, 5, 12, generator=generator(7))} if conditional else {}
    output: Tensor = network(x, torch.tensor([10, 500]), **cond).sample
    return output


def all_layers(network: nn.Module) -> dict[str, LayerPlan]:
    return {name: LayerPlan(8, 8) for name, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def snapshot(network: nn.Module) -> dict[str, int]:
    """Identity of every module and every attention processor."""
    found = {name: id(module) for name, module in network.named_modules()}
    for name, module in network.named_modules():
        if hasattr(module, "processor"):
            found[f"{name}:processor"] = id(module.processor)
    return found


def calibrate(handle: QuantizedNetwork, step: int = 0) -> None:
    handle.set_mode(Mode.OBSERVE)
    for seed in range(2):
        run(handle.network, seed)
    handle.finish_step(step)


@NETWORKS
def test_remove_puts_every_object_back(make: type[nn.Module]) -> None:
    network = make()
    before, output = snapshot(network), run(network)
    order = [name for name, _ in network.named_modules()]
    handle = install(network, fresh_state(network, all_layers(network), "minmax"), clock(), attention_bits=8)
    during = snapshot(network)
    assert handle.attentions and all(during[name] != before[name] for name in handle.layers)
    calibrate(handle)
    handle.remove()
    assert snapshot(network) == before
    assert [name for name, _ in network.named_modules()] == order
    assert torch.equal(run(network), output)
    assert not handle.layers and not handle.attentions


@NETWORKS
def test_float_and_observe_modes_change_no_bit(make: type[nn.Module]) -> None:
    network = make()
    output = run(network)
    handle = install(network, fresh_state(network, all_layers(network), "minmax"), clock(), attention_bits=8)
    for mode in (Mode.FLOAT, Mode.RECORD):
        handle.set_mode(mode)
        assert torch.equal(run(network), output)
    handle.set_mode(Mode.OBSERVE)  # attention is written out there, so that its operands can be seen
    torch.testing.assert_close(run(network), output, rtol=1e-4, atol=1e-5)


@NETWORKS
def test_attention_with_operands_of_eight_bits_stays_close(make: type[nn.Module]) -> None:
    network = make()
    output = run(network)
    handle = install(network, QuantState(), clock(), "minmax", attention_bits=8)
    assert not handle.layers and handle.attentions
    calibrate(handle)
    handle.set_mode(Mode.QUANTIZED)
    quantised_output = run(network)
    relative = float((quantised_output - output).norm() / output.norm())
    assert 0 < relative < 0.02
    handle.remove()
    handle = install(network, QuantState(), clock(), "minmax", attention_bits=2)
    calibrate(handle)
    handle.set_mode(Mode.QUANTIZED)
    assert float((run(network) - output).norm() / output.norm()) > relative


@NETWORKS
def test_a_network_of_eight_bits_stays_close_and_its_state_restores_it(make: type[nn.Module]) -> None:
    network = make()
    output, twin = run(network), copy.deepcopy(network)
    handle = install(network, fresh_state(network, all_layers(network), "minmax"), clock(), "minmax", attention_bits=8)
    calibrate(handle)
    handle.set_mode(Mode.QUANTIZED)
    quantised_output = run(network)
    assert 0 < float((quantised_output - output).norm() / output.norm()) < 0.1
    state = handle.state
    assert {name.rpartition(".")[2] for name in state.operands} == set(OPERANDS)
    assert all(rows.steps.tolist() == [0] for rows in state.operands.values())
    assert all(rows.steps.tolist() == [0] for layer in state.layers.values() for rows in layer.inputs)
    install(twin, state, clock())
    assert torch.equal(run(twin), quantised_output)


def test_modes_can_be_set_for_some_layers_and_clocks_for_all() -> None:
    network = unet()
    handle = install(network, fresh_state(network, all_layers(network), "minmax"), clock(), attention_bits=8)
    handle.set_mode(Mode.FLOAT)
    handle.set_mode(Mode.PAIR, ["conv_in"])
    assert {name for name, layer in handle.layers.items() if layer.mode is Mode.PAIR} == {"conv_in"}
    other = clock(step=3)
    handle.set_clock(other)
    modules: list[Any] = [*handle.layers.values(), *handle.attentions.values()]
    assert all(module.clock is other for module in modules)


def test_installed_corrections_are_those_of_the_named_layers() -> None:
    network = unet()
    plans = {"conv_in": LayerPlan(8, 8), "conv_out": LayerPlan(4, 8)}
    maps = {2: AffineMap.identity(8)}
    handle = install(
        network,
        fresh_state(network, plans, "minmax"),
        clock(),
        correction=Correction(layers={"conv_in": maps}),
    )
    assert handle.layers["conv_in"].corrections == maps and handle.layers["conv_out"].corrections == {}
    assert handle.layers["conv_out"].state.weights[0].bits == 4
    assert not handle.attentions


def test_a_fresh_state_splits_weights_at_the_concat() -> None:
    network = unet()
    name = "up_blocks.1.resnets.0.conv1"
    weight = network.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    layer = fresh_state(network, {name: LayerPlan(8, 8, split=16)}, "minmax").layers[name]
    assert layer.widths == (16, weight.shape[1] - 16) and sum(layer.widths) == weight.shape[1]
    assert [g.values.shape[1] for g in layer.weights] == list(layer.widths)
    assert all(len(t.steps) == 0 for t in layer.inputs)
