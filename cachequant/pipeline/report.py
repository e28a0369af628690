"""One page about a plan: what it does, what it costs, and how close it comes, measured by drawing from it here and now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cachequant.errors import UserError
from cachequant.evaluation.errors import relative_errors
from cachequant.evaluation.features import extract_features, load_feature_network
from cachequant.evaluation.paired import WINDOW, feature_distance, psnr, ssim
from cachequant.evaluation.rows import FULL, Row
from cachequant.models.cost import float_bytes, plan_bytes, run_macs
from cachequant.models.loading import load_pipeline
from cachequant.pipeline.context import Context
from cachequant.pipeline.first_calls import evaluation_macs
from cachequant.pipeline.report_page import PageContent, write_plan_page
from cachequant.pipeline.sample import Samples, draw
from cachequant.pipeline.stages import Stages
from cachequant.pipeline.store import StageStore
from cachequant.plan import Plan
from cachequant.types import Correction

OTHERS = 3
"""Plans of a run that are drawn beside the newest one, at most."""


@dataclass(frozen=True)
class Subject:
    """What a report is about.

    Attributes:
        plans: name -> plan, the newest first; the others belong to the same model, sampler and guidance.
        stages: the folder of the stages' outputs, where there is one.
    """

    plans: dict[str, Plan]
    stages: Path | None

    @staticmethod
    def at(folder: Path) -> Subject:
        """A plan folder, or the folder of a run or of the demo, with its plans.

        Raises:
            UserError: there is no plan, or a damaged one.
        """
        if (folder / "plan.json").is_file():
            found = [folder]
        else:
            found = sorted(folder.glob("plan*/"), key=lambda p: _written(p / "plan.json"), reverse=True)
            found = [path for path in found if (path / "plan.json").is_file()]
        if not found:
            raise UserError(
                f"no plan in {folder}: expected a plan folder, or one of `cachequant run` with plan-* in it"
            )
        newest = Plan.load(found[0])
        plans = {name_of(newest): newest}
        for path in found[1:]:
            plan = Plan.load(path)
            same = (plan.identity, plan.timesteps, plan.config.sampler) == (
                newest.identity, newest.timesteps, newest.config.sampler,
            )  # fmt: skip
            if same and len(plans) <= OTHERS:
                options = (name_of(plan), f"{name_of(plan)} n{plan.schedule.interval}", path.name)
                plans[next(name for name in options if name not in plans)] = plan
        places = (folder, folder / "stages", folder.parent)
        return Subject(plans, next((place for place in places if any(place.glob("1_calibrate-*"))), None))


def write_plan_report(folder: Path, out: Path, count: int = 6, device: str = "auto") -> list[Row]:
    """Draw a few images with each part of a plan and without, and write the page.

    Args:
        folder: of `Subject.at`.
        out: the HTML file.
        count: images of each row, from the same noise.
        device: of `load_pipeline`.

    Raises:
        UserError: no plan, its model is another now or cannot be had, or the file cannot be written.
    """
    subject = Subject.at(folder)
    name, plan = next(iter(subject.plans.items()))
    pipe = load_pipeline(plan.config.model, device)
    drawn = {row: (used, *_draw(pipe, used or plan, used, row, count)) for row, used in _rows_of(subject).items()}
    _, context, exact = drawn[FULL]
    measure = _measurer(context, exact)
    rows = [measure(row, used, samples) for row, (used, _, samples) in drawn.items()]
    samples = {row: made for row, (_, _, made) in drawn.items()}
    costs, curves = _stage_outputs(context, subject.stages)
    content = PageContent(name, subject.plans, rows, samples, costs, curves, pipe)
    write_plan_page(content, out)
    return rows


def _rows_of(subject: Subject) -> dict[str, Plan | None]:
    """Row -> what accelerates it: nothing, the newest plan in its parts, and the other plans."""
    return {FULL: None, **parts_of(next(iter(subject.plans.values()))), **subject.plans}


def parts_of(plan: Plan) -> dict[str, Plan]:
    """A plan without this or that: row -> what is left of it."""
    rows = {}
    if plan.quant is not None and plan.schedule.full_step_share < 1:
        rows["cache alone"] = replace(plan, quant=None, correction=Correction())
        rows["cache corrected"] = replace(plan, quant=None, correction=Correction(cache=plan.correction.cache))
    rows["uncorrected"] = replace(plan, correction=Correction())
    return rows


def _draw(pipe: Any, plan: Plan, used: Plan | None, row: str, count: int) -> tuple[Context, Samples]:
    """Images and trajectories of a row, from the first seeds of the plan's stage 6."""
    settings = replace(plan.config.sample, count=count, batch_size=count)  # one batch: its trajectory is kept
    context = Context.of(pipe, replace(plan.config, sample=settings))
    plan.identity.refuse_other(context.identity)
    seeds = list(range(settings.seed, settings.seed + count))
    return context, draw(context, used, seeds, row, record=True)


def _measurer(context: Context, exact: Samples) -> Callable[[str, Plan | None, Samples], Row]:
    """Numbers of a row against the untouched model's images of the same noise."""
    full_macs, cached_macs = evaluation_macs(context)
    total = float_bytes(context.adapter.denoiser)

    def measure(name: str, plan: Plan | None, samples: Samples) -> Row:
        """One row."""
        pair, full = (samples.images, exact.images), plan is None
        return Row(
            name,
            feature_distance=0.0 if full else _feature_distance(*pair),
            psnr=None if full else float(psnr(*pair, 1.0).mean()),
            ssim=float(ssim(*pair, 1.0).mean()) if min(exact.images.shape[-2:]) >= WINDOW else None,
            full_step_share=plan.schedule.full_step_share if plan else 1.0,
            macs=run_macs(full_macs, cached_macs, plan, context.num_steps),
            bytes=plan_bytes(total, plan) if plan else total,
            seconds=samples.seconds,
        )

    return measure


def _feature_distance(images: Tensor, exact: Tensor) -> float | None:
    """Over the miniature's own classifier, for images that it was made for; None for others."""
    if tuple(images.shape[1:]) != (1, 32, 32):
        return None
    network = load_feature_network()
    return float(feature_distance(*(extract_features(network, x * 2 - 1) for x in (images, exact))).mean())


def _stage_outputs(context: Context, folder: Path | None) -> tuple[Tensor | None, dict[str, dict[int, float]]]:
    """Of the stages' folder, what calibration found: each step's feature against the step before, and errors by step.

    Nothing is computed again: what is not there for this very plan is left out of the page, which says so.
    """
    if folder is None:
        return None, {}
    stages = Stages(context, StageStore(folder, frozenset(), quiet=True))
    try:
        (calibration, _), (moments, _) = stages.calibration(), stages.moments()
    except UserError:
        return None, {}
    costs = calibration.neighbour if calibration.band.shape[1] > 1 else None
    if not moments:
        return costs, {}
    before, after = relative_errors(moments, context.config.correction.ridge)
    return costs, {"reused as it is": before, "corrected": after}


def name_of(plan: Plan) -> str:
    """What a plan is called in tables: its method, ours being "cachequant"."""
    method = Path(plan.config.method).stem
    return "cachequant" if method == "best" else method


def _written(path: Path) -> float:
    return path.stat().st_mtime if path.is_file() else 0.0
