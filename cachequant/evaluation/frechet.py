"""Distances between two sets of feature vectors, in float64, as guided-diffusion's evaluator defines them.

The names say nothing of the features: over Inception's they are FID, sFID, IS, precision and recall.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cachequant.errors import UserError


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


def inception_score(probs: Tensor, split_size: int = 5000) -> float:
    """exp(E KL(p(y|x) || p(y))) of class probabilities `[N, K]`, the mean over consecutive splits.

    Salimans et al. 2016. The last split may be shorter, as in guided-diffusion.

    Raises:
        UserError: no samples, or splits of none.
    """
    if probs.ndim != 2 or len(probs) == 0 or split_size < 1:
        given = f"{list(probs.shape)} in splits of {split_size}"
        raise UserError(f"{given} given; expected [N, K] with N >= 1 in splits of 1 or more: check both")
    scores = [_split_score(part) for part in probs.to("cpu", torch.float64).split(split_size)]
    return sum(scores) / len(scores)


def _split_score(probs: Tensor) -> float:
    marginal = probs.mean(0, keepdim=True)  # [1, K]
    divergence = (torch.xlogy(probs, probs) - torch.xlogy(probs, marginal)).sum(1)  # [N]
    return float(divergence.mean().exp())


def precision_recall(reference: Tensor, samples: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) of `[N, C]` references and `[M, C]` samples.

    A set's manifold is the union of balls around its points, each reaching its k-th nearest neighbour.
    Precision is the share of samples in the references' manifold, recall the reverse.

    Raises:
        UserError: a set has k points or fewer.
    """
    if min(len(reference), len(samples)) <= k:
        sizes = f"{len(reference)} references and {len(samples)} samples"
        raise UserError(f"{sizes} given; expected more than {k} of each: use larger sets")
    reference, samples = reference.to(torch.float64), samples.to(torch.float64)
    return _share_inside(samples, reference, k), _share_inside(reference, samples, k)


def _share_inside(points: Tensor, centres: Tensor, k: int) -> float:
    """Share of `points` within some centre's ball, whose radius is the distance to its k-th neighbour."""
    balls = [block.kthvalue(k + 1, dim=1).values for block in _distances(centres, centres)]  # 1st is itself
    radii = torch.cat(balls)  # [N]
    inside = [(block <= radii).any(dim=1) for block in _distances(points, centres)]
    return float(torch.cat(inside).double().mean())


def _distances(a: Tensor, b: Tensor, rows: int = 1000) -> Iterator[Tensor]:
    """Euclidean distances of `[M, C]` to `[N, C]` in blocks `[<= rows, N]`, without the lossy matrix form."""
    for block in a.split(rows):
        yield torch.cdist(block, b, compute_mode="donot_use_mm_for_euclid_dist")
