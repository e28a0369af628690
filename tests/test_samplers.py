"""diffusers' schedulers, set up as our configurations set them up, walk the original samplers' paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from safetensors.torch import load_file
from torch import Tensor


def scheduler_of(case: dict[str, Any]) -> Any:
    """Uniform timesteps with the original's offset of one; its last step ends at ᾱ₀, not at 1."""
    shared = {
        "num_train_timesteps": 1000,
        "beta_start": case["linear_start"],
        "beta_end": case["linear_end"],
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "set_alpha_to_one": False,
    }
    if case["sampler"] == "plms":
        return PNDMScheduler(skip_prk_steps=True, **shared)
    return DDIMScheduler(clip_sample=False, **shared)


def toy_noise(x: Tensor, timestep: Tensor) -> Tensor:
    """The noise model that the reference paths were made with."""
    return 0.1 * x + 0.01 * float(timestep) / 1000


@pytest.mark.parametrize("number", [0, 1, 2, 4])
def test_the_path_and_its_timesteps_are_the_originals(golden_folder: Path, number: int) -> None:
    folder = golden_folder / "method_samplers"
    case = json.loads((folder / "case.json").read_text())["cases"][number]
    flat = load_file(folder / "case.safetensors")
    scheduler = scheduler_of(case)
    scheduler.set_timesteps(case["steps"])
    assert scheduler.timesteps.tolist() == flat[f"case{number}_timesteps"].tolist()
    assert len(scheduler.timesteps) == case["n_evals"]
    x, path = flat[f"case{number}_xT"], []
    for timestep in scheduler.timesteps:
        path.append(x[0])
        x = scheduler.step(toy_noise(x, timestep), timestep, x).prev_sample
    expected = flat[f"case{number}_x_at_evals_sample0"]
    final = flat[f"case{number}_x_final"]
    assert (torch.stack(path) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (x - final).abs().max() <= 1e-5 * final.abs().max()
