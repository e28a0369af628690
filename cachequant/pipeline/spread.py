"""How widely the denoised predictions of full-precision trajectories are spread, which an accelerated model has to keep.

A least squares fit towards the full-precision model *at the accelerated model's own x_t* cannot see that x_t itself has
drifted: step after step the samples lose contrast together. The spread of the denoised prediction over calibration
samples shows it, and `cachequant.correction.solve_prediction` gives it back. Ours, not in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cachequant.errors import UserError
from cachequant.pipeline.context import Context


def denoised_factors(context: Context) -> Tensor:
    """(p, q) of every evaluation with p·x_t + q·prediction proportional to the denoised sample: [T, 2] float64.

    x_t - √(1-ᾱ)·ε for a noise prediction, √ᾱ·x_t - √(1-ᾱ)·v for a velocity, the prediction itself for a sample.

    Raises:
        UserError: the scheduler predicts something else.
    """
    scheduler = context.pipe.scheduler
    kind = getattr(scheduler.config, "prediction_type", "epsilon")
    alpha = scheduler.alphas_cumprod.double().cpu()[torch.tensor(context.timesteps)]  # [T]
    one, noise = torch.ones_like(alpha), -(1 - alpha).sqrt()
    pairs = {"epsilon": (one, noise), "v_prediction": (alpha.sqrt(), noise), "sample": (0 * one, one)}
    if kind not in pairs:
        raise UserError(
            f"the scheduler's prediction_type is {kind!r}, expected one of {', '.join(pairs)}: "
            "set pipe.scheduler to one that does"
        )
    return torch.stack(pairs[kind], dim=1)


class Spread:
    """Streams the denoised predictions of all samples; memory is three numbers per step and channel.

    Args:
        factors: [T, 2] of `denoised_factors`.
    """

    def __init__(self, factors: Tensor) -> None:
        self._factors = factors.tolist()
        self._sums: dict[int, Tensor] = {}

    def update(self, step: int, x: Tensor, prediction: Tensor) -> None:
        """Add one evaluation: x_t [B, C', H, W] and its prediction [B, C, H, W]; the shared channels count."""
        shared = min(x.shape[1], prediction.shape[1])
        p, q = self._factors[step]
        denoised = p * x[:, :shared].double() + q * prediction[:, :shared].double()  # [B, C, H, W]
        rows = denoised.transpose(0, 1).flatten(1)  # [C, n]
        count = torch.full_like(rows[:, 0], rows.shape[1])
        sums = torch.stack([count, rows.sum(1), rows.square().sum(1)])  # [3, C]
        self._sums[step] = self._sums[step] + sums if step in self._sums else sums

    @property
    def deviation(self) -> Tensor:
        """Standard deviation over samples and pixels: [T, C] float64."""
        count, total, square = torch.stack([self._sums[step] for step in sorted(self._sums)], dim=1).cpu()  # 3 × [T, C]
        return (square / count - (total / count).square()).clamp(min=0.0).sqrt()
