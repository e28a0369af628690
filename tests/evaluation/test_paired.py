"""PSNR, SSIM and feature distance against closed forms and a written-out reference."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cachequant.errors import UserError
from cachequant.evaluation.paired import EQUAL_PSNR, feature_distance, finite_psnr, psnr, ssim


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 2, 16, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1  # [B, C, H, W]


def ssim_by_loops(a: np.ndarray, b: np.ndarray, data_range: float) -> float:
    """Wang et al. 2004, equations 13 to 16, one window of one plane `[H, W]` at a time."""
    offset = np.arange(11) - 5
    weights = np.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    scores = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            x, y = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
            cov = (weights * (x - mx) * (y - my)).sum()
            scores.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(scores))


@pytest.mark.parametrize(("error", "data_range", "decibel"), [(0.2, 2.0, 20.0), (0.1, 1.0, 20.0), (2.0, 2.0, 0.0)])
def test_psnr_of_a_constant_error(images: Tensor, error: float, data_range: float, decibel: float) -> None:
    x = images.double()
    torch.testing.assert_close(psnr(x, x + error, data_range), torch.full((3,), decibel, dtype=torch.float64))


def test_psnr_judges_each_image_by_itself(images: Tensor) -> None:
    other = images.clone()
    other[1] += 0.2
    measured = psnr(images, other)
    assert math.isinf(measured[0]) and math.isinf(measured[2])
    assert float(measured[1]) == pytest.approx(20.0, abs=1e-5)


def test_ssim_is_the_papers(images: Tensor) -> None:
    other = (images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    a, b = images.double().numpy(), other.double().numpy()
    planes = [[ssim_by_loops(a[i, c], b[i, c], 2.0) for c in range(2)] for i in range(3)]
    expected = np.mean(planes, axis=1)  # [B]
    np.testing.assert_allclose(ssim(images, other), expected, rtol=1e-9)


def test_ssim_of_equal_images_is_one_and_of_constants_is_the_luminance_term(images: Tensor) -> None:
    torch.testing.assert_close(ssim(images, images), torch.ones(3, dtype=torch.float64))
    dark, light, c1 = 0.2, 0.6, 0.02**2
    flat = torch.ones(1, 1, 11, 11, dtype=torch.float64)
    expected = (2 * dark * light + c1) / (dark**2 + light**2 + c1)
    assert float(ssim(dark * flat, light * flat)) == pytest.approx(expected)


def test_ssim_does_not_change_with_the_scale_of_the_data(images: Tensor) -> None:
    other = images.flip(0)
    torch.testing.assert_close(ssim(images, other), ssim(images / 2, other / 2, data_range=1.0))


def test_feature_distance_is_euclidean() -> None:
    a = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    b = torch.tensor([[3.0, 4.0], [1.0, 1.0]])
    assert feature_distance(a, b).tolist() == [5.0, 0.0]


def test_unpaired_or_small_images_are_refused(images: Tensor) -> None:
    for metric in (psnr, ssim):
        with pytest.raises(UserError, match="pair them"):
            metric(images, images[:2])
    with pytest.raises(UserError, match="pair them"):
        feature_distance(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(UserError, match="11 or more"):
        ssim(images[..., :10], images[..., :10])


def test_equal_images_have_a_finite_share_in_a_mean(images: Tensor) -> None:
    other = images.double()
    other[1:] += 0.2
    found = finite_psnr(images.double(), other)
    torch.testing.assert_close(found, torch.tensor([EQUAL_PSNR, 20.0, 20.0], dtype=torch.float64))
    assert psnr(images, images).isinf().all()
