"""Scheduler steps from the table against the schedulers' own, and against DDIM's closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler
from torch import Tensor

from cachequant.errors import UserError
from cachequant.models.schedulers import SpacedDDIMScheduler
from cachequant.pipeline.linear_sampler import LinearSampler, linear_rows

PLAIN = {"clip_sample": False}
LINEAR = {
    "ddim": lambda: DDIMScheduler(**PLAIN),
    "ddim, offset": lambda: DDIMScheduler(
        steps_offset=1, set_alpha_to_one=False, beta_schedule="scaled_linear", **PLAIN
    ),
    "ddim, velocity": lambda: DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", **PLAIN),
    "quadratic": lambda: SpacedDDIMScheduler(timestep_spacing="quadratic", **PLAIN),
    "plms": lambda: PNDMScheduler(
        skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False, beta_schedule="scaled_linear"
    ),
}
OTHERS = {
    "clipped": lambda: DDIMScheduler(clip_sample=True),
    "thresholded": lambda: DDIMScheduler(thresholding=True, **PLAIN),
    "ancestral": lambda: DDPMScheduler(),
}


def denoise(x: Tensor, timestep: Any) -> Tensor:
    """A prediction that is anything but linear."""
    return torch.sin(3 * x) + 0.2 * torch.cos(x + float(timestep))


def walk(scheduler: Any, sampler: LinearSampler | None, steps: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    scheduler.set_timesteps(steps)
    if sampler is not None:
        sampler.begin()
    x, path = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype), []
    for step, timestep in enumerate(scheduler.timesteps):
        arguments = (denoise(x, timestep), timestep, x)
        moved = None if sampler is None else sampler.move(step, arguments, {"return_dict": False, "generator": None})
        if sampler is None:
            moved = scheduler.step(*arguments, return_dict=False)
        assert moved is not None
        x = moved[0]
        path.append(x)
    return path


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_a_run_from_the_table_is_the_schedulers_own(name: str, steps: int) -> None:
    scheduler = LINEAR[name]()
    sampler = LinearSampler(scheduler)
    expected = walk(scheduler, None, steps)
    for _ in range(2):
        found = walk(scheduler, sampler, steps)
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype is torch.float64
            torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-4, atol=2e-5)


def test_ddim_in_closed_form() -> None:
    scheduler = DDIMScheduler(**PLAIN)
    scheduler.set_timesteps(10)
    rows = linear_rows(scheduler)
    assert rows is not None and not rows[:, 2:].any()
    alphas = [*scheduler.alphas_cumprod[scheduler.timesteps].double(), scheduler.final_alpha_cumprod.double()]
    for row, now, after in zip(rows, alphas, alphas[1:], strict=False):
        scale = (after / now).sqrt()
        torch.testing.assert_close(row[0], scale, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(row[1], (1 - after).sqrt() - scale * (1 - now).sqrt(), rtol=1e-5, atol=1e-7)


def test_half_precision_rounds_no_more_than_the_scheduler() -> None:
    scheduler = LINEAR["plms"]()
    exact = walk(scheduler, None, 20)[-1]
    theirs = (walk(scheduler, None, 20, torch.float16)[-1] - exact).abs().mean()
    ours = (walk(scheduler, LinearSampler(scheduler), 20, torch.float16)[-1] - exact).abs().mean()
    assert ours < 1.5 * theirs


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_linear_has_no_table(name: str) -> None:
    scheduler = OTHERS[name]()
    scheduler.set_timesteps(5)
    state = torch.get_rng_state()
    assert linear_rows(scheduler) is None
    assert torch.equal(torch.get_rng_state(), state)
    sampler = LinearSampler(scheduler)
    sampler.begin()
    assert sampler.move(0, (torch.ones(1), 0, torch.ones(1)), {}) is None


def test_noise_and_late_starts_are_the_schedulers_and_may_not_come_later() -> None:
    scheduler = DDIMScheduler(**PLAIN)
    scheduler.set_timesteps(5)
    sampler, arguments = LinearSampler(scheduler), (torch.ones(1), 0, torch.ones(1))
    for step, extra in ((0, {"eta": 0.5}), (0, {"variance_noise": torch.ones(1)}), (2, {})):
        sampler.begin()
        assert sampler.move(step, arguments, extra) is None
        assert sampler.move(step + 1, arguments, {}) is None  # and so is the rest of that run
    sampler.begin()
    assert sampler.move(0, arguments, {"eta": 0.0}) is not None
    with pytest.raises(UserError, match="eta"):
        sampler.move(1, arguments, {"eta": 0.5})


def test_a_table_belongs_to_its_timesteps() -> None:
    """More steps, or others than `set_timesteps` makes, which a pipeline may put in place."""
    scheduler = DDIMScheduler(**PLAIN)
    sampler = LinearSampler(scheduler)
    for steps in (5, 9, 5):
        scheduler.set_timesteps(steps)
        sampler.begin()
        moved = sampler.move(0, (torch.zeros(1, dtype=torch.float64), 0, torch.ones(1, dtype=torch.float64)), {})
        first, second = scheduler.alphas_cumprod[scheduler.timesteps[:2]].double()
        torch.testing.assert_close(moved.prev_sample[0], (second / first).sqrt(), rtol=1e-6, atol=0.0)
    scheduler.timesteps = torch.tensor([900, 500, 20])
    assert linear_rows(scheduler) is None


def test_a_run_that_was_wrapped_is_looked_at_underneath() -> None:
    """Whoever listens to a scheduler's calls does not hear the table being made."""
    scheduler, heard = DDIMScheduler(**PLAIN), []
    scheduler.set_timesteps(4)
    scheduler.step = lambda *args, **kwargs: heard.append(args)
    scheduler.set_timesteps = lambda *args, **kwargs: heard.append(args)
    assert linear_rows(scheduler) is not None and not heard
