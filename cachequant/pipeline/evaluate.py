"""Judge a set of images with one or many workers: the numbers are the same up to rounding."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as lightning
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cachequant.evaluation.suite import Request, Suite
from cachequant.pipeline.workers import Items, finish, make_trainer, one_line_if_a_worker_is_lost, predict, share


class Evaluator(lightning.LightningModule):
    """Each worker reads its own part of the images of every pass; the sums are added in the end.

    Args:
        suite: passes over images.
        batch_size: images at once.
    """

    def __init__(self, suite: Suite, batch_size: int) -> None:
        super().__init__()
        self.suite, self.batch_size = suite, batch_size
        self.measures = nn.ModuleList(measure for _, measure in suite.passes).eval().requires_grad_(False)
        self._batches: list[tuple[int, int, int]] = []
        self._bar: Any = None

    def predict_dataloader(self) -> Items:
        """Numbers of this worker's batches."""
        for number, (images, _) in enumerate(self.suite.passes):
            first, last = share(images.count, self.trainer)
            self._batches += [(number, i, min(i + self.batch_size, last)) for i in range(first, last, self.batch_size)]
        total = sum(stop - start for _, start, stop in self._batches)
        quiet = None if self.trainer.is_global_zero else True
        self._bar = tqdm(total=total, desc="evaluate", unit="image", leave=False, disable=quiet)
        return Items(range(len(self._batches)))

    def predict_step(self, batch: int) -> int:
        """Read a batch and show it to its measure."""
        number, start, stop = self._batches[batch]
        images, measure = self.suite.passes[number]
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # as the evaluator
            measure.update(start, images.read(start, stop).to(self.device))
        self._bar.update(stop - start)
        return stop - start

    def merge(self) -> None:
        """Add the sums of all workers; every worker calls it, after the loop."""
        self._bar.close()
        if self.trainer.world_size == 1:
            return
        for _, measure in self.suite.passes:
            measure.restore([self._sum(tensor) for tensor in measure.state()])

    def _sum(self, tensor: Tensor) -> Tensor:
        device = self.trainer.strategy.root_device
        total: Tensor = self.trainer.strategy.reduce(tensor.to(device, copy=True), reduce_op="sum")
        return total.cpu()


def evaluate(
    request: Request,
    batch_size: int = 64,
    device: str = "auto",
    devices: int | None = None,
    nodes: int | None = None,
) -> dict[str, float] | None:
    """The metrics of a request by name; None in workers other than the first.

    Args:
        request: what is judged, and how.
        batch_size: images at once.
        device, devices, nodes: of `make_trainer`.

    Raises:
        UserError: anything that a user can mend.
    """
    trainer = make_trainer(device, devices, nodes)
    module = Evaluator(Suite.of(request), batch_size)
    predict(trainer, module)
    with torch.no_grad(), one_line_if_a_worker_is_lost():
        module.merge()
    finish(trainer)
    return module.suite.results(trainer.strategy.root_device) if trainer.is_global_zero else None
