"""Corrections of quantised layers: where they act, and how they are fitted."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cachequant.correction import Moments, fit_affine, solve_held_out
from cachequant.kernels.reference import product
from cachequant.quant.layers import Layer, Mode, QuantLayer
from cachequant.types import AffineMap
from tests.quant.layer_cases import (
    assert_close,
    channels,
    conv,
    generator,
    linear,
    on_grid,
    quantised,
    reference_products,
    table,
)


@pytest.fixture(autouse=True)
def without_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


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


@pytest.mark.parametrize("sizes", [(14,), (3, 3, 3, 5), (7, 7), (1,) * 14])
def test_the_halves_of_a_held_out_fit_hold_different_samples_however_they_are_cut(sizes: tuple[int, ...]) -> None:
    """Seven samples, two rows of each as guidance doubles a batch: the second ones lie behind all the first."""
    x, truth = (torch.randn(14, 40, 6, generator=generator(seed)) for seed in (0, 1))
    truth = 0.7 * x + 0.3 * truth
    layer = quantised(linear(), (table(0.4, 7, 4),), (6,), bits=4)
    layer.held_out, layer.samples = True, 7
    product_alone = layer(x) - layer.source.bias
    for _ in range(2):  # a second step begins with the first sample again
        layer.start_fit(new_step=True)
        layer.mode = Mode.RECORD
        target = torch.cat([layer(part) for part in truth.split(sizes)]) - layer.source.bias
        layer.mode = Mode.FIT
        for part in x.split(sizes):
            layer(part)
    halves = (Moments(), Moments())
    for half, moments in enumerate(halves):
        rows = [row for sample in range(half, 7, 2) for row in (sample, sample + 7)]
        moments.update((product_alone[rows],), target[rows], 2)
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
