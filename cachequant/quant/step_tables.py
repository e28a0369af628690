"""What changes from step to step, on the device: one index selects every layer's scales, so that a static CUDA graph serves
all steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cachequant.kernels.cuda import step_ops
from cachequant.quant.observer import StepQuantizer
from cachequant.types import ActivationTable, AffineMap

ALIGN = 32
"""Columns of every layer start at a multiple of this, for wide loads."""


@dataclass(frozen=True)
class Columns:
    """The output channels of one layer segment in the tables: the slice [start, start + size)."""

    start: int
    size: int


class StepTables:
    """Grids of all activations and epilogues of all products, of the step that `load` was last called for.

    Layers register with `add_grids` and `add_columns`; `freeze` then makes the tables, whose rows of the current step stay
    at the same addresses for good.

    Args:
        num_steps: T.
        device: where the layers run.

    Attributes:
        step: [1] int64, the step whose rows `load` computes.
        timestep: [1] of that step, where `timesteps` was given to `freeze`.
    """

    def __init__(self, num_steps: int, device: torch.device) -> None:
        self.num_steps, self.device = num_steps, device
        self.loaded: int | None = None
        self._activations: list[ActivationTable] = []
        self._known: dict[bytes, int] = {}
        self._width = 0
        self._columns: list[tuple[Columns, int, Tensor, Tensor | None, Tensor, Tensor | None]] = []
        self._corrections: list[tuple[Columns, dict[int, AffineMap]]] = []
        self._followed: list[tuple[Tensor, Tensor]] = []

    def add_grids(self, tables: tuple[ActivationTable, ...]) -> int:
        """Register the segments of one layer's input, in consecutive rows; inputs with equal tables share theirs."""
        key = b"|".join(
            b"".join(t.contiguous().numpy().tobytes() for t in (table.steps, table.scale, table.zero_point))
            + bytes([table.bits])
            for table in tables
        )
        if key not in self._known:
            self._known[key] = len(self._activations)
            self._activations.extend(tables)
        return self._known[key]

    def add_columns(
        self,
        grid: int,
        scale: Tensor,
        bias: Tensor | None,
        sums: Tensor,
        offset: Tensor | None,
        corrections: dict[int, AffineMap] | None = None,
    ) -> Columns:
        """Register the epilogue of one product.

        Args:
            grid: row of its input.
            scale, sums, offset: [N] of `DeviceWeight`.
            bias: [N] or None.
            corrections: step -> a₂, b₂.
        """
        made = Columns(self._width, len(scale))
        self._width += -(-len(scale) // ALIGN) * ALIGN
        self._columns.append((made, grid, scale, bias, sums, offset))
        if corrections:
            self._corrections.append((made, corrections))
        return made

    def freeze(self, timesteps: Sequence[int] | None = None) -> None:
        """Make the tables; nothing can be registered afterwards. `timesteps` of all steps, for those that look theirs up."""
        rows = [[StepQuantizer(t.bits, table=t).row(s) for t in self._activations] for s in range(self.num_steps)]
        half = torch.tensor([2.0 ** (table.bits - 1) for table in self._activations])  # [G]
        found = torch.tensor(rows, dtype=torch.float64).view(self.num_steps, -1, 2)  # [T, G, (scale, zero point)]
        scale, zero = found[..., 0], found[..., 1] - half
        inverse = (1.0 / scale).float()
        self._grids = torch.stack(
            [inverse, zero.float(), (-half).expand_as(inverse), (half - 1).expand_as(inverse)], dim=2
        ).to(self.device)  # [T, G, 4]
        self._inputs = torch.stack([scale.float(), zero.float()], dim=2).to(self.device)  # [T, G, 2]
        self.step = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._freeze_columns()
        self._freeze_corrections()
        self.grids = self._grids[0].clone()  # [G, 4]
        self.scale, self.shift, self.offset = torch.zeros(3, self._width, device=self.device)  # [C] each
        self.timestep = None if timesteps is None else self.follow(torch.tensor(timesteps)[:, None])  # [1]

    def _freeze_columns(self) -> None:
        owner = torch.zeros(self._width, dtype=torch.int32)
        factor, base, total, fixed = torch.zeros(4, self._width)
        for made, grid, scale, bias, sums, offset in self._columns:
            at = slice(made.start, made.start + made.size)
            owner[at], factor[at], total[at] = grid, scale, sums
            if bias is not None:
                base[at] = bias
            if offset is not None:
                fixed[at] = offset
        self._fixed = [column.to(self.device) for column in (owner, factor, base, total, fixed)]  # [C] each
        self._columns.clear()

    def _freeze_corrections(self) -> None:
        self._maps: list[Tensor] = []
        if not self._corrections:
            return
        layer_of, channel = torch.zeros(2, self._width, dtype=torch.int32)  # [C] each
        layer_of.fill_(-1)
        first = torch.full((self.num_steps, len(self._corrections)), -1, dtype=torch.int64)  # [T, L]
        gain: list[Tensor] = []
        lift: list[Tensor] = []
        end = 0
        for layer, (made, maps) in enumerate(self._corrections):
            at = slice(made.start, made.start + made.size)
            layer_of[at], channel[at] = layer, torch.arange(made.size, dtype=torch.int32)
            for step, affine in maps.items():  # steps that the layer does not run take no memory
                gain.append(affine.scale.cpu())
                lift.append(affine.shift.cpu())
                first[step, layer], end = end, end + made.size
        tables = layer_of, channel, first, torch.cat(gain), torch.cat(lift)  # [C], [C], [T, L], [V], [V]
        self._maps = [table.to(self.device) for table in tables]
        self._corrections.clear()

    def follow(self, values: Tensor) -> Tensor:
        """A row [W] of `values` [T, W] at a fixed address, which `load` keeps at the current step's."""
        values = values.to(self.device).contiguous()
        row = values[:1].clone()
        self._followed.append((values, row))
        self.loaded = None
        return row[0]

    def ensure(self, step: int) -> None:
        """Have the rows of `step`, which the host knows, in place; nothing is copied if they are."""
        if self.loaded != step:
            self.step.fill_(step)
            self.load()
            self.loaded = step

    def load(self) -> None:
        """Compute the rows of the step in `self.step`, on the device and in one launch: the first thing in a captured step.

        scale = s·s_w·a₂,  shift = bias + b₂ - scale·zero·(Σ w + o·n),  offset = scale·o.
        """
        step_ops.load_step(
            self.step,
            self._grids,
            self._inputs,
            self._fixed,
            self._maps,
            self.grids,
            self.scale,
            self.shift,
            self.offset,
        )
        for values, row in self._followed:
            torch.index_select(values, 0, self.step, out=row)

    def of(self, columns: Columns) -> tuple[Tensor, Tensor, Tensor]:
        """(scale, shift, offset) of one product at the current step, each [N]: views that stay valid."""
        at = slice(columns.start, columns.start + columns.size)
        return self.scale[at], self.shift[at], self.offset[at]
