"""DDIM on arbitrary timesteps against diffusers' own where both apply, and against closed forms where only ours does."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from cachequant.models.schedulers import SpacedDDIMScheduler


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("clip", [False, True])
def test_on_evenly_spaced_timesteps_it_is_diffusers_ddim(eta: float, clip: bool) -> None:
    ours, theirs = SpacedDDIMScheduler(clip_sample=clip), DDIMScheduler(clip_sample=clip)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(20)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    for t in theirs.timesteps:
        noise = 0.3 * x + 0.1
        steps = []
        for scheduler in (ours, theirs):
            generator = torch.Generator().manual_seed(int(t))
            steps.append(scheduler.step(noise, t, x, eta, clip, generator))
        assert torch.allclose(steps[0].prev_sample, steps[1].prev_sample, rtol=1e-6, atol=1e-6)
        assert torch.allclose(steps[0].pred_original_sample, steps[1].pred_original_sample, rtol=1e-6, atol=1e-6)
        x = steps[1].prev_sample


def test_quadratic_timesteps_by_their_formula() -> None:
    scheduler = SpacedDDIMScheduler(timestep_spacing="quadratic")
    scheduler.set_timesteps(100)
    expected = [int((i / 99 * 800**0.5) ** 2 + 1e-9) for i in range(99)]
    assert scheduler.timesteps.tolist()[:0:-1] == expected
    assert int(scheduler.timesteps[0]) == 800
    assert len(set(scheduler.timesteps.tolist())) == 96


@pytest.mark.parametrize("spacing", ["quadratic", "linspace"])
def test_a_perfect_noise_prediction_ends_at_the_clean_image(spacing: str) -> None:
    """With ε known exactly, every DDIM step stays on √ᾱ·x₀ + √(1 − ᾱ)·ε, and the last one returns x₀."""
    scheduler = SpacedDDIMScheduler(timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(37)
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    x = scheduler.add_noise(clean, noise, scheduler.timesteps[:1])
    for index, t in enumerate(scheduler.timesteps):
        alpha = scheduler.alphas_cumprod[t].double()
        assert torch.allclose(x, alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, atol=1e-4), index
        x = scheduler.step(noise, t, x).prev_sample
    assert torch.allclose(x, clean, atol=1e-4)


def test_a_step_between_equal_timesteps_moves_nothing() -> None:
    scheduler = SpacedDDIMScheduler(timestep_spacing="quadratic", clip_sample=False)
    scheduler.set_timesteps(100)
    assert scheduler.timesteps[-5:].tolist() == [1, 0, 0, 0, 0]
    x = torch.randn(1, 3, 4, 4)
    for t in scheduler.timesteps[-4:-1]:
        assert torch.allclose(scheduler.step(torch.randn_like(x), t, x).prev_sample, x, atol=1e-6)
    assert not torch.allclose(scheduler.step(torch.randn_like(x), scheduler.timesteps[-1], x).prev_sample, x, atol=1e-3)


def test_misuse_is_named() -> None:
    scheduler = SpacedDDIMScheduler(timestep_spacing="quadratic")
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.step(torch.zeros(1), 3, torch.zeros(1))
    with pytest.raises(ValueError, match="num_inference_steps is 1001, expected at most 1000"):
        scheduler.set_timesteps(1001)
    with pytest.raises(ValueError, match="expected 'epsilon'"):
        SpacedDDIMScheduler(prediction_type="v_prediction").set_timesteps(10)
