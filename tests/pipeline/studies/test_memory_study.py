"""Formats and sample counts: exact where nothing is lost, and judged on the reference alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cachequant.cache.feature_cache import HeldFeature
from cachequant.config import RunConfig
from cachequant.errors import UserError
from cachequant.pipeline.context import Context
from cachequant.pipeline.sample import draw
from cachequant.pipeline.stages import Stages
from cachequant.pipeline.studies.memory import (
    FEATURE_FORMATS,
    Collected,
    Format,
    collect,
    excess,
    held_images,
    regret,
    study,
)
from cachequant.pipeline.studies.subject import StudySubject
from cachequant.types import Correction

Configure = Callable[..., RunConfig]


def subject_of(pipe: Any, config: RunConfig, folder: Path) -> StudySubject:
    return StudySubject(Stages.at(Context.of(pipe, config), folder, quiet=True), None, folder)


def test_a_sketch_of_everything_and_float32_see_the_same_and_regret_nothing(pipe: Any, configure: Configure) -> None:
    context = Context.of(pipe, configure())
    found = collect(context, [1, 2], {"float32": FEATURE_FORMATS["float32"], "all": Format(4.0, share=1.0)})
    for cost in ("l1", "l2"):
        assert torch.equal(found.bands["float32", cost], found.bands["all", cost])
        assert regret(context, found.bands["all", cost], found.bands["float32", cost]) == 0.0
    assert excess(found.moments["all"], found.moments["float32"]) == pytest.approx(0.0, abs=1e-12)


def test_parts_add_up_to_the_whole(pipe: Any, configure: Configure) -> None:
    context, formats = Context.of(pipe, configure()), {"float32": FEATURE_FORMATS["float32"]}
    whole = collect(context, [1, 2, 3], formats)
    parts = Collected().add(collect(context, [1], formats)).add(collect(context, [2, 3], formats))
    for key, band in whole.bands.items():
        torch.testing.assert_close(parts.bands[key], band, rtol=1e-4, atol=1e-6)
    for step, sums in whole.moments["float32"].items():
        torch.testing.assert_close(parts.moments["float32"][step].gram, sums.gram, rtol=1e-4, atol=1e-4)


def test_trajectories_are_drawn_in_the_calibrations_batches(pipe: Any, configure: Configure) -> None:
    sizes = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    formats = {name: FEATURE_FORMATS[name] for name in ("float32", "int8")}
    found = [collect(Context.of(pipe, configure(f"calibration.batch_size={n}")), [1, 2, 3], formats) for n in (2, 4)]
    assert sizes == [2] * 6 + [1] * 6 + [3] * 6
    for key, band in found[1].bands.items():
        torch.testing.assert_close(found[0].bands[key], band, rtol=1e-4, atol=1e-6)


def test_int8_is_the_products_own(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    config = configure("quant.enabled=false", "cache.feature_bits=8")
    subject = subject_of(pipe, config, tmp_path)
    plan, (context, seeds) = replace(subject.plan(), correction=Correction()), subject.judging(2)
    made = held_images(context, plan.schedule, plan.correction, FEATURE_FORMATS["int8"], seeds)
    assert torch.equal(made, draw(context, plan, seeds, "test").images)
    stored = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(FEATURE_FORMATS["int8"].held(stored, 1), HeldFeature.of(stored, 1).feature())


def test_regret_and_excess_are_never_negative(pipe: Any, configure: Configure) -> None:
    context = Context.of(pipe, configure())
    reference = collect(context, [7, 8, 9, 10], {"float32": FEATURE_FORMATS["float32"]})
    found = collect(context, [1], FEATURE_FORMATS)
    for name in FEATURE_FORMATS:
        for cost in ("l1", "l2"):
            assert regret(context, found.bands[name, cost], reference.bands["float32", cost]) >= -1e-12
        assert excess(found.moments[name], reference.moments["float32"]) >= -1e-9
    coarse, fine = (excess(found.moments[n], reference.moments["float32"]) for n in ("sketch 1/64", "float32"))
    assert coarse > fine


@pytest.mark.parametrize("channel_dim", [1, 2])
def test_a_sketch_keeps_the_same_share_of_positions_of_every_channel(channel_dim: int) -> None:
    feature = torch.arange(2 * 3 * 16.0).reshape(2, 3, 16)
    shaped = feature.reshape(2, 3, 4, 4) if channel_dim == 1 else feature.transpose(1, 2)
    seen = Format(1.0, share=1 / 4).seen(shaped, channel_dim)
    assert seen.shape == (2, 3, 4)
    positions = seen[0, 0]
    assert torch.equal(seen, torch.stack([feature[b][:, positions.long()] for b in range(2)]))
    assert torch.equal(Format(1.0, share=1 / 4).seen(shaped + 1, channel_dim), seen + 1)


def test_a_cache_held_in_full_gives_the_plans_images_and_a_coarse_one_does_not(
    pipe: Any, configure: Configure, tmp_path: Path
) -> None:
    config = configure("quant.enabled=false", "correction.output=none")
    subject = subject_of(pipe, config, tmp_path)
    plan, (context, seeds) = subject.plan(), subject.judging(2)
    expected = draw(context, plan, seeds, "test").images
    gaps = {}
    for name in ("float32", "float16", "int8", "int4"):
        made = held_images(context, plan.schedule, plan.correction, FEATURE_FORMATS[name], seeds)
        gaps[name] = float((made - expected).abs().max())
    assert gaps["float32"] == 0.0 < gaps["float16"] < gaps["int8"] < gaps["int4"]


def test_the_study_tells_bytes_and_regret_of_every_format_and_count(
    pipe: Any, configure: Configure, tmp_path: Path
) -> None:
    found = study(subject_of(pipe, configure("quant.enabled=false"), tmp_path), 3)
    assert list(found.numbers["formats"]) == list(FEATURE_FORMATS) and list(found.numbers["samples"]) == ["1", "2", "4"]
    assert found.numbers["feature_values"] == 8 * 16 * 16  # the site's channels and map
    formats = found.numbers["formats"]
    assert formats["float32"]["psnr"] is not None and formats["sketch 1/4"]["psnr"] is None
    ring = float(found.tables[0].lines[0][2])
    assert ring == pytest.approx(3 * 8 * 16 * 16 * 4 / 1e6, abs=0.005)


def test_nothing_cached_is_nothing_to_study(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cache\.interval is 1"):
        study(subject_of(pipe, configure("cache.interval=1"), tmp_path), 2)
