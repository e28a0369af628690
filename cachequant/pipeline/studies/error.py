"""How errors accumulate: what each step adds where full precision goes, and what the accelerated model meets on its own way.

*Local* (teacher-forced): x_t follows full precision, the accelerated network is asked beside it; this is what the paper's
corrections are fitted on (CacheQuant section 3.3). *Free-running*: x_t follows the accelerated model, and full precision is
asked at the same x_t. The sampler alone would carry local errors on as DDIM does, x̄ = x / √ᾱ moving by (σ' - σ)·δε (Song
et al. 2021, equation 13); what the real path differs by beyond that is feedback through the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cachequant.errors import UserError
from cachequant.evaluation.errors import path_error
from cachequant.evaluation.plots import curve_figure
from cachequant.pipeline.calibrate import sampler_sigmas
from cachequant.pipeline.context import Context
from cachequant.pipeline.hook import Call
from cachequant.pipeline.report import name_of, parts_of
from cachequant.pipeline.step import accelerated_step, cache_of
from cachequant.pipeline.studies.findings import Findings, Table
from cachequant.pipeline.studies.subject import StudySubject
from cachequant.plan import Plan
from cachequant.quant.convert import install
from cachequant.quant.layers import Mode
from cachequant.types import QuantState


@dataclass(frozen=True)
class Path:
    """Trajectories with both predictions at each of their points, batch after batch and in each its guidance contexts.

    Attributes:
        x: [T, n, C, H, W] x_t.
        exact: [T, n, C, H, W] prediction of full precision there.
        made: [T, n, C, H, W] of the accelerated network there.
    """

    x: Tensor
    exact: Tensor
    made: Tensor

    def local_error(self) -> Tensor:
        """‖made - exact‖ / ‖exact‖ at each step: [T]."""
        return path_error(self.made, self.exact)


@torch.no_grad()
def follow(context: Context, plan: Plan, seeds: list[int], free_running: bool) -> Path:
    """Trajectories, in the calibration's batches, that full precision leads, or with `free_running` the accelerated network.

    Integers are simulated. The accelerated network's own refreshes fill its cache in both cases.
    """
    adapter = context.adapter
    cache = cache_of(plan, adapter)
    handle = install(adapter.denoiser, plan.quant or QuantState(), cache, correction=plan.correction)
    adapter.rebuild()
    accelerated = accelerated_step(adapter, cache, plan.correction)
    rows: list[tuple[list[Tensor], ...]] = [([], [], []) for _ in range(context.num_steps)]

    def step(call: Call) -> Tensor:
        """Both predictions at the same x_t; one of them moves on."""
        handle.set_mode(Mode.FLOAT)
        exact, _ = adapter.full(call.x, call.timestep, **call.kwargs)
        handle.set_mode(Mode.QUANTIZED)
        made = accelerated(call)
        for parts, value in zip(rows[cache.step], (call.x, exact, made), strict=True):
            parts.append(value.detach().cpu().float().clone())
        return made if free_running else exact

    try:
        context.trajectories(step, cache, seeds, "free-running" if free_running else "local")
    finally:
        handle.remove()
        adapter.rebuild()
    x, exact, made = (torch.stack([torch.cat(parts[i]) for parts in rows]) for i in range(3))
    return Path(x, exact, made)


def added_up(context: Context, errors: Tensor) -> Tensor:
    """Error of x_t that the sampler makes of prediction errors without feedback: [T, n, C, H, W] of the same shape.

    δx_t = √ᾱ_t·Σ_{j<t} (σ_{j+1} - σ_j)·δε_j for DDIM with η = 0; it holds exactly for errors along the accelerated path.
    """
    sigma = sampler_sigmas(context)  # [T + 1]
    moves = (sigma[1:] - sigma[:-1]).view(-1, *[1] * (errors.dim() - 1))  # σ falls, so a positive error lowers x̄
    carried = (moves * errors.double()).cumsum(0)
    carried = torch.cat([torch.zeros_like(carried[:1]), carried[:-1]])  # what came before each step
    scale = (1 + sigma[:-1].square()).rsqrt().view(moves.shape)  # √ᾱ
    return carried * scale


def is_plain_ddim(context: Context) -> bool:
    """Whether `added_up` holds: DDIM of a noise prediction, without guidance, noise or clipping."""
    config = context.pipe.scheduler.config
    return (
        "DDIM" in type(context.pipe.scheduler).__name__
        and getattr(config, "prediction_type", "epsilon") == "epsilon"
        and not getattr(config, "clip_sample", False)
        and not getattr(config, "thresholding", False)
        and context.config.sampler.eta == 0
        and context.identity.guidance == "none"
    )


def study(subject: StudySubject, count: int) -> Findings:
    """Local and free-running errors of the plan and its parts, on `count` samples.

    Raises:
        UserError: the plan has neither cached steps nor quantised layers.
    """
    context, plan, seeds = subject.context, subject.plan(), subject.judging(count)[1]
    if plan.quant is None and plan.schedule.full_step_share == 1:
        raise UserError("this plan neither caches nor quantises, so that it has no error: set cache.interval above 1")
    rows = {**parts_of(plan), name_of(plan): plan}
    curves = {name: _curves(context, row, seeds) for name, row in rows.items()}
    return _findings(subject, curves, count)


def _curves(context: Context, plan: Plan, seeds: list[int]) -> dict[str, Tensor]:
    """Errors [T] by kind."""
    local, free = follow(context, plan, seeds, False), follow(context, plan, seeds, True)
    found = {"local": local.local_error(), "own path": free.local_error(), "x_t": path_error(free.x, local.x)}
    if is_plain_ddim(context):
        sum_of_local = added_up(context, local.made - local.exact)
        found["x_t, local errors added up"] = path_error(local.x + sum_of_local.float(), local.x)
    return found


def _findings(subject: StudySubject, curves: dict[str, dict[str, Tensor]], count: int) -> Findings:
    columns = ["row", "local", "own path", "x_t at the end"]
    added = "x_t, local errors added up"
    has_sum = all(added in found for found in curves.values())
    if has_sum:
        columns += ["added up", "measured / added up"]
    lines = []
    for name, found in curves.items():
        last = float(found["x_t"][-1])
        texts = [f"{float(found[kind].mean()):.4f}" for kind in ("local", "own path")] + [f"{last:.4f}"]
        if has_sum:
            total = float(found[added][-1])
            texts += [f"{total:.4f}", f"{last / total:.2f}" if total > 0 else "–"]
        lines.append([name, *texts])
    label = "relative error (share of the norm)"
    figures = {
        "Local error of the prediction where full precision goes": _figure(curves, ("local",), label),
        "Error of the prediction on the accelerated model's own path": _figure(curves, ("own path",), label),
        "Accumulated error of the sample on its path": _figure(curves, ("x_t",), label),
    }
    if has_sum:
        whole = list(curves)[-1]
        ends = {name: curves[name] for name in ("uncorrected", whole)}
        caption = f"Measured error of the sample and its local errors added up, uncorrected and of {whole}"
        figures[caption] = _figure(ends, ("x_t", added), label)
    notes = [
        ("What was measured", f"{count} samples of noise that no calibration has seen. At every step both networks predict "
         "from the same x_t: local where full precision leads, on its own path where the accelerated model leads."),
        ("How to read it", "Relative errors: of the prediction, averaged over the steps, and of the sample. “added up” is "
         "what the sampler alone makes of the local errors. If errors only added up, the ratio would be 1. Below 1 the "
         "network pulls a drifted sample back, or errors of different steps cancel on the way; above 1 drift feeds on "
         "itself."),
    ]  # fmt: skip
    numbers: dict[str, Any] = {
        "rows": {name: {kind: error.tolist() for kind, error in found.items()} for name, found in curves.items()}
    }
    config = subject.context.config
    title = f"Error accumulation: {config.model.name}, N = {config.cache.interval}, {config.method}"
    return Findings(title, notes, [Table("Errors", tuple(columns), lines)], figures, numbers)


def _figure(curves: dict[str, dict[str, Tensor]], kinds: tuple[str, ...], label: str) -> Any:
    named = {
        name if len(kinds) == 1 else f"{name}: {kind}": dict(enumerate(found[kind].tolist()))
        for name, found in curves.items()
        for kind in kinds
    }
    return curve_figure(named, label)
