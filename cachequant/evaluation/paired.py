"""How far one set of images is from another made of the same noise, pair by pair, in float64."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cachequant.errors import UserError

EQUAL_PSNR = 100.0
"""dB that equal images count in a mean, where the definition is infinite."""
WINDOW = 11
SIGMA = 1.5


def psnr(a: Tensor, b: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio float64 `[B]` in dB of images `[B, C, H, W]`; infinite where they are equal.

    10 log10(data_range^2 / mean squared error). Raises UserError where the shapes differ.
    """
    a, b = _pairs(a, b, ndim=4)
    error = (a - b).square().mean(dim=(1, 2, 3))  # [B]
    return 10.0 * torch.log10(data_range**2 / error)


def finite_psnr(a: Tensor, b: Tensor, data_range: float = 2.0) -> Tensor:
    """`psnr` for means: at most `EQUAL_PSNR`."""
    return psnr(a, b, data_range).clamp(max=EQUAL_PSNR)


def ssim(a: Tensor, b: Tensor, data_range: float = 2.0) -> Tensor:
    """Structural similarity float64 `[B]` in [-1, 1] of images `[B, C, H, W]` (Wang et al. 2004, eq. 13).

    Gaussian windows of 11 × 11, sigma 1.5, only those that lie wholly inside the image; the mean over windows
    and channels.

    Raises:
        UserError: the shapes differ, or a side is shorter than 11.
    """
    a, b = _pairs(a, b, ndim=4)
    if min(a.shape[-2:]) < WINDOW:
        raise UserError(f"images {list(a.shape)} given; expected sides of {WINDOW} or more: enlarge them")
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_a, mean_b = _blur(a), _blur(b)  # [B, C, H - 10, W - 10]
    var_a = _blur(a * a) - mean_a**2
    var_b = _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))  # [B]


def feature_distance(fa: Tensor, fb: Tensor) -> Tensor:
    """Euclidean distance float64 `[B]` of paired features `[B, C]`; UserError where the shapes differ."""
    fa, fb = _pairs(fa, fb, ndim=2)
    return (fa - fb).norm(dim=1)


def _pairs(a: Tensor, b: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    if a.shape != b.shape or a.ndim != ndim:
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        raise UserError(f"shapes {shapes} given; expected two equal ones of {ndim} dimensions: pair them")
    return a.double(), b.double()


def _blur(x: Tensor) -> Tensor:
    """Gaussian mean of every window: `[B, C, H, W]` to `[B, C, H - 10, W - 10]`."""
    offset = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = torch.exp(-(offset**2) / (2 * SIGMA**2))
    weights = weights / weights.sum()  # [11]
    planes = x.flatten(0, 1).unsqueeze(1)  # [B C, 1, H, W]
    rows = F.conv2d(planes, weights.view(1, 1, 1, -1))
    return F.conv2d(rows, weights.view(1, 1, -1, 1)).squeeze(1).unflatten(0, x.shape[:2])
