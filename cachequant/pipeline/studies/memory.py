"""Memory against accuracy: the format in which calibration keeps features, and the number of samples that it needs.

A schedule's regret is what its objective exceeds the optimum by, both under the distances of other noise: what the format,
or the number of samples, costs by choosing other steps. The correction is judged the same way, by the error that it leaves
there beyond that of a fit on the reference itself. A sketch keeps the same random share of positions of every feature,
which leaves sums over positions unbiased up to a factor that no schedule depends on. Last, images of a cached feature that
is held in each format while sampling.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache, HeldFeature
from cachequant.correction import Moments
from cachequant.costs import rounding
from cachequant.errors import UserError
from cachequant.evaluation.paired import finite_psnr
from cachequant.evaluation.plots import points_figure
from cachequant.pipeline.context import Context
from cachequant.pipeline.hook import Call
from cachequant.pipeline.sample import draw
from cachequant.pipeline.step import accelerated_step
from cachequant.pipeline.studies.findings import Findings, Table
from cachequant.pipeline.studies.subject import StudySubject
from cachequant.schedule import (
    DistanceBand,
    best_schedule,
    group_costs,
    schedule_cost,
    uniform_schedule,
)
from cachequant.types import Correction, Schedule

DISTANCES = ("l1", "l2")
"""Distances of the schedule whose regret is told."""

Hold = Callable[[Tensor, int], Tensor]
"""(feature, its channel dimension) -> what is left of its values."""


@dataclass(frozen=True)
class Format:
    """How a feature is kept.

    Attributes:
        bytes: per value that there is.
        hold: what it makes of the values that it keeps; None leaves them as they are.
        share: of the positions that are kept.
    """

    bytes: float
    hold: Hold | None = None
    share: float = 1.0

    def seen(self, feature: Tensor, channel_dim: int) -> Tensor:
        """The positions that are kept, the same ones each time: [B, C, k] of [B, C, …] or [B, tokens, C]."""
        rows = feature.movedim(channel_dim, 1).flatten(2)  # [B, C, m]
        if self.share == 1.0:
            return rows
        count = max(1, round(self.share * rows.shape[2]))
        chosen = torch.randperm(rows.shape[2], generator=torch.Generator().manual_seed(0))[:count]
        return rows[:, :, chosen.to(rows.device)]

    def held(self, feature: Tensor, channel_dim: int) -> Tensor:
        """What is left of the values that are kept."""
        return feature if self.hold is None else self.hold(feature, channel_dim)


def _held_in_8_bits(feature: Tensor, channel_dim: int) -> Tensor:
    """As `cache.feature_bits: 8` holds it."""
    return HeldFeature.of(feature, channel_dim).feature()


FEATURE_FORMATS = {
    "float32": Format(4.0),
    "float16": Format(2.0, lambda x, _: x.half().to(x.dtype)),
    "int8": Format(1.0, _held_in_8_bits),
    "int4": Format(0.5, lambda x, _: rounding(4)(x)),
    "sketch 1/4": Format(1.0, share=1 / 4),
    "sketch 1/16": Format(0.25, share=1 / 16),
    "sketch 1/64": Format(0.0625, share=1 / 64),
}
"""What is compared; int8 is the product's own, with a grid for every image and channel, int4 has one grid for all values."""


@dataclass
class Collected:
    """Distances and regression sums of some trajectories, by format.

    Attributes:
        bands: (format, cost) -> [T, L].
        moments: format -> cached step of the uniform schedule -> sums of (kept feature at its refresh, feature).
    """

    bands: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    moments: dict[str, dict[int, Moments]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, other: Collected) -> Collected:
        """Both together."""
        bands = {key: band + self.bands.get(key, 0.0) for key, band in other.bands.items()}
        moments: dict[str, dict[int, Moments]] = {}
        for name, by_step in other.moments.items():
            mine = self.moments.get(name, {})
            moments[name] = {t: Moments(_sum(mine[t].gram if t in mine else None, m.gram)) for t, m in by_step.items()}
        return Collected(bands, moments)


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first if second is None else first + second


def collect(context: Context, seeds: list[int], formats: dict[str, Format]) -> Collected:
    """Full-precision trajectories of some seeds, in the calibration's batches, seen in every format at once."""
    adapter, interval, steps = context.adapter, context.config.cache.interval, context.num_steps
    schedule, cache = uniform_schedule(steps, interval), FeatureCache(uniform_schedule(steps, 1))
    bands: dict[tuple[str, str, Hashable], DistanceBand] = {}
    kept: dict[tuple[str, Hashable], Tensor] = {}
    found = Collected()

    def step(call: Call) -> Tensor:
        """In full; every format gets what it would see."""
        output, feature = adapter.full(call.x, call.timestep, **call.kwargs)
        for name, form in formats.items():
            exact = form.seen(feature, adapter.channel_dim)
            for cost in DISTANCES:
                key = (name, cost, call.context)
                if key not in bands:
                    bands[key] = DistanceBand(steps, interval, cost, partial(form.held, channel_dim=1))
                bands[key].update(exact)
            if schedule.is_refresh(cache.step):
                kept[name, call.context] = form.held(exact, 1)
            else:
                sums = found.moments[name].setdefault(cache.step, Moments())
                sums.update((kept[name, call.context],), exact)
        return output

    context.trajectories(step, cache, seeds, "memory")
    for (name, cost, _), band in bands.items():
        found.bands[name, cost] = band.values + found.bands.get((name, cost), 0.0)
    return found


def regret(context: Context, band: Tensor, reference: Tensor) -> float:
    """Relative excess of the best schedule of a band over the optimum, both under the reference band."""
    interval, groups = context.config.cache.interval, context.refreshes
    costs = group_costs(reference)
    chosen, best = (best_schedule(each, interval, None, groups) for each in (band, reference))
    return schedule_cost(costs, chosen) / schedule_cost(costs, best) - 1.0 if schedule_cost(costs, best) else 0.0


def excess(moments: dict[int, Moments], reference: dict[int, Moments]) -> float:
    """Relative excess of the error that corrections of some sums leave under the reference's, over its own fit's."""
    left = sum(float(reference[t].error(sums.solve()).sum()) for t, sums in moments.items())
    best = sum(float(sums.error(sums.solve()).sum()) for sums in reference.values())
    return left / best - 1.0 if best else 0.0


@dataclass
class HeldCache(FeatureCache):
    """A cache that keeps features in another format."""

    form: Format = FEATURE_FORMATS["float32"]

    def store(self, feature: Tensor) -> None:
        """Keep what is left of the feature."""
        super().store(self.form.held(feature, self.channel_dim))


def held_images(context: Context, schedule: Schedule, correction: Correction, form: Format, seeds: list[int]) -> Tensor:
    """Images of caching alone, the cached feature held in a format: [n, C, H, W]."""
    keep = 2 if correction.uses_forecast else 1
    cache = HeldCache(schedule, keep, context.adapter.channel_dim, form=form)
    step = accelerated_step(context.adapter, cache, correction)
    size = context.config.sample.batch_size
    return torch.cat(list(context.run(step, cache, seeds, "held", size, sampling=True)))


def study(subject: StudySubject, count: int) -> Findings:
    """Regret of formats and of sample counts under `count` other trajectories, and images of a cache held in each format.

    Raises:
        UserError: nothing is cached.
    """
    context = subject.context
    if context.config.cache.interval == 1 or context.num_steps == 1:
        raise UserError("cache.interval is 1, so that no feature is kept: nothing to study, raise it")
    judges, seeds = subject.judging(count)
    reference = collect(context, seeds, {"float32": FEATURE_FORMATS["float32"]})
    by_count: dict[int, Collected] = {}
    collected = Collected()
    for done, part in _doubling(context.seeds()):
        collected = collected.add(collect(context, part, FEATURE_FORMATS))
        by_count[done] = collected
    exact = draw(judges, None, seeds, "full").images
    plan = replace(subject.plan(), quant=None)
    held = {
        name: held_images(judges, plan.schedule, plan.correction, form, seeds)
        for name, form in FEATURE_FORMATS.items()
        if form.share == 1.0
    }
    quality = {name: float(finite_psnr(images, exact, 1.0).mean()) for name, images in held.items()}
    return _findings(context, reference, by_count, quality, count)


def _doubling(seeds: list[int]) -> list[tuple[int, list[int]]]:
    """Parts of 1, 1, 2, 4, … seeds, each with how many there are by then."""
    parts, start = [], 0
    while start < len(seeds):
        part = seeds[start : max(1, 2 * start)]
        start += len(part)
        parts.append((start, part))
    return parts


def _findings(
    context: Context, reference: Collected, by_count: dict[int, Collected], quality: dict[str, float], count: int
) -> Findings:
    most = max(by_count)
    judged = {
        n: {"excess": excess(c.moments["float32"], reference.moments["float32"])}
        | {cost: regret(context, c.bands["float32", cost], reference.bands["float32", cost]) for cost in DISTANCES}
        for n, c in by_count.items()
    }
    formats: dict[str, dict[str, Any]] = {}
    for name, form in FEATURE_FORMATS.items():
        formats[name] = {"bytes": form.bytes, "psnr": quality.get(name)}
        formats[name]["excess"] = excess(by_count[most].moments[name], reference.moments["float32"])
        for cost in DISTANCES:
            formats[name][cost] = regret(context, by_count[most].bands[name, cost], reference.bands["float32", cost])
    values, steps = _feature_values(context, by_count[most]), context.num_steps
    ring, everything = 2 * context.config.cache.interval - 1, 4 * values * steps
    lines = [
        [name, f"{form['bytes']:g}", f"{ring * values * form['bytes'] / 1e6:.2f}", *_percents(form),
         "–" if form["psnr"] is None else f"{form['psnr']:.2f}"]
        for name, form in formats.items()
    ]  # fmt: skip
    columns = (
        "format",
        "bytes a value",
        "ring MB a sample",
        "L1 regret",
        "L2 regret",
        "correction, excess",
        "PSNR dB held so",
    )
    counted = [[str(n), f"{n * everything / 1e6:.1f}", *_percents(each)] for n, each in judged.items()]
    number_columns = ("samples", "MB of all features", "L1 regret", "L2 regret", "correction, excess")
    kinds = {"l1": "L1 schedule", "l2": "L2 schedule", "excess": "correction"}
    curves = {text: [(float(n), 100 * each[kind]) for n, each in judged.items()] for kind, text in kinds.items()}
    dots = {text: [(form["bytes"], 100 * form[kind]) for form in formats.values()] for kind, text in kinds.items()}
    figures = {
        "Regret against the number of samples": points_figure(
            curves, "calibration samples", "excess over the reference (%)", joined=True, logarithmic="x"
        ),
        "Regret against bytes a value": points_figure(
            dots, "bytes a value", "excess over the reference (%)", logarithmic="x"
        ),
    }
    notes = [
        ("What was measured", "The best schedule and the correction found from features in each format, and from so many "
         f"samples in float32, judged under {count} trajectories of other noise. Formats use {most} samples. The last "
         "column holds the cached feature so while sampling, without quantisation."),
        ("Memory", f"One sample's feature has {values:,} values. The released code keeps {steps} of them for every sample; "
         f"the ring here keeps {ring} of one batch, whatever the number of samples and steps."),
    ]  # fmt: skip
    numbers = {"formats": formats, "samples": {str(n): each for n, each in judged.items()}, "feature_values": values}
    title = f"Memory against accuracy of calibration: {context.config.model.name}, N = {context.config.cache.interval}"
    tables = [Table("Formats", columns, lines), Table("Samples", number_columns, counted)]
    return Findings(title, notes, tables, figures, numbers)


def _percents(record: dict[str, Any]) -> list[str]:
    return [f"{100 * record[kind]:.2f} %" for kind in ("l1", "l2", "excess")]


def _feature_values(context: Context, collected: Collected) -> int:
    """Values of one sample's feature, from the counts of the sums."""
    gram = next(iter(collected.moments["float32"].values())).gram
    assert gram is not None
    return round(float(gram[:, -1, -1].sum()) / context.config.calibration.samples)
