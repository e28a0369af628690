"""Calibration inputs: which rows of the trajectories stage 4 will see again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from cachequant.errors import UserError
from cachequant.pipeline.hook import Call


@dataclass(frozen=True)
class StepInput:
    """Inputs of one evaluation, kept for stage 4.

    Attributes:
        x: [n, C, H, W] rows of x_t.
        timestep: training timestep [].
        kwargs: conditioning of the same rows.
    """

    x: Tensor
    timestep: Tensor
    kwargs: dict[str, Tensor]

    def rows(self, count: int, device: torch.device) -> StepInput:
        """Evenly spaced rows on a device, at most `count`."""
        index = spread(len(self.x), count)
        kwargs = {name: value[index].to(device) for name, value in self.kwargs.items()}
        return StepInput(self.x[index].to(device), self.timestep.to(device), kwargs)


def spread(total: int, count: int) -> Tensor:
    """Evenly spaced indices into `total` things, all of them if there are no more than `count`: [min(count, total)]."""
    return torch.linspace(0, total - 1, min(count, total)).round().long()


class KeptInputs:
    """Takes every denoiser call of a calibration and keeps rows evenly spaced over all samples, the same at every step.

    Only the rows that stay are copied: memory is `wanted` rows a step, however many samples there are. They span both
    guidance halves; where these are two calls, each gives its share.

    Args:
        num_steps: evaluations of a run.
        samples: samples of all batches together.
        first_batch: samples of the first batch.
        wanted: rows to keep per step.
    """

    def __init__(self, num_steps: int, samples: int, first_batch: int, wanted: int) -> None:
        self.samples, self.first_batch, self.wanted = samples, first_batch, wanted
        self._chosen: dict[Hashable, Tensor] = {}
        self._seen: Counter[tuple[int, Hashable]] = Counter()
        self._parts: list[dict[Hashable, list[StepInput]]] = [{} for _ in range(num_steps)]

    def take(self, step: int, call: Call) -> None:
        """Look at one call of evaluation `step`.

        Raises:
            UserError: nested conditioning (SDXL's added_cond_kwargs), which cannot be cut into rows.
        """
        nested = [name for name, value in call.kwargs.items() if isinstance(value, dict | list | tuple) and value]
        if nested:
            raise UserError(
                f"this pipeline passes {nested[0]} as a {type(call.kwargs[nested[0]]).__name__}, expected plain tensors: "
                "it is not supported yet"
            )
        if call.context not in self._chosen:
            rows_per_sample = len(call.x) / self.first_batch
            self._chosen[call.context] = spread(round(rows_per_sample * self.samples), self.wanted)
        before = self._seen[step, call.context]
        self._seen[step, call.context] += len(call.x)
        chosen = self._chosen[call.context]
        rows = chosen[(chosen >= before) & (chosen < before + len(call.x))] - before
        if len(rows):
            self._parts[step].setdefault(call.context, []).append(_cut(call, rows))

    def joined(self) -> tuple[StepInput, ...]:
        """What was kept, one entry per step.

        Raises:
            UserError: the contexts of an evaluation have different conditioning, so that they cannot share a batch.
        """
        return tuple(_join([part for parts in step.values() for part in parts], self.wanted) for step in self._parts)


def _cut(call: Call, rows: Tensor) -> StepInput:
    """Copies of some rows, with the conditioning that has one row each."""
    part = call.rows(rows)
    kwargs = {name: v.cpu() for name, v in part.kwargs.items() if v is not call.kwargs[name]}
    return StepInput(part.x.cpu(), torch.as_tensor(call.timestep).flatten()[0].cpu(), kwargs)


def _join(parts: list[StepInput], wanted: int) -> StepInput:
    names = [tuple(sorted(part.kwargs)) for part in parts]
    if len(set(names)) > 1:
        raise UserError(
            f"denoiser calls of one evaluation pass {names[0]} and {next(n for n in names if n != names[0])}, expected the "
            "same conditioning by name in each: pass an empty one instead of none"
        )
    x = torch.cat([part.x for part in parts])
    rows = spread(len(x), wanted)
    kwargs = {name: torch.cat([part.kwargs[name] for part in parts])[rows] for name in names[0]}
    return StepInput(x[rows], parts[0].timestep, kwargs)
