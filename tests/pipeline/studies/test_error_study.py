"""Error accumulation: nothing where nothing is accelerated, and the sampler's own recursion where something is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cachequant.config import RunConfig
from cachequant.errors import UserError
from cachequant.evaluation.errors import path_error
from cachequant.pipeline.context import JUDGING, Context
from cachequant.pipeline.stages import Stages
from cachequant.pipeline.studies.error import added_up, follow, is_plain_ddim, study
from cachequant.pipeline.studies.subject import StudySubject

Configure = Callable[..., RunConfig]


def subject_of(pipe: Any, config: RunConfig, folder: Path) -> StudySubject:
    return StudySubject(Stages.at(Context.of(pipe, config), folder, quiet=True), None, folder)


def test_the_path_error_is_the_samplers_sum_of_the_errors_on_the_way(
    pipe: Any, configure: Configure, tmp_path: Path
) -> None:
    """δx̄ moves by (σ' - σ)·δε: exact for DDIM with δε between the two paths' predictions."""
    subject = subject_of(pipe, configure("method=naive", "cache.interval=3"), tmp_path)
    context, plan, seeds = subject.context, subject.plan(), [1, 2, 3]
    local, free = follow(context, plan, seeds, False), follow(context, plan, seeds, True)
    assert is_plain_ddim(context)
    expected = added_up(context, free.made - local.exact)
    assert torch.allclose(free.x - local.x, expected.float(), atol=2e-4)
    assert not (free.x[0] - local.x[0]).any() and (free.x[-1] - local.x[-1]).abs().max() > 0.01
    assert torch.equal(free.x[:2], local.x[:2]) == bool((free.made[0] == local.exact[0]).all())


def test_trajectories_are_drawn_in_the_calibrations_batches(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    subject = subject_of(pipe, configure("method=paper", "backend=simulated"), tmp_path)
    context, plan, sizes = subject.context, subject.plan(), []
    pipe.unet.conv_in.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    parts = follow(context, plan, [5, 6, 7], True)
    assert sorted(set(sizes)) == [1, 2] and parts.x.shape[1] == 3
    alone = [follow(context, plan, [seed], True) for seed in (5, 6, 7)]
    torch.testing.assert_close(parts.x, torch.cat([path.x for path in alone], 1), rtol=0, atol=1e-4)


def test_the_two_paths_are_those_of_the_pipeline(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    from cachequant.pipeline.sample import draw

    subject = subject_of(pipe, configure("method=paper", "backend=simulated"), tmp_path)
    context, plan, seeds = subject.context, subject.plan(), [5, 6]
    for free, used in ((False, None), (True, plan)):
        drawn = draw(context, used, seeds, "test", record=True).trajectory
        assert drawn is not None
        assert torch.allclose(follow(context, plan, seeds, free).x, drawn, atol=1e-5)


def test_refreshes_without_quantisation_add_nothing_where_full_precision_goes(
    pipe: Any, configure: Configure, tmp_path: Path
) -> None:
    subject = subject_of(pipe, configure("method=naive", "quant.enabled=false", "cache.interval=3"), tmp_path)
    local = follow(subject.context, subject.plan(), [1, 2], False).local_error()
    assert (local[[0, 3]] == 0).all() and (local[[1, 2, 4, 5]] > 0).all()


def test_what_is_not_accelerated_has_no_error(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    config = configure("method=naive", "quant.enabled=false", "cache.interval=1")
    subject = subject_of(pipe, config, tmp_path)
    for free in (False, True):
        path = follow(subject.context, subject.plan(), [1, 2], free)
        assert torch.equal(path.made, path.exact)
    with pytest.raises(UserError, match=r"neither caches nor quantises.*cache.interval"):
        study(subject, 2)


def test_the_study_has_every_part_of_the_plan_and_leaves_the_pipeline_as_it_was(
    pipe: Any, configure: Configure, tmp_path: Path
) -> None:
    before = {name: type(module) for name, module in pipe.unet.named_modules()}
    subject = subject_of(pipe, configure(), tmp_path)
    found = study(subject, 3)
    rows = found.numbers["rows"]
    assert list(rows) == ["cache alone", "cache corrected", "uncorrected", "cachequant"]
    context, plan = subject.context, subject.plan()
    seeds = context.seeds(JUDGING, 3)
    local, free = follow(context, plan, seeds, False), follow(context, plan, seeds, True)
    assert rows["cachequant"]["x_t"] == pytest.approx(path_error(free.x, local.x).tolist(), rel=1e-4)
    assert len(found.figures) == 4 and len(found.tables[0].lines) == 4
    assert {name: type(module) for name, module in pipe.unet.named_modules()} == before


def test_the_sum_is_left_out_where_it_does_not_hold(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    context = Context.of(pipe, configure())
    assert is_plain_ddim(context) and not is_plain_ddim(Context.of(pipe, configure("sampler.eta=0.5")))
    guided = replace(context.identity, guidance="cfg")
    assert not is_plain_ddim(replace(context, identity=guided))
    pipe.scheduler.register_to_config(clip_sample=True)
    found = study(subject_of(pipe, configure("quant.enabled=false"), tmp_path), 2)
    assert len(found.figures) == 3 and "added up" not in " ".join(found.tables[0].columns)
