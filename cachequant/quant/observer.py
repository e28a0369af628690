"""Temporal quantisers: one scale and zero point per executed step (CacheQuant section 4.1, after TDQ and EDA-DM)."""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

from cachequant.errors import UserError
from cachequant.kernels.reference import centred_integers
from cachequant.quant.affine import search_grid
from cachequant.quant.formats import nearest, search_scale
from cachequant.types import ActivationTable

POOL = 4096
"""Values kept per step for the range search, taken at a fixed stride; the extremes are always among them."""


class StepQuantizer:
    """Quantiser of one activation tensor with a row of parameters per executed step.

    Args:
        bits: grid size.
        search: range search of `cachequant.quant.affine.search_grid`.
        table: rows found before, or None to observe.
        kind: format of the numbers, where there is no table yet.
    """

    def __init__(self, bits: int, search: str = "mse", table: ActivationTable | None = None, kind: str = "int") -> None:
        self.bits, self.search, self.format = bits, search, kind if table is None else table.format
        self._pool: list[Tensor] = []
        self._rows: dict[int, tuple[float, float]] = {}
        if table is not None:
            columns = (table.steps.tolist(), table.scale.tolist(), table.zero_point.tolist())
            self._rows = {s: (a, z) for s, a, z in zip(*columns, strict=True)}
        self._steps = sorted(self._rows)

    def observe(self, x: Tensor) -> None:
        """Pool values of the current step; call once per batch."""
        flat = x.detach().flatten()
        stride = max(1, flat.numel() // POOL)
        self._pool.append(torch.cat([flat[::stride], flat.min()[None], flat.max()[None]]))

    def finish_step(self, step: int) -> None:
        """Search the grid of everything pooled since the last call and file it under `step`; no-op if nothing was."""
        if not self._pool:
            return
        values = torch.cat(self._pool).float()[None]  # [1, n]
        if self.format == "int":
            scale, zero_point = search_grid(values, self.bits, self.search)
            self._rows[step] = (float(scale), float(zero_point))
        else:
            self._rows[step] = (float(search_scale(values, self.format, self.bits, self.search)), 0.0)
        self._steps = sorted(self._rows)
        self._pool.clear()

    def row(self, step: int) -> tuple[float, float]:
        """Scale and zero point of `step`; for a step that was not calibrated, those of the last one before it.

        Only a forced refresh (an image-to-image run that starts inside a group) reads a row that is not its own.
        """
        if not self._rows:
            raise UserError("a quantiser has no calibrated step: run stage 4 before sampling")
        row = self._rows.get(step)
        return row if row is not None else self._rows[self._steps[max(bisect_right(self._steps, step) - 1, 0)]]

    def integers(self, x: Tensor, step: int) -> tuple[Tensor, float]:
        """(q - z, scale) of x on the grid of `step`; of another format its values in units of the scale."""
        scale, zero_point = self.row(step)
        if self.format != "int":
            return nearest(x / scale, self.format, self.bits), scale
        return centred_integers(x, scale, zero_point, self.bits), scale

    def fake(self, x: Tensor, step: int) -> Tensor:
        """Round trip of x through the grid of `step`."""
        integers, scale = self.integers(x, step)
        return integers.mul_(scale)

    @property
    def table(self) -> ActivationTable:
        """All rows, as they are saved."""
        steps = torch.tensor(self._steps, dtype=torch.int32)
        scale = torch.tensor([self._rows[s][0] for s in self._steps], dtype=torch.float32)
        zero_point = torch.tensor([self._rows[s][1] for s in self._steps], dtype=torch.float32)
        return ActivationTable(steps, scale, zero_point, self.bits, self.format)
