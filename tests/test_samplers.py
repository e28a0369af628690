"""diffusers' schedulers, set up as our families set them up, walk the original samplers' paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cachequant.models.families import latent_scheduler, pixel_scheduler, plms_scheduler
from cachequant.models.schedulers import SpacedDDIMScheduler


@pytest.fixture
def folder(golden_folder: Path) -> Path:
    """Paths of the original samplers with a toy noise model."""
    return golden_folder / "method_samplers"


@pytest.fixture
def record(folder: Path) -> dict[str, Any]:
    """What the cases are."""
    return json.loads((folder / "case.json").read_text())


def toy_noise(x: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
    """The noise model that the reference paths were made with."""
    noise = 0.1 * x + 0.01 * float(timestep) / 1000
    return noise if condition is None else noise + 0.05 * condition[:, None, None, None]


def guided_noise(x: Tensor, timestep: Tensor, flat: dict[str, Tensor], case: dict[str, Any]) -> Tensor:
    """ε_u + s·(ε_c − ε_u), from one doubled batch with the unconditional half first."""
    scale, name = case["cfg_scale"], f"case{case['id']}"
    if scale is None:
        return toy_noise(x, timestep)
    conditions = torch.cat([flat[f"{name}_uncond"], flat[f"{name}_cond"]])
    unconditional, conditional = toy_noise(torch.cat([x, x]), timestep, conditions).chunk(2)
    return unconditional + scale * (conditional - unconditional)


@pytest.mark.parametrize("number", range(6))
def test_the_path_and_its_timesteps_are_the_originals(folder: Path, record: dict[str, Any], number: int) -> None:
    case, flat = record["cases"][number], load_file(folder / "case.safetensors")
    make = plms_scheduler if case["sampler"] == "plms" else latent_scheduler
    scheduler = make(beta_start=case["linear_start"], beta_end=case["linear_end"], num_train_timesteps=1000)
    scheduler.set_timesteps(case["steps"])
    assert scheduler.timesteps.tolist() == flat[f"case{number}_timesteps"].tolist()
    assert len(scheduler.timesteps) == case["n_evals"]
    x, path = flat[f"case{number}_xT"], []
    for timestep in scheduler.timesteps:
        path.append(x[0])
        x = scheduler.step(guided_noise(x, timestep, flat, case), timestep, x).prev_sample
    expected = flat[f"case{number}_x_at_evals_sample0"]
    final = flat[f"case{number}_x_final"]
    assert (torch.stack(path) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (x - final).abs().max() <= 1e-5 * final.abs().max()


@pytest.mark.parametrize("number", [0, 1])
def test_the_pixel_paths_are_the_originals(folder: Path, record: dict[str, Any], number: int) -> None:
    """Quadratic and uniform timesteps; every evaluation, also the repeated ones at the clean end."""
    case, flat = record["cases"][6 + number], load_file(folder / "case.safetensors")
    name = case["id"]
    scheduler = SpacedDDIMScheduler(clip_sample=False) if case["skip_type"] == "uniform" else pixel_scheduler()
    scheduler.set_timesteps(case["steps"])
    assert scheduler.timesteps.tolist() == flat[f"{name}_timesteps"].long().tolist()
    assert len(set(scheduler.timesteps.tolist())) == case["n_distinct"]
    x, path = flat[f"{name}_xT"], []
    for timestep in scheduler.timesteps:
        path.append(x[0])
        moved = scheduler.step(toy_noise(x, timestep), timestep, x)
        x = moved.prev_sample
    expected = flat[f"{name}_x_all_sample0"]
    assert (torch.stack([*path, x[0]]) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (x - flat[f"{name}_x_final"]).abs().max() <= 1e-5 * flat[f"{name}_x_final"].abs().max()
    clean = flat[f"{name}_x0_last"]
    assert (moved.pred_original_sample - clean).abs().max() <= 1e-5 * clean.abs().max()


@pytest.mark.parametrize("steps", [20, 30, 50, 100, 250, 300])
def test_timestep_tables(record: dict[str, Any], steps: int) -> None:
    """Where the steps do not divide 1000 the original takes more than were asked for (31 for 30; for 300 it reaches
    timestep 1000, which does not exist). diffusers takes as many as asked, the same ones from the clean end."""
    original = record["timestep_tables"][f"uniform_{steps}"]
    scheduler = latent_scheduler()
    scheduler.set_timesteps(steps)
    ours = scheduler.timesteps.flip(0).tolist()
    assert len(ours) == steps
    assert ours == original[:steps]
    assert (len(original) == steps) == (1000 % steps == 0)
