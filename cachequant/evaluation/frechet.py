"""Fréchet distance and inception score of streamed features, in float64, as guided-diffusion's evaluator defines them.

The names say nothing of the features: over Inception's they are FID, sFID and IS.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cachequant.errors import UserError

Gaussian = tuple[Tensor, Tensor]
"""Mean [C] and covariance [C, C]."""


@dataclass
class FeatureStatistics:
    """Streaming mean and covariance of feature vectors: count, sum and sum of outer products in float64."""

    channels: int
    count: int = 0
    total: Tensor = field(init=False)
    outer: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.channels, dtype=torch.float64)  # [C]
        self.outer = torch.zeros(self.channels, self.channels, dtype=torch.float64)  # [C, C]

    def update(self, features: Tensor) -> None:
        """Adds features `[N, C]`; raises UserError for another shape."""
        if features.ndim != 2 or features.shape[1] != self.channels:
            raise UserError(f"features {list(features.shape)} given; expected [N, {self.channels}]: reshape")
        features = features.detach().to("cpu", torch.float64)
        self.count += len(features)
        self.total += features.sum(0)
        self.outer += features.T @ features

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """The statistics of both sets together; neither operand changes."""
        if other.channels != self.channels:
            raise UserError(f"{other.channels} channels given; expected {self.channels}: use one network")
        merged = FeatureStatistics(self.channels, self.count + other.count)
        merged.total += self.total + other.total
        merged.outer += self.outer + other.outer
        return merged

    def state(self) -> list[Tensor]:
        """What adds over workers."""
        return [torch.tensor(self.count), self.total, self.outer]

    def restore(self, state: list[Tensor]) -> None:
        """Take the sums of all workers."""
        self.count, self.total, self.outer = int(state[0]), state[1], state[2]

    @property
    def mean(self) -> Tensor:
        """Mean float64 `[C]`; raises UserError before the first sample."""
        self._require(1)
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (ddof 1) float64 `[C, C]`; raises UserError with fewer than 2 samples."""
        self._require(2)
        mean = self.mean
        return (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)

    @property
    def gaussian(self) -> Gaussian:
        """Mean and covariance."""
        return self.mean, self.covariance

    def _require(self, samples: int) -> None:
        if self.count < samples:
            raise UserError(f"{self.count} samples given; expected {samples} or more: call update() first")


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """Squared 2-Wasserstein distance of Gaussians, means `[C]` and covariances `[C, C]` (Heusel et al. 2017).

    |mu1 - mu2|^2 + tr(cov1) + tr(cov2) - 2 tr((cov1 cov2)^(1/2)). The last trace is the sum of the singular
    values of cov1^(1/2) cov2^(1/2). Those exist for rank-deficient covariances too, so the jitter of 1e-6
    that guided-diffusion adds where its general matrix square root breaks down is never needed.

    Raises:
        UserError: shapes differ, or a value is not finite.
    """
    mu1, cov1, mu2, cov2 = (torch.as_tensor(x).to("cpu", torch.float64) for x in (mu1, cov1, mu2, cov2))
    channels = mu1.numel()
    if mu1.shape != mu2.shape or any(c.shape != (channels, channels) for c in (cov1, cov2)):
        shapes = [list(x.shape) for x in (mu1, cov1, mu2, cov2)]
        raise UserError(f"shapes {shapes} given; expected [C], [C, C], [C], [C, C]: use one feature network")
    if not all(x.isfinite().all() for x in (mu1, cov1, mu2, cov2)):
        raise UserError("statistics are not finite; expected finite numbers: check the images for NaN")
    cross = torch.linalg.svdvals(_symmetric_root(cov1) @ _symmetric_root(cov2)).sum()
    return float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2.0 * cross)


def _symmetric_root(matrix: Tensor) -> Tensor:
    """Square root of a positive semi-definite matrix; rounding's negative eigenvalues count as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0.0).sqrt()) @ vectors.T


@dataclass
class ScoreSums:
    """Streaming inception score: for each split of consecutive images the sums of p and of p log p, in float64.

    `size` images a split as in guided-diffusion; the last split may be shorter.
    """

    images: int
    classes: int
    size: int = 5000
    counts: Tensor = field(init=False)
    marginal: Tensor = field(init=False)
    negentropy: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if self.images < 1 or self.size < 1:
            raise UserError(f"{self.images} images in splits of {self.size} given; expected 1 or more of both")
        splits = -(-self.images // self.size)
        self.counts = torch.zeros(splits, dtype=torch.float64)  # [S]
        self.marginal = torch.zeros(splits, self.classes, dtype=torch.float64)  # [S, K]
        self.negentropy = torch.zeros(splits, dtype=torch.float64)  # [S]

    def update(self, start: int, probs: Tensor) -> None:
        """Adds class probabilities `[N, K]` of the images start … start + N - 1."""
        probs = probs.detach().to("cpu", torch.float64)
        split = torch.arange(start, start + len(probs)) // self.size  # [N]
        self.counts.index_add_(0, split, torch.ones(len(probs), dtype=torch.float64))
        self.marginal.index_add_(0, split, probs)
        self.negentropy.index_add_(0, split, torch.xlogy(probs, probs).sum(1))

    def state(self) -> list[Tensor]:
        """What adds over workers."""
        return [self.counts, self.marginal, self.negentropy]

    def restore(self, state: list[Tensor]) -> None:
        """Take the sums of all workers."""
        self.counts, self.marginal, self.negentropy = state

    @property
    def value(self) -> float:
        """exp(E KL(p(y|x) || p(y))), the mean over splits (Salimans et al. 2016).

        E KL = E[Σ p log p] - Σ m log m with m = E[p], which needs the sums alone.
        """
        marginal = self.marginal / self.counts[:, None]  # [S, K]
        divergence = self.negentropy / self.counts - torch.xlogy(marginal, marginal).sum(1)
        return float(divergence.exp().mean())


def inception_score(probs: Tensor, split_size: int = 5000) -> float:
    """`ScoreSums` of class probabilities `[N, K]` held at once.

    Raises:
        UserError: no samples, or splits of none.
    """
    if probs.ndim != 2:
        raise UserError(f"probabilities {list(probs.shape)} given; expected [N, K]: reshape")
    sums = ScoreSums(len(probs), probs.shape[1], split_size)
    sums.update(0, probs)
    return sums.value
