"""The network in chunks of a batch, where all samples must take a step together but do not fit in one evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cachequant.models.adapter import Adapter
from cachequant.pipeline.context import Context
from cachequant.pipeline.hook import Call


@dataclass(frozen=True)
class Chunks:
    """`Adapter.full` and `Adapter.cached` on a call whose rows are evaluated in `count` parts of almost equal length.

    Attributes:
        adapter: of the network.
        count: number of parts; 1 is the adapter itself.
    """

    adapter: Adapter
    count: int = 1

    @staticmethod
    def of(context: Context, samples: int) -> Chunks:
        """Parts of at most `calibration.batch_size` samples."""
        return Chunks(context.adapter, -(-samples // context.config.calibration.batch_size))

    def full(self, call: Call) -> tuple[Tensor, Tensor]:
        """Output and cached feature of the whole network."""
        parts = [self.adapter.full(part.x, part.timestep, **part.kwargs) for _, part in self._parts(call)]
        outputs, features = zip(*parts, strict=True)
        return _joined(list(outputs)), _joined(list(features))

    def cached(self, call: Call, feature: Tensor) -> Tensor:
        """Output of a cached step from the corrected feature."""
        return _joined(
            [
                self.adapter.cached(part.x, part.timestep, None, feature[rows], **part.kwargs)
                for rows, part in self._parts(call)
            ]
        )

    def _parts(self, call: Call) -> Iterator[tuple[slice, Call]]:
        if self.count == 1:
            yield slice(None), call
            return
        length = -(-len(call.x) // self.count)
        for start in range(0, len(call.x), length):
            rows = slice(start, start + length)
            yield rows, call.rows(rows)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
