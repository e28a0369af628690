"""Precision and recall of two sets of feature vectors by nearest-neighbour manifolds, in blocks of bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cachequant.errors import UserError

BLOCK = 2000
"""Rows and columns of distances held at once: 32 MB in float64."""
ROUNDING = 1e-13
"""Squared distances below this share of the squared norms are rounding of the matrix form: the points are the same."""


def precision_recall(
    reference: Tensor, samples: Tensor, k: int = 3, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) of `[N, C]` references and `[M, C]` samples.

    A set's manifold is the union of balls around its points, each reaching its k-th nearest neighbour.
    Precision is the share of samples in the references' manifold, recall the reverse. guided-diffusion computes the
    distances in float16 where they are finite; here they are float64, blocks of them on `device`.

    Raises:
        UserError: a set has k points or fewer.
    """
    if min(len(reference), len(samples)) <= k:
        sizes = f"{len(reference)} references and {len(samples)} samples"
        raise UserError(f"{sizes} given; expected more than {k} of each: use larger sets")
    centre = reference.double().mean(0)  # distances do not change, their rounding shrinks
    sets = [_Points(points, centre, torch.device(device)) for points in (reference, samples)]
    balls = [points.radii(k) for points in sets]
    return sets[0].share_holding(balls[0], sets[1]), sets[1].share_holding(balls[1], sets[0])


class _Points:
    """Feature vectors `[N, C]`, kept where they are; blocks travel to the device in float64."""

    def __init__(self, points: Tensor, centre: Tensor, device: torch.device) -> None:
        self.points, self.centre, self.device = points, centre, device

    def blocks(self) -> Iterator[Tensor]:
        """[<= BLOCK, C] float64 on the device."""
        for block in self.points.split(BLOCK):
            yield block.to(self.device, torch.float64) - self.centre.to(self.device)

    def radii(self, k: int) -> Tensor:
        """Squared distance of each point to its k-th neighbour: [N]."""
        radii = []
        for rows in self.blocks():
            nearest = torch.empty(len(rows), 0, dtype=torch.float64, device=self.device)
            for columns in self.blocks():
                candidates = torch.cat([nearest, squared_distances(rows, columns)], 1)
                count = min(k + 1, candidates.shape[1])  # the nearest is the point itself
                nearest = candidates.topk(count, dim=1, largest=False).values
            radii.append(nearest[:, -1])
        return torch.cat(radii)

    def share_holding(self, radii: Tensor, others: _Points) -> float:
        """Share of `others` that lie in some ball around these points."""
        inside = 0
        for rows in others.blocks():
            hit = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
            for columns, reach in zip(self.blocks(), radii.split(BLOCK), strict=True):
                hit |= (squared_distances(rows, columns) <= reach).any(1)
            inside += int(hit.sum())
        return inside / len(others.points)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|² of `[M, C]` and `[N, C]` by one matrix product: [M, N]; exactly 0 for equal points."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)[None]  # [M, N]
    squared = norms - 2 * (a @ b.T)
    return squared.where(squared > ROUNDING * norms, 0.0)
