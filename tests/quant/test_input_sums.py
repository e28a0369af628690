"""Second moments of layer inputs against unfolded ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cachequant.kernels.reference import Geometry
from cachequant.quant import input_sums
from cachequant.quant.input_sums import FLUSH, ROWS, InputSums


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(3, 1, 1, 1), (3, 2, 1, 1), (1, 2, 0, 1), (3, 1, 2, 2), (3, 1, "same", 2)],
)
def test_all_windows_of_a_convolution(monkeypatch, kernel, stride, padding, dilation):
    monkeypatch.setattr(input_sums, "ROWS", 10**6)
    layer = nn.Conv2d(5, 3, kernel, stride=stride, padding=padding, dilation=dilation)
    x = torch.randn(4, 5, 9, 11, generator=torch.Generator().manual_seed(0))
    sums = InputSums(layer.weight.detach(), Geometry.of(layer), 1)
    sums.update(x)
    border = 2 if padding == "same" else padding
    windows = F.unfold(x, kernel, dilation, border, stride).transpose(1, 2)  # [B, L, n], columns as the weight's
    flat = windows.flatten(0, 1)
    torch.testing.assert_close(sums.moment, flat.T @ flat / len(flat))
    assert sums.halves is not None
    for half, made in enumerate(sums.halves):
        own = windows[half::2].flatten(0, 1)
        torch.testing.assert_close(made, own.T @ own / len(own))
    output = layer(x).flatten(2).transpose(1, 2).flatten(0, 1) - layer.bias  # the moment is that of what is multiplied
    weight = layer.weight.detach().flatten(1)
    power = ((weight @ sums.moment) * weight).sum(1)
    torch.testing.assert_close(power, output.square().mean(0).detach(), rtol=1e-4, atol=1e-5)


def test_tokens_of_several_calls(monkeypatch):
    monkeypatch.setattr(input_sums, "ROWS", 10**6)
    layer, random = nn.Linear(7, 3), torch.Generator().manual_seed(1)
    sums = InputSums(layer.weight.detach(), Geometry.of(layer), 2)
    calls = [torch.randn(2, FLUSH, 7, generator=random), torch.randn(2, 5, 7, generator=random)]
    for x in calls:
        sums.update(x)
    rows = torch.cat([x.flatten(0, 1) for x in calls])
    torch.testing.assert_close(sums.moment, rows.T @ rows / len(rows))


def test_a_share_of_the_rows_is_enough_and_no_more_are_taken():
    layer = nn.Linear(6, 3)
    sums = InputSums(layer.weight.detach(), Geometry.of(layer), 4)
    x = torch.randn(4, 4, 500, 6, generator=torch.Generator().manual_seed(2)) @ torch.diag(torch.arange(1.0, 7))
    for part in x:
        sums.update(part)
    assert sum(sums._rows) == ROWS * 6
    torch.testing.assert_close(sums.moment.diagonal(), torch.arange(1.0, 7) ** 2, rtol=0.9, atol=0)


def test_a_single_sample_has_no_halves():
    layer = nn.Linear(6, 3)
    sums = InputSums(layer.weight.detach(), Geometry.of(layer), 1)
    sums.update(torch.ones(1, 6))
    assert sums.halves is None
    assert torch.equal(sums.moment, torch.ones(6, 6))


def test_halves_hold_different_samples_however_they_are_cut_into_batches(monkeypatch):
    """Two rows of one sample, as guidance doubles a batch, are of the same half."""
    monkeypatch.setattr(input_sums, "ROWS", 10**6)
    layer, samples = nn.Linear(6, 3), torch.randn(7, 2, 5, 6, generator=torch.Generator().manual_seed(3))
    expected = [rows.T @ rows / len(rows) for rows in (samples[half::2].flatten(0, 2) for half in range(2))]
    for size in (1, 2, 3, 7):
        sums = InputSums(layer.weight.detach(), Geometry.of(layer), 7)
        for first in range(0, 7, size):
            batch = samples[first : first + size]  # [B, 2, 5, 6]
            sums.update(torch.cat([batch[:, 0], batch[:, 1]]), len(batch), first)
        assert sums.halves is not None
        for found, wanted in zip(sums.halves, expected, strict=True):
            torch.testing.assert_close(found, wanted)
