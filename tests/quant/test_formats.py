"""Codebooks against torch's float8 and brute force."""

import pytest
import torch
from torch import nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.quant.convert import LayerPlan, fresh_state
from cachequant.quant.formats import codebook, encode, nearest, only_simulated, quantize_to_format, search_scale
from cachequant.quant.layers import Mode, QuantLayer
from cachequant.storage import pack_quant, unpack_quant
from cachequant.types import LayerQuant, QuantState, Schedule


def numbers(count: int = 4000) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def test_fp8_rounds_as_torch_does():
    x = numbers() / 4
    expected = (x * 448).to(torch.float8_e4m3fn).float() / 448
    made = nearest(x.clamp(-1, 1), "fp8", 8)
    tie = ((x * 448 - expected * 448).abs() - (x * 448 - made * 448).abs()).abs() < 1e-4  # both are as near
    assert torch.equal(made[~tie], expected[~tie]) and tie.float().mean() > 0.99
    assert len(codebook("fp8", 8)) == 253


def test_log2_holds_zero_and_signed_powers():
    book = codebook("log2", 4)
    assert book.tolist() == sorted([0.0, *(s * 2.0**-k for s in (-1, 1) for k in range(7))])
    assert len(codebook("log2", 8)) <= 256


@pytest.mark.parametrize(("name", "bits"), [("fp8", 8), ("log2", 4), ("log2", 8)])
def test_the_nearest_value_is_taken(name, bits):
    x, book = numbers(500), codebook(name, bits)
    distance = (x[:, None] - book).abs()
    torch.testing.assert_close((x - book[encode(x, book)]).abs(), distance.amin(1), rtol=0, atol=0)
    assert torch.equal(book, book.sort().values)


def test_the_search_scores_every_shrunken_scale():
    x = numbers(600).view(3, 200)
    assert torch.equal(search_scale(x, "log2", 4, "minmax"), x.abs().amax(1))
    found = search_scale(x, "log2", 4, "mse")

    def error(scale: torch.Tensor) -> torch.Tensor:
        return (nearest(x / scale[:, None], "log2", 4) * scale[:, None] - x).abs().pow(2.4).mean(1)

    tried = torch.stack([error((1 - 0.02 * i) * x.abs().amax(1)) for i in range(40)])
    torch.testing.assert_close(error(found), tried.amin(0))
    assert torch.equal(search_scale(torch.zeros(2, 5), "fp8", 8, "mse") > 0, torch.tensor([True, True]))


@pytest.mark.parametrize("name", ["fp8", "log2"])
def test_a_layer_of_a_format_multiplies_what_the_format_holds(name):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1))
    plan = LayerPlan(8, 8, weight_format=name, activation_format=name)
    state = fresh_state(network, {"0": plan}, "minmax")
    layer = QuantLayer(network[0], state.layers["0"], FeatureCache(Schedule((0,), 1, 1)), search="minmax")
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        layer.mode = Mode.OBSERVE
        layer(x)
        layer.finish_step(0)
        layer.mode = Mode.QUANTIZED
        largest = float(x.abs().max())
        weight = network[0].weight.detach()
        scale = weight.flatten(1).abs().amax(1).view(-1, 1, 1, 1)
        expected = torch.nn.functional.conv2d(
            nearest(x / largest, name, 8) * largest,
            nearest(weight / scale, name, 8) * scale,
            network[0].bias,
            padding=1,
        )
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    again = unpack_quant(pack_quant(QuantState({"0": layer.state}))).layers["0"]
    assert again.weights[0].format == again.inputs[0].format == name
    assert torch.equal(again.weights[0].values, layer.state.weights[0].values)
    assert only_simulated(again) == f"{name} is simulated only, integer backends run int8 and int4"


def test_integers_are_no_foreign_format():
    network = nn.Sequential(nn.Linear(4, 3))
    layer = fresh_state(network, {"0": LayerPlan(4, 8)}, "minmax").layers["0"]
    assert only_simulated(layer) is None
    mixed = LayerQuant((quantize_to_format(network[0].weight, "fp8", 8, "mse"),), layer.inputs, layer.widths)
    assert "fp8" in str(only_simulated(mixed))
