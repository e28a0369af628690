"""Closed-form weight rounding: each column's rounding error is made good by the columns that are rounded after it.

For inputs with second moment H = E[x xᵀ] a row of weights errs by e H eᵀ, e = w - w_q. With the factors H = M D Mᵀ, M unit
upper triangular, that is Σ_k D_k (e m_k)², and rounding w_k + Σ_{j<k} e_j M_jk leaves only the rounding's own error in each
term. Same result as OBQ / GPTQ (Frantar et al., ICLR 2023, section 3), in the form of LDLQ (Chee et al., QuIP, NeurIPS 2023,
theorem 1): one Cholesky factorisation and no inverse. Ours: the grid is chosen by the error that compensated rounding
really leaves, so that the parameters that are scored are the ones that are used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cachequant.errors import UserError
from cachequant.quant.affine import grid_from_range

RATIOS = tuple(1.0 - 0.05 * i for i in range(10))
"""Candidates r = 1.00, 0.95, … 0.55 for both ends of a row's range."""

DAMPINGS = (0.3, 0.1, 0.03, 0.01, 0.003)
"""Candidates for the share of its mean diagonal that is added to a second moment's diagonal."""

PIECE = 1 << 26
"""Weights times candidates that are rounded at once: it bounds the memory."""

BLOCK = 64
"""Columns that are rounded before their errors reach all later ones in one product."""


@dataclass(frozen=True)
class Factor:
    """H = M D Mᵀ in an order of its columns, the largest diagonal first.

    Attributes:
        order: [n] columns of H as they are rounded.
        upper: [n, n] M, unit upper triangular.
        pivots: [n] D.
    """

    order: Tensor
    upper: Tensor
    pivots: Tensor

    @staticmethod
    def of(moment: Tensor, damping: float) -> Factor:
        """Factorise a second moment [n, n] with `damping` times the mean magnitude of its diagonal added to the diagonal.

        Of a column without any input that is all there is. Where H stays indefinite, as rounding may leave it, damping is
        doubled until it is not.

        Raises:
            UserError: H is not finite.
        """
        if not bool(moment.isfinite().all()):
            raise UserError(
                "the inputs of a layer hold NaN or infinity, expected finite ones: check the model's weights and scheduler"
            )
        diagonal = moment.diagonal()
        mean = float(diagonal.abs().mean()) or 1.0
        order = diagonal.argsort(descending=True, stable=True)
        flipped = moment[order][:, order].flip(0, 1)  # its lower factor, flipped, is the upper one
        while True:
            damped = flipped + torch.eye(len(flipped), dtype=moment.dtype, device=moment.device) * (damping * mean)
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                break
            damping = max(2 * damping, 1e-6)
        upper = lower.flip(0, 1)
        root = upper.diagonal()
        return Factor(order, upper / root, root.square())


@dataclass(frozen=True)
class RowGrids:
    """A grid per row of weights and input segment.

    Attributes:
        scale, zero_point: [R, S].
        segment: [n] which segment a column belongs to.
        bits: grid size.
    """

    scale: Tensor
    zero_point: Tensor
    segment: Tensor
    bits: int

    def spread(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every column in `order`: [R, n] twice."""
        columns = self.segment[order]
        return self.scale[:, columns], self.zero_point[:, columns]


def compensated(weight: Tensor, factor: Factor, grids: RowGrids) -> tuple[Tensor, Tensor]:
    """Integers of every weight, and the error e (H + damping) eᵀ that they leave.

    Args:
        weight: [R, n].
        factor: of the second moment of the layer's input.
        grids: one per row and segment.

    Returns:
        (integers [R, n] in [0, 2^bits - 1], error [R]).
    """
    target, (scale, zero) = weight[:, factor.order], grids.spread(factor.order)
    integers, errors = torch.empty_like(target), torch.zeros_like(target)  # of columns in order
    left = target.new_zeros(len(target))
    levels = 2.0**grids.bits - 1
    for begin in range(0, target.shape[1], BLOCK):
        end = min(begin + BLOCK, target.shape[1])
        wanted = target[:, begin:end] + errors[:, :begin] @ factor.upper[:begin, begin:end]  # [R, b]
        for k in range(begin, end):
            goal = wanted[:, k - begin] + errors[:, begin:k] @ factor.upper[begin:k, k]  # [R]
            q = (goal / scale[:, k]).round_().add_(zero[:, k]).clamp_(0, levels)
            value = (q - zero[:, k]) * scale[:, k]
            integers[:, k], errors[:, k] = q, target[:, k] - value
            left += factor.pivots[k] * (goal - value).square()
    back = torch.empty_like(factor.order)
    back[factor.order] = torch.arange(len(back), device=back.device)
    return integers[:, back], left


def candidate_grids(weight: Tensor, segment: Tensor, bits: int, symmetric: bool = False) -> list[RowGrids]:
    """Grids over the shrunken ranges of every row [R, n] and segment, one entry per ratio of `RATIOS`."""
    parts = [weight[:, segment == s] for s in range(int(segment.max()) + 1)]
    low, high = (
        torch.stack(ends, dim=1) for ends in ([p.amin(1) for p in parts], [p.amax(1) for p in parts])
    )  # [R, S]
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    made = []
    for ratio in RATIOS:
        scale, zero = grid_from_range(ratio * low, ratio * high, bits)
        made.append(RowGrids(scale, torch.full_like(zero, 2.0 ** (bits - 1)) if symmetric else zero, segment, bits))
    return made


def best_rounding(weight: Tensor, factor: Factor, candidates: list[RowGrids]) -> tuple[Tensor, RowGrids, Tensor]:
    """Compensated rounding on the candidate grid that leaves the least error, row by row.

    Returns:
        (integers [R, n], the chosen grids, error [R]).
    """
    count, first = len(candidates), candidates[0]
    scales, zeros = (
        torch.stack([getattr(g, name) for g in candidates]) for name in ("scale", "zero_point")
    )  # [K, R, S]
    parts: list[tuple[Tensor, ...]] = []
    for rows in torch.arange(len(weight), device=weight.device).split(max(1, PIECE // (count * weight.shape[1]))):
        scale, zero = scales[:, rows].flatten(0, 1), zeros[:, rows].flatten(0, 1)  # [K·r, S]
        grids = RowGrids(scale, zero, first.segment, first.bits)
        integers, error = compensated(weight[rows].repeat(count, 1), factor, grids)  # [K·r, n], [K·r]
        best = error.view(count, -1).argmin(0) * len(rows) + torch.arange(len(rows), device=rows.device)  # [r] into K·r
        parts.append((integers[best], scale[best], zero[best], error[best]))
    integers, scale, zero, error = (torch.cat(part) for part in zip(*parts, strict=True))
    return integers, RowGrids(scale, zero, first.segment, first.bits), error


def rounding_error(weight: Tensor, moment: Tensor, integers: Tensor, grids: RowGrids) -> Tensor:
    """e H eᵀ of every row [R]: the mean squared error of the layer's output that given integers [R, n] cause."""
    scale, zero = grids.spread(torch.arange(weight.shape[1], device=weight.device))
    error = weight - (integers - zero) * scale  # [R, n]
    return ((error @ moment) * error).sum(1)


def best_damping(weight: Tensor, halves: tuple[Tensor, Tensor], grids: RowGrids) -> float:
    """The damping of `DAMPINGS` whose compensation from one half's second moment errs least under the other's.

    Args:
        weight: [R, n].
        halves: second moments [n, n] over disjoint samples.
        grids: the grid that all are tried on.
    """
    fitted, unseen = halves

    def error(damping: float) -> float:
        integers, _ = compensated(weight, Factor.of(fitted, damping), grids)
        return float(rounding_error(weight, unseen, integers, grids).sum())

    return min(DAMPINGS, key=error)
