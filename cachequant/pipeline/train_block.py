"""Training of one block for reconstruction: its data, its loss, its iterations, as one CUDA graph where there is a GPU.

AdaRound's regulariser (Nagel et al., ICML 2020, equation 24) over BRECQ's blocks (Li et al., ICLR 2021). Differences from
CacheQuant's released code: the regulariser is alive, so that what is hardened at the end is whole already (there its
coefficient never leaves zero and hardening undoes what was learnt); one optimiser a block (there a new one at every
iteration, which forgets Adam's moments); every layer of a block has the same learning rates (there the tail's differ by
mistake).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cachequant.config import ReconConfig
from cachequant.pipeline.graphs import WARM_UP, CudaRecorder
from cachequant.quant.learned import LearnedLayer, Rows

FREE, ANNEALED, BETA_FIRST, BETA_LAST = 0.2, 0.7, 20.0, 2.0
"""Shares of the iterations before which there is no regulariser and behind which its power, annealed, is the last one.

The cosine of the learning rate has spent 95 % of the way by 0.8: what is to become whole has to be pulled before.
"""


@dataclass(frozen=True)
class BlockData:
    """What a block is trained on, a row per sample and step.

    Attributes:
        args, kwargs: of the block's forward, each tensor [n, ...]; other values are the same for all rows.
        target: [n, ...] the full-precision output.
        steps: [n].
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    steps: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> BlockData:
        """Every tensor changed."""

        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else value

        kwargs = {name: changed(value) for name, value in self.kwargs.items()}
        return BlockData(tuple(map(changed, self.args)), kwargs, change(self.target), change(self.steps))

    def batch(self, index: Tensor, device: torch.device) -> BlockData:
        """Some rows, on a device."""
        return self.map(lambda value: value[index.to(value.device)].to(device))

    def near(self, device: torch.device) -> BlockData:
        """All rows on a GPU if they take less than half of what is free there: an iteration then copies nothing."""
        if device.type != "cuda":
            return self
        held = [value for value in (*self.args, *self.kwargs.values(), self.target) if isinstance(value, Tensor)]
        needed, free = sum(value.nbytes for value in held), torch.cuda.mem_get_info(device)[0]
        return self.map(lambda value: value.to(device)) if needed < free // 2 else self


def train_block(
    block: nn.Module, learned: dict[str, LearnedLayer], data: BlockData, rows: Rows, settings: ReconConfig, label: str
) -> tuple[float, float]:
    """Train the layers that stand in a block; returns the error before and after as a share of the target's power.

    Loss: mean squared error over its value with the initial grids hardened, plus λ·mean(1 - |2h - 1|^β), both without unit.
    """
    device = next(iter(learned.values())).rounding[0].device
    data = data.near(device)
    unit = _error(block, data, rows, settings.batch_size, device).clamp(min=1e-20)
    for layer in learned.values():  # the block itself stays as it is: its dropout is none of ours
        layer.train()
    Training(block, learned, data, rows, settings, unit).run(label)
    for layer in learned.values():
        layer.eval()
    power = data.target.square().mean()
    return float(unit / power), float(_error(block, data, rows, settings.batch_size, device) / power)


class Training:
    """The iterations of one block. All that changes between two of them is read from tables [iterations] by a counter on the
    device, so that an iteration can be captured once and replayed.

    Args:
        block: that the layers stand in.
        learned: the layers.
        data: rows to draw batches from.
        rows: told the steps of each batch.
        settings: iterations, batch size, learning rates.
        unit: [] the error that counts as one.
    """

    def __init__(
        self,
        block: nn.Module,
        learned: dict[str, LearnedLayer],
        data: BlockData,
        rows: Rows,
        settings: ReconConfig,
        unit: Tensor,
    ) -> None:
        self.block, self.learned, self.data, self.rows, self.unit = block, learned, data, rows, unit
        device, count = unit.device, settings.iterations
        random = torch.Generator().manual_seed(0)
        picked = torch.randint(len(data.steps), (count, settings.batch_size), generator=random)  # [T, B]
        self._picked = picked.to(data.target.device)
        pull, beta = annealing(count)
        self._pull, self._beta = settings.regulariser * pull.to(device), beta.to(device)
        self._cosine = (1 + torch.cos(torch.arange(count, device=device) * (math.pi / count))) / 2
        self._groups = _groups(learned, settings, device)
        self._rates = [(group["lr"], float(group["lr"])) for group in self._groups]
        on_gpu = device.type == "cuda"
        self.optimiser = torch.optim.Adam(self._groups, fused=on_gpu, capturable=on_gpu)
        self._done = torch.zeros(1, dtype=torch.int64, device=device)

    def run(self, label: str) -> None:
        """All iterations; where the rows are on a GPU, replays of one CUDA graph: small blocks wait for Python otherwise."""
        step: Callable[[], object] = self.step
        count, done = len(self._picked), 0
        with torch.enable_grad():
            if self.data.target.is_cuda and count > WARM_UP:
                step, done = CudaRecorder(self.unit.device)(self.step), WARM_UP  # it has run them
            for _ in tqdm(range(done, count), label, leave=False, disable=None, unit="iteration"):
                step()

    def step(self) -> tuple[Tensor]:
        """The next iteration; returns its loss []."""
        part = self.data.batch(self._now(self._picked), self.unit.device)
        self.rows.steps = part.steps
        for rate, first in self._rates:
            rate.copy_(first * self._now(self._cosine))
        error = (output_of(self.block(*part.args, **part.kwargs)) - part.target).square().mean() / self.unit
        loss = error + self._now(self._pull) * unwhole(self.learned, self._now(self._beta))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self._done += 1
        return (loss.detach(),)

    def _now(self, table: Tensor) -> Tensor:
        """The iteration's row of a table [iterations, ...]; nothing is told the host, which a capture forbids."""
        return table.index_select(0, self._done.to(table.device))[0]


def annealing(iterations: int) -> tuple[Tensor, Tensor]:
    """(share of λ, β) [iterations] of AdaRound's regulariser: none at first, then a β that falls along a cosine."""
    progress = torch.arange(iterations, dtype=torch.float64) / iterations
    share = ((progress - FREE) / (ANNEALED - FREE)).clamp(0, 1)
    beta = BETA_LAST + 0.5 * (BETA_FIRST - BETA_LAST) * (1 + torch.cos(math.pi * share))
    return (progress >= FREE).float(), beta.float()


def unwhole(learned: dict[str, LearnedLayer], beta: Tensor) -> Tensor:
    """AdaRound's regulariser 1 - |2h - 1|^β (equation 24), mean over all weights; `beta`: []."""
    soft = [h for layer in learned.values() for h in layer.soft()]
    total = sum(((1 - (2 * h - 1).abs().pow(beta)).sum() for h in soft), soft[0].new_zeros(()))
    return total / sum(h.numel() for h in soft)


def _groups(learned: dict[str, LearnedLayer], settings: ReconConfig, device: torch.device) -> list[dict[str, Any]]:
    """Parameters with their first learning rates, each a tensor []."""
    layers = learned.values()
    rates = {"rounding": settings.weight_lr, "weight_shift": settings.zero_point_lr, "zero_point": settings.zero_point_lr,
             "scale_shift": settings.scale_lr}  # fmt: skip
    return [
        {"params": [p for layer in layers for p in getattr(layer, name)], "lr": torch.tensor(rate, device=device)}
        for name, rate in rates.items()
    ]


@torch.no_grad()
def _error(block: nn.Module, data: BlockData, rows: Rows, size: int, device: torch.device) -> Tensor:
    """Mean squared error of the block over all rows, with every rounding whole."""
    layers = [m for m in block.modules() if isinstance(m, LearnedLayer)]
    kept = [[p.clone() for p in layer.rounding] for layer in layers]
    for layer in layers:
        for parameter in layer.rounding:
            parameter.copy_(torch.where(parameter >= 0, 20.0, -20.0))
    total = torch.zeros((), device=device)
    for start in range(0, len(data.steps), size):
        part = data.batch(torch.arange(start, min(start + size, len(data.steps))), device)
        rows.steps = part.steps
        total += (output_of(block(*part.args, **part.kwargs)) - part.target).square().sum()
    for layer, values in zip(layers, kept, strict=True):
        for parameter, value in zip(layer.rounding, values, strict=True):
            parameter.copy_(value)
    return total / data.target.numel()


def output_of(made: Any) -> Tensor:
    """The tensor that a block returns, alone or first of several."""
    output: Tensor = made[0] if isinstance(made, tuple) else made
    return output
