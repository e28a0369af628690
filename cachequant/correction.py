"""DEC: decoupled error correction by per-channel least squares from streaming sums (CacheQuant section 3.3).

Differences from the released code: one normalisation for covariance and variance (it divides 1/n by 1/(n-1)), a guard for
constant channels (it returns NaN), sums instead of stored features, and an optional second regressor (the forecast).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cachequant.types import AffineMap

NEGLIGIBLE_VARIANCE = 1e-10
"""Variance below this share of the second moment (float64 rounding of the sums) counts as a constant channel."""

PIECE = 1 << 24
"""About how many values of a tensor are turned into float64 at once: it bounds the memory of the sums."""


class Moments:
    """Sums that determine the regression of y on one or two features, per channel.

    Holds the Gram matrix of (x₁, …, x_F, y, 1): [C, F+2, F+2] float64; memory does not grow with the data.

    Args:
        gram: [C, F+2, F+2] sums gathered before, or None to begin.
    """

    def __init__(self, gram: Tensor | None = None) -> None:
        self.gram = gram

    def update(self, features: tuple[Tensor, ...], target: Tensor, channel_dim: int = 1) -> None:
        """Add the pairs of one batch: every tensor has the same shape [..., C at channel_dim, ...]."""
        count = len(target)
        splits = channel_dim % target.dim() != 0  # along the batch, where dimension 0 is one
        length = max(1, PIECE * count // max(1, target.numel())) if splits else count
        for start in range(0, count, length):
            piece = [t[start : start + length].detach() for t in (*features, target)]
            rows = [t.movedim(channel_dim, 0).flatten(1).double() for t in piece]  # [C, n]
            rows.append(torch.ones_like(rows[0]))
            stacked = torch.stack(rows, dim=1)  # [C, F+2, n]
            gram = stacked @ stacked.transpose(1, 2)  # [C, F+2, F+2]
            self.gram = gram if self.gram is None else self.gram + gram

    def solve(self, ridge: float = 0.0, inflation: float = 0.0) -> AffineMap:
        """Least squares y ≈ scale·x₁ (+ previous·x₂) + shift.

        With C the covariance of the features: (C + ridge·diag C) (θ - θ₀) = Cov(x, y) - C θ₀, shrunk towards θ₀ = (1, 0),
        no change. Where Var(x) is negligible the factor stays θ₀ and the shift becomes ȳ - x̄.

        Args:
            ridge: see above; 0 is plain least squares.
            inflation: least squares predicts with less variance than the target has, σ_ŷ ≤ σ_y, and a sampler repeats that
                loss at every step. θ is multiplied by 1 + inflation·(σ_y/σ_ŷ - 1): 0 is least squares, 1 restores the
                target's variance. Ours, not in the paper.

        Raises:
            ValueError: nothing was added yet.
        """
        mean, covariance = self.centred()
        second = covariance + mean[:, :, None] * mean[:, None, :]  # [C, F+1, F+1]
        theta = _solve(covariance, second, ridge)  # [C, F]
        if inflation:
            theta = theta * (1.0 + inflation * (_deviation_ratio(covariance, theta) - 1.0))[:, None]
        shift = mean[:, -1] - (theta * mean[:, :-1]).sum(1)  # [C]
        previous = theta[:, 1].float() if theta.shape[1] == 2 else None
        return AffineMap(theta[:, 0].float(), shift.float(), previous)

    def centred(self) -> tuple[Tensor, Tensor]:
        """Mean [C, F+1] and covariance [C, F+1, F+1] of the features and, last, the target; both divided by n.

        Raises:
            ValueError: nothing was added yet.
        """
        if self.gram is None:
            raise ValueError("no pairs were added to these moments")
        count = self.gram[:, -1, -1]  # [C]
        mean = self.gram[:, :-1, -1] / count[:, None]
        second = self.gram[:, :-1, :-1] / count[:, None, None]
        return mean, second - mean[:, :, None] * mean[:, None, :]

    def error(self, affine: AffineMap | None = None) -> Tensor:
        """Mean squared error per channel [C] of y against a map's prediction, None for y ≈ x₁ unchanged.

        From the sums alone: with v = (θ, -1, shift) the error is vᵀ G v / n.
        """
        if self.gram is None:
            raise ValueError("no pairs were added to these moments")
        vector = self.gram.new_zeros(self.gram.shape[:2])  # [C, F+2] over (x₁, …, x_F, y, 1)
        vector[:, 0], vector[:, -2] = 1.0, -1.0
        if affine is not None:
            vector[:, 0], vector[:, -1] = affine.scale.to(vector), affine.shift.to(vector)
            if affine.previous is not None and vector.shape[1] == 4:
                vector[:, 1] = affine.previous.to(vector)
        quadratic = torch.einsum("ci,cij,cj->c", vector, self.gram, vector)
        return (quadratic / self.gram[:, -1, -1]).clamp(min=0.0)

    @property
    def target_power(self) -> Tensor:
        """Mean square of the target per channel [C]."""
        if self.gram is None:
            raise ValueError("no pairs were added to these moments")
        return self.gram[:, -2, -2] / self.gram[:, -1, -1]


def _solve(covariance: Tensor, second: Tensor, ridge: float) -> Tensor:
    """θ [C, F] from the joint covariance [C, F+1, F+1] of features and target; see `Moments.solve`."""
    features = covariance[:, :-1, :-1]  # [C, F, F]
    diagonal = features.diagonal(dim1=1, dim2=2)  # [C, F]
    alive = diagonal > NEGLIGIBLE_VARIANCE * second.diagonal(dim1=1, dim2=2)[:, :-1]  # [C, F]
    pair = alive[:, :, None] & alive[:, None, :]
    damped = diagonal * (1.0 + ridge) if ridge else diagonal
    system = torch.where(pair, features, torch.zeros_like(features))
    system.diagonal(dim1=1, dim2=2).copy_(torch.where(alive, damped, 1.0))
    prior = torch.zeros_like(diagonal)
    prior[:, 0] = 1.0
    gap = covariance[:, :-1, -1] - (features * prior[:, None, :]).sum(2)  # [C, F] Cov(x, y) - C θ₀
    gap = torch.where(alive, gap, torch.zeros_like(gap))
    if system.shape[1] == 1:
        return prior + gap / system[:, 0]
    unit: Tensor = system.diagonal(dim1=1, dim2=2).rsqrt()  # [C, F] the features in units of their deviation
    normal = unit[:, :, None] * system * unit[:, None, :]
    inverse: Tensor = torch.linalg.pinv(normal, hermitian=True, rtol=1e-12)  # identical features share the weight
    solution: Tensor = inverse @ (unit * gap)[:, :, None]
    return prior + unit * solution[:, :, 0]


def _deviation_ratio(covariance: Tensor, theta: Tensor) -> Tensor:
    """σ_y / σ_ŷ per channel [C], at most 2, and 1 where the prediction is constant."""
    predicted = torch.einsum("cf,cfg,cg->c", theta, covariance[:, :-1, :-1], theta)
    target = covariance[:, -1, -1]
    usable = (predicted > NEGLIGIBLE_VARIANCE * target) & (target > 0)
    ratio = (target / torch.where(usable, predicted, torch.ones_like(predicted))).clamp(min=0.0).sqrt()
    return torch.where(usable, ratio, torch.ones_like(ratio)).clamp(1.0, 2.0)


def solve_held_out(halves: tuple[Moments, Moments], ridge: float = 0.0) -> AffineMap:
    """Least squares over both halves of the samples, shrunk towards no change by what each half confirms of the other's fit.

    With u_k = f_k(x) - x₁ the change that the fit of half k makes and r = y - x₁ the one wanted, the factor is
    λ = Σ_k ⟨u_k, r⟩ / Σ_k ⟨u_k, u_k⟩ over the half that k has not seen, kept in [0, 1]: the λ with the least held-out error
    of the two fits, which is never more than that of λ = 0, no change. What it then shrinks is the fit over both halves,
    for which nothing is left to be held out. All of it follows from the sums. Ours, not in the paper.

    Args:
        halves: sums of the same features and target over disjoint samples.
        ridge: of `Moments.solve`.

    Raises:
        ValueError: nothing was added to the first half; where only the second is empty, nothing confirms a fit: λ = 0.
    """
    first, second = (half.gram for half in halves)
    if first is None:
        raise ValueError("no pairs were added to these moments")
    if second is None:
        return AffineMap.identity(len(first)).to(first.device)
    wanted = torch.zeros_like(first[:, 0])  # [C, F+2] r over (x₁, …, y, 1)
    wanted[:, 0], wanted[:, -2] = -1.0, 1.0
    agreed, made = torch.zeros_like(wanted[:, 0]), torch.zeros_like(wanted[:, 0])  # [C]
    for fitted, unseen in ((halves[0], second), (halves[1], first)):
        change = _change(fitted.solve(ridge), wanted)
        agreed += torch.einsum("ci,cij,cj->c", change, unseen, wanted)
        made += torch.einsum("ci,cij,cj->c", change, unseen, change)
    factor = (agreed / made.clamp(min=torch.finfo(torch.float64).tiny)).clamp(0.0, 1.0).float()  # [C] λ
    both = Moments(first + second).solve(ridge)
    previous = None if both.previous is None else factor * both.previous
    return AffineMap(1.0 + factor * (both.scale - 1.0), factor * both.shift, previous)


def _change(affine: AffineMap, like: Tensor) -> Tensor:
    """f(x) - x₁ as coefficients over (x₁, …, x_F, y, 1): [C, F+2]."""
    vector = torch.zeros_like(like)
    vector[:, 0], vector[:, -1] = affine.scale.to(like) - 1.0, affine.shift.to(like)
    if affine.previous is not None:
        vector[:, 1] = affine.previous.to(like)
    return vector


def solve_prediction(
    sums: Moments, ridge: float, factors: tuple[float, float] = (0.0, 0.0), deviation: Tensor | None = None
) -> AffineMap:
    """The map of a prediction: ε ≈ scale·ε̂ + previous·x_t + shift, by least squares; with `deviation`, of a given spread.

    Least squares at the accelerated model's own x_t shrinks what it cannot predict, at every step again. The part of the
    map that is orthogonal to x_t is therefore stretched until the denoised prediction D = p·x_t + q·ε has the deviation
    that it had on full-precision trajectories of the same noise: with β = Cov(ε̂, x_t) / Var(x_t), scale becomes k·scale and
    previous takes (1 - k)·scale·β, so E[ε | x_t] stays. k is kept in [1/2, 2]. Ours, not in the paper.

    Args:
        sums: of the pairs ((ε̂, x_t), ε), ε being the full-precision prediction at the same x_t.
        ridge: of `Moments.solve`.
        factors: (p, q) of D.
        deviation: [C] target for D, or None for plain least squares.
    """
    fitted = sums.solve(ridge)
    if deviation is None:
        return fitted
    assert fitted.previous is not None, "the sums need x_t as second regressor"
    mean, covariance = sums.centred()
    p, q = factors
    scale, previous = fitted.scale.double(), fitted.previous.double()
    power = covariance[:, 1, 1].clamp(min=torch.finfo(torch.float64).tiny)  # [C] Var(x_t)
    slope = covariance[:, 0, 1] / power  # [C] β
    rest = covariance[:, 0, 0] - slope * covariance[:, 0, 1]  # [C] Var(ε̂) that x_t does not explain
    explained = (p + q * (previous + scale * slope)).square() * power  # [C] what x_t gives to Var(D)
    own = (q * scale).square() * rest
    usable = own > NEGLIGIBLE_VARIANCE * explained
    wanted = (deviation.to(own).square() - explained).clamp(min=0.0) / torch.where(usable, own, 1.0)
    stretch = torch.where(usable, wanted.sqrt().clamp(0.5, 2.0), 1.0)  # [C] k
    scale, previous = stretch * scale, previous + (1 - stretch) * scale * slope
    shift = mean[:, 2] - scale * mean[:, 0] - previous * mean[:, 1]
    return AffineMap(scale.float(), shift.float(), previous.float())


def fit_affine(x: Tensor, y: Tensor, channel_dim: int = 1) -> AffineMap:
    """a = Cov(x, y) / Var(x), b = ȳ - a·x̄ per channel, pooled over every other dimension (paper equation 10).

    Args:
        x: feature that will be used [..., C, ...].
        y: feature that it should equal, same shape.
        channel_dim: which dimension is C.

    Raises:
        ValueError: the shapes differ.
    """
    if x.shape != y.shape:
        raise ValueError(f"x is {list(x.shape)} and y is {list(y.shape)}: they must agree")
    moments = Moments()
    moments.update((x,), y, channel_dim)
    return moments.solve()


def fold_into_epilogue(
    product_scale: Tensor, bias: Tensor | None, correction: AffineMap | None
) -> tuple[Tensor, Tensor | None]:
    """Absorb a₂, b₂ into the epilogue of an integer layer.

    a₂·(s·p) + b₂ + bias = (a₂·s)·p + (b₂ + bias): the integer weights never change with the step.

    Args:
        product_scale: [C] factor s that turns the integer product p into real numbers.
        bias: [C] or None.
        correction: map of this step, or None.

    Returns:
        (scale [C], shift [C] or None) of the epilogue.
    """
    if correction is None:
        return product_scale, bias
    shift = correction.shift if bias is None else correction.shift + bias
    return product_scale * correction.scale, shift
