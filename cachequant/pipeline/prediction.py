"""The map of the prediction, fitted step by step along the accelerated model's own trajectory. Ours, not in the paper."""

from __future__ import annotations

from torch import Tensor

from cachequant.correction import Moments, solve_prediction
from cachequant.pipeline.context import Context
from cachequant.pipeline.spread import denoised_factors
from cachequant.pipeline.step import correct_prediction
from cachequant.types import AffineMap


class PredictionFit:
    """Fits the map of each step's prediction and uses it at once.

    Args:
        context: tells `correction.output`: none leaves every prediction as it is, refreshes those of cached steps.
        spread: [T, C] deviation of the denoised predictions on full-precision trajectories of the same noise.
    """

    def __init__(self, context: Context, spread: Tensor) -> None:
        self._settings, self._spread = context.config.correction, spread
        self._factors = denoised_factors(context).tolist() if self._settings.output == "spread" else []
        self._sums: dict[int, Moments] = {}
        self.maps: dict[int, AffineMap] = {}

    def fit(self, step: int, x: Tensor, made: Tensor, exact: Tensor, cached: bool) -> Tensor:
        """The accelerated prediction `made` mapped towards `exact`, both [B, C, H, W] at the same x_t `x` [B, C', H, W].

        Guidance contexts that are several calls are pooled. The spread is kept on `cached` steps: a refresh is the model
        itself, of which only the rounding is corrected.
        """
        if self._settings.output == "none" or (self._settings.output == "refreshes" and cached):
            return made
        shared = min(made.shape[1], x.shape[1])
        sums = self._sums.setdefault(step, Moments())
        sums.update((made[:, :shared], x[:, :shared]), exact[:, :shared])
        if cached and self._settings.output == "spread":
            p, q = self._factors[step]
            solved = solve_prediction(sums, self._settings.ridge, (p, q), self._spread[step])
        else:
            solved = solve_prediction(sums, self._settings.ridge)
        self.maps[step] = solved.to(x.device, x.dtype)
        return correct_prediction(made, x, self.maps[step])
