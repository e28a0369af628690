"""What an error of each layer's output does to the sample, measured by backward passes. Ours, not in the paper."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cachequant.cache.feature_cache import FeatureCache
from cachequant.pipeline.calibrate import sampler_sigmas
from cachequant.pipeline.walk import Walk

ROWS, STRIDE = 4, 3
"""Samples that are looked at, and every which cached step."""


def output_gains(walk: Walk, names: list[str]) -> dict[str, Tensor]:
    """E‖Σ_t w_t ∂ε_t/∂y_c‖² of every output channel c of the named layers: [O] each.

    With independent errors of mean square e_c at every pixel of y_c, Σ_c gain_c·e_c is the mean squared move of the sample:
    a Gauss-Newton approximation, block-diagonal as in K-FAC (Martens and Grosse, ICML 2015), with w_t the move of the sample
    by an error of the prediction at step t (`SamplerGains`). A refresh reaches the steps that reuse its feature too, so
    that a group of steps is differentiated as a whole, along one random direction. A cached step that is looked at stands
    for its neighbours: what it reads of the refresh counts as often in the sum, its own layers' errors, which are others
    at each of them, in the squares.
    """
    weights, adapter, schedule = _moves(walk).tolist(), walk.context.adapter, walk.schedule
    gains: dict[str, Tensor] = {}
    cache, random = replace(walk.fresh_cache(), bits=None), torch.Generator().manual_seed(0)  # rounding has no slope
    borders = [*schedule.refresh_steps, schedule.num_steps]
    with torch.enable_grad(), _differentiable(adapter.denoiser), _outputs(adapter.denoiser, names) as seen:
        for first, end in tqdm(
            itertools.pairwise(borders), total=len(borders) - 1, desc="4 gains", unit="group", leave=False, disable=None
        ):
            seen.clear()
            cache.step = first
            output = walk.evaluate(walk.call(first, ROWS), cache)
            direction = torch.randint(0, 2, output.shape, generator=random).to(output) * 2 - 1
            total, stands_for = (output * direction).sum() * weights[first], [1] * len(seen)
            for step in range(first + 1, end, STRIDE):
                cache.step, steps = step, min(STRIDE, end - step)
                output = walk.evaluate(walk.call(step, ROWS), cache)
                total = total + (output * direction).sum() * (steps * weights[step])
                stands_for += [steps] * (len(seen) - len(stands_for))
            _add(gains, seen, stands_for, total, len(output))
            _forget_graph(cache)
    return gains


def _add(
    gains: dict[str, Tensor], seen: list[tuple[str, int, Tensor]], stands_for: list[int], total: Tensor, count: int
) -> None:
    """Squared derivatives of a group's total by the outputs [b, ..., O, ...] that were seen, summed per channel.

    Each output stands for that many steps, whose n·w·∂ε is squared to n²: n steps with errors of their own make n of them.
    `count` samples went into the total, in one batch or several.
    """
    found = torch.autograd.grad(total, [output for _, _, output in seen], allow_unused=True)
    for (name, dim, _), steps, gradient in zip(seen, stands_for, found, strict=True):
        if gradient is not None:
            square = gradient.square().movedim(dim, 0).flatten(1).sum(1) / (count * steps)  # [O]
            gains[name] = gains[name] + square if name in gains else square


def _moves(walk: Walk) -> Tensor:
    """w_t = (σ_t - σ_{t+1})·√(v / (σ_{t+1}² + v)) of every step, see `SamplerGains`: [T] float64."""
    sigma = sampler_sigmas(walk.context)
    variance = float(walk.calibration.inputs[-1].x.float().var())
    return (sigma[:-1] - sigma[1:]) * (variance / (sigma[1:].square() + variance)).sqrt()


def _forget_graph(cache: FeatureCache) -> None:
    """What is remembered of this group is a number to the next one."""
    cache.features[:] = [feature.detach() for feature in cache.readable]


@contextmanager
def _differentiable(network: nn.Module) -> Iterator[None]:
    """Inside, everything depends on parameters that have a gradient, so that every output has one."""
    before = [p.requires_grad for p in network.parameters()]
    network.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, needed in zip(network.parameters(), before, strict=True):
            parameter.requires_grad_(needed)


@contextmanager
def _outputs(network: nn.Module, names: list[str]) -> Iterator[list[tuple[str, int, Tensor]]]:
    """(name, channel dimension, output) of every call of the named layers, as they come."""
    seen: list[tuple[str, int, Tensor]] = []

    def keep(name: str, dim: int) -> Callable[..., None]:
        return lambda _, __, output: seen.append((name, dim, output))

    layers = {name: network.get_submodule(name) for name in names}
    handles = [
        layer.register_forward_hook(keep(name, 1 if isinstance(layer, nn.Conv2d) else -1))
        for name, layer in layers.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
