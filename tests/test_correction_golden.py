"""DEC against the original's numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from cachequant.correction import fit_affine
from cachequant.kernels.reference import Geometry, centred_integers, epilogue, product
from cachequant.types import AffineMap


@pytest.fixture
def golden(golden_folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = golden_folder / "method_dec"
    return json.loads((folder / "case.json").read_text()), load_file(folder / "case.safetensors")


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Largest difference below `tolerance` of the largest value."""
    assert float((found.double() - expected.double()).abs().max() / expected.double().abs().max()) < tolerance


def alive(channels: int, dead: int | None) -> list[int]:
    return [c for c in range(channels) if c != dead]


def test_the_fit_is_the_exact_one(golden: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    record, tensors = golden
    for case in record["cases"]:
        name = f"case{case['id']}"
        fit = fit_affine(tensors[f"{name}_x"], tensors[f"{name}_y"])
        live = alive(len(fit.scale), case["dead_channel"])
        assert_close(fit.scale[live], tensors[f"{name}_a_exact"][live])
        assert_close(fit.shift[live], tensors[f"{name}_b_exact"][live])
        assert torch.isfinite(fit.scale).all() and torch.isfinite(fit.shift).all()
        if case["dead_channel"] is not None:
            assert float(fit.scale[case["dead_channel"]]) == 1.0


def test_the_original_differs_by_its_two_normalisations(
    golden: tuple[dict[str, Any], dict[str, Tensor]],
) -> None:
    """It divides a 1/n covariance by a 1/(n-1) variance: every scale shrinks by (n-1)/n."""
    record, tensors = golden
    for case in record["cases"]:
        name, n = f"case{case['id']}", case["n_per_channel"]
        x, y = tensors[f"{name}_x"], tensors[f"{name}_y"]
        live = alive(x.shape[1], case["dead_channel"])
        shrunken = fit_affine(x, y).scale * (n - 1) / n
        assert_close(shrunken[live], tensors[f"{name}_a_original"][live])
        mean = [t.double().transpose(0, 1).flatten(1).mean(1) for t in (x, y)]
        assert_close((mean[1] - shrunken * mean[0])[live], tensors[f"{name}_b_original"][live])


def source_step(pipeline: dict[str, Any], step: int) -> int:
    return int(max(s for s in pipeline["S"] if s <= step))


def test_both_stages_are_the_originals_up_to_its_normalisation_and_bias(
    golden: tuple[dict[str, Any], dict[str, Tensor]],
) -> None:
    record, tensors = golden
    for pipeline in record["pipelines"]:
        features = tensors[f"pipe_{pipeline['model']}_features"]  # [T, B, C, H, W]
        a1, b1 = (tensors[f"pipe_{pipeline['model']}_{k}"] for k in ("a1", "b1"))  # [T, C]
        n = features[0].numel() // features.shape[2]
        for step in range(pipeline["T"]):
            reused, truth = features[source_step(pipeline, step)], features[step]
            if step in pipeline["S"]:
                assert torch.equal(a1[step], torch.ones_like(a1[step])) and not b1[step].any()
                continue
            shrunken = fit_affine(reused, truth).scale * (n - 1) / n
            assert_close(shrunken, a1[step], 1e-5)
            mean = [t.double().transpose(0, 1).flatten(1).mean(1) for t in (reused, truth)]
            assert_close(mean[1] - shrunken * mean[0], b1[step], 1e-4)

        layer = Split.of(pipeline, tensors)
        for step in range(pipeline["T"]):
            u = AffineMap(a1[step], b1[step]).apply(features[source_step(pipeline, step)])
            if pipeline["layer"].startswith("conv3x3"):
                affine = (layer.tensor("gn_weight")[: layer.width], layer.tensor("gn_bias")[: layer.width])
                u = F.silu(F.group_norm(u, 16, *affine, 1e-5))
            rounded, exact = layer.quantised(u, 0, step), layer.exact(u, 0)
            shrunken = fit_affine(rounded, exact).scale * (n - 1) / n
            assert_close(shrunken, layer.tensor("a2")[step], 1e-5)
            # its regression saw the bias on both sides
            bias = layer.tensor("bias")
            mean = [t.double().transpose(0, 1).flatten(1).mean(1) + bias for t in (rounded, exact)]
            assert_close(mean[1] - shrunken * mean[0], layer.tensor("b2")[step], 1e-3)


def test_the_split_convolution_is_the_originals(golden: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    record, tensors = golden
    for pipeline in record["pipelines"]:
        layer, step = Split.of(pipeline, tensors), pipeline["infer_time_index"]
        x = layer.tensor("infer_input")
        halves = x[:, : layer.width], x[:, layer.width :]
        bias = layer.tensor("bias")[:, None, None]
        exact = layer.exact(halves[0], 0) + layer.exact(halves[1], 1) + bias
        assert_close(exact, layer.tensor("infer_fp"), 1e-5)
        h, skip = (layer.quantised(half, i, step) for i, half in enumerate(halves))
        assert_close(h + skip + bias, layer.tensor("infer_quant"), 1e-5)
        fit = AffineMap(layer.tensor("a2")[step], layer.tensor("b2")[step])
        assert_close(fit.apply(h) + skip + bias, layer.tensor("infer_quant_corrected"), 1e-5)


class Split:
    """A convolution of the golden data whose two input halves have their own grids."""

    def __init__(self, tensors: dict[str, Tensor], prefix: str, width: int, bits: tuple[int, int]) -> None:
        self._tensors, self._prefix, self.width, self._bits = tensors, prefix, width, bits
        weight = self.tensor("weight")
        self._geometry = Geometry(True, padding=(weight.shape[-1] // 2,) * 2)
        self._halves = (weight[:, :width], weight[:, width:])

    @staticmethod
    def of(pipeline: dict[str, Any], tensors: dict[str, Tensor]) -> "Split":
        bits = (pipeline["weight_bits"], pipeline["act_bits"])
        return Split(tensors, pipeline["prefix"], pipeline["Ci"], bits)

    def tensor(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def exact(self, x: Tensor, half: int) -> Tensor:
        return product(x, self._halves[half], self._geometry)

    def quantised(self, x: Tensor, half: int, step: int) -> Tensor:
        """Integer product and epilogue of one half, with the original's grids."""
        prefix = ("", "skip_")[half]
        scale = float(self.tensor(f"{prefix}a_scale")[step])
        zero = round(float(self.tensor(f"{prefix}a_zero")[step]))
        weight_scale = self.tensor(f"{prefix}w_scale")
        weight_zero = self.tensor(f"{prefix}w_zero").round()
        levels = 2 ** self._bits[0] - 1
        weight = ((self._halves[half] / weight_scale).round() + weight_zero).clamp(0, levels) - weight_zero
        p = product(centred_integers(x, scale, zero, self._bits[1]), weight, self._geometry)
        return epilogue(p, weight_scale.flatten() * scale, None, 1)
