"""Images held in memory, with a plan or without, and what they cost; `sampling` is stage 6."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from cachequant.pipeline.at_work import at_work
from cachequant.pipeline.context import Context
from cachequant.pipeline.graphed_step import deployed_sampler
from cachequant.pipeline.hook import Call
from cachequant.plan import Plan


@dataclass(frozen=True)
class Samples:
    """Images and their trajectories.

    Attributes:
        images: [n, C, H, W] in [0, 1].
        trajectory: [T, n', C, H, W] x_t of the first batch, or None where it was not recorded.
        seconds: wall-clock time of the sampling.
    """

    images: Tensor
    trajectory: Tensor | None
    seconds: float


def draw(context: Context, plan: Plan | None, seeds: list[int], label: str, record: bool = False) -> Samples:
    """Sample one image per seed; `plan` None is the untouched model.

    Args:
        context: pipeline and configuration (batch size from `sample.batch_size`, integers from `backend`).
        plan: what accelerates it.
        seeds: noise of each image; equal seeds give equal noise under every plan.
        label: text of the progress bar.
        record: keep x_t of the first batch.
    """
    path: list[Tensor] = []
    with at_work(context, plan) as running:

        def step(call: Call) -> Tensor:
            """The accelerated step, with x_t kept where asked."""
            if record and call.opens and len(path) < context.num_steps:
                path.append(call.x.detach().cpu().clone())
            return running.step(call)

        start, batch_size = time.perf_counter(), context.config.sample.batch_size
        sampler = deployed_sampler(context.pipe.scheduler, running.network)
        images = torch.cat(list(context.run(step, running.cache, seeds, label, batch_size, True, sampler)))
        seconds = time.perf_counter() - start
    return Samples(images, torch.stack(path) if path else None, seconds)
