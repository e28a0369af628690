"""What reusing a feature at one step alone does to the final sample, measured: the weight of the "effect" costs. Ours.

The "sampler" weight follows from a formula for Gaussian data; here nothing is assumed of the sampler, the network behind the
cache site or the data: at one step the feature of the step before is reused, every other step runs in full, and the weight
is the squared change of the final sample over the squared change of the feature.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.pipeline.context import Context
from cachequant.pipeline.hook import Call
from cachequant.schedule import uniform_schedule

FLOOR = 1e-30
"""Smallest weight: a step without any effect weighs nothing, but has a logarithm."""


def effect_weights(context: Context, probes: int = 10, seeds: int = 3) -> Tensor:
    """[T] float64 ‖change of the sample‖² / ‖change of the feature‖² of reusing the feature of one step before.

    Measured at `probes` evenly spaced steps for `seeds` noises of stage 1, of which the geometric mean is taken (a sample
    that tips over into another one moves a hundred times as far as its like, and would decide alone), and interpolated
    between them in logarithms. All probes of a noise are rows of one batch, the first of which is left alone; up to its step
    a probe is that first row and is not computed, so that the whole takes about (probes / 2 + 1)·seeds trajectories in full.
    """
    steps = probe_steps(context.num_steps, probes)
    if not steps:  # a single evaluation: there is nothing to reuse
        return torch.ones(context.num_steps, dtype=torch.float64)
    length = max(1, context.config.calibration.batch_size - 1)
    parts = [steps[i : i + length] for i in range(0, len(steps), length)]
    logs = [_log_weights(context, parts, seed) for seed in context.seeds()[:seeds]]
    return interpolate_log(steps, torch.stack(logs).mean(0).exp(), context.num_steps)


def _log_weights(context: Context, parts: list[list[int]], seed: int) -> Tensor:
    """Logarithm of every probe's weight for one noise: [P]."""
    effect, change = (torch.cat(values) for values in zip(*(_probe(context, p, seed) for p in parts), strict=True))
    return (effect / change.clamp(min=FLOOR)).clamp(min=FLOOR).log()


def probe_steps(num_steps: int, probes: int) -> list[int]:
    """Evenly spaced steps of 1 … T - 1, both ends included."""
    if num_steps < 2:
        return []
    return sorted(set(torch.linspace(1, num_steps - 1, min(probes, num_steps - 1)).round().long().tolist()))


def interpolate_log(steps: list[int], values: Tensor, num_steps: int) -> Tensor:
    """[T] through positive values [P] at rising steps, linear in their logarithms, constant beyond the ends."""
    known, place = torch.tensor(steps, dtype=torch.float64), torch.arange(num_steps, dtype=torch.float64)
    right = torch.searchsorted(known, place).clamp(1, max(1, len(steps) - 1)) if len(steps) > 1 else None
    logs = values.double().clamp(min=FLOOR).log()
    if right is None:
        return logs.exp().expand(num_steps).clone()
    share = ((place - known[right - 1]) / (known[right] - known[right - 1])).clamp(0.0, 1.0)
    return torch.lerp(logs[right - 1], logs[right], share).exp()


def _probe(context: Context, steps: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Squared changes of the sample and of the feature, one per probed step: [P] both."""
    adapter, rows = context.adapter, len(steps) + 1
    cache = FeatureCache(uniform_schedule(context.num_steps, 1), channel_dim=adapter.channel_dim)
    before: dict[Hashable, Tensor] = {}
    change = torch.zeros(len(steps), dtype=torch.float64)

    def step(call: Call) -> Tensor:
        """In full; the row whose turn it is takes the feature of the step before."""
        place = torch.arange(len(call.x)) % rows  # of a row within its half of a guided batch
        begun = sum(at <= cache.step for at in steps)
        alive = (place <= begun).nonzero()[:, 0]  # the others are still what the first row is
        part = call.rows(alive)
        output, feature = adapter.full(part.x, part.timestep, **part.kwargs)
        first = (place[alive] == 0).to(feature.device)
        if cache.step in steps:
            mine, reused = (place[alive] == begun).to(feature.device), before[call.context]
            change[begun - 1] += float((feature[mine] - reused).double().square().sum())
            own = part.rows(mine.nonzero()[:, 0])
            output = output.clone()
            output[mine] = adapter.cached(own.x, own.timestep, None, reused, None, **own.kwargs)
        before[call.context] = feature[first]
        whole = output[first].repeat_interleave(rows, 0)  # [halves · rows, C, H, W]
        whole[alive.to(whole.device)] = output
        return whole

    images = torch.cat(list(context.run(step, cache, [seed] * rows, "1 effects", rows)))  # [P + 1, C, H, W]
    return (images[1:] - images[0]).double().square().flatten(1).sum(1), change
