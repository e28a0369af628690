"""DDIM over timesteps that are not evenly spaced, which diffusers' own class cannot walk."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DDIMScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

QUADRATIC_SHARE = 0.8
"""Quadratic spacing starts at this share of the training timesteps (DDIM, Song et al., ICLR 2021, appendix D.2)."""


class SpacedDDIMScheduler(DDIMScheduler, SchedulerMixin):
    """DDIM that always steps to the next timestep of its own list, whatever the spacing.

    `DDIMScheduler.step` subtracts a constant, which is right for evenly spaced timesteps only. `timestep_spacing` may
    also be "quadratic": t = int(s²) for s evenly spaced from 0 to √(0.8·T), as the original CIFAR-10 scripts have it.
    Its smallest timesteps repeat (96 of 100 are distinct); as there, each is evaluated, and a step between equals moves
    nothing. "linspace" gives the timesteps of the original DiT's respacing.
    """

    _path: list[int]
    _next: int

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps: `timesteps` [S] int64, noisiest first.

        Raises:
            ValueError: more steps than training timesteps, or a model that does not predict noise.
        """
        if self.config.prediction_type != "epsilon":
            raise ValueError(f"prediction_type is {self.config.prediction_type!r}, expected 'epsilon'")
        total = self.config.num_train_timesteps
        if num_inference_steps > total:
            raise ValueError(f"num_inference_steps is {num_inference_steps}, expected at most {total}")
        if self.config.timestep_spacing == "quadratic":
            root = np.linspace(0, (total * QUADRATIC_SHARE) ** 0.5, num_inference_steps)
            self.num_inference_steps = num_inference_steps
            self.timesteps = torch.from_numpy((root**2).astype(np.int64)[::-1].copy()).to(device)
        else:
            super().set_timesteps(num_inference_steps, device)
        self._path, self._next = self.timesteps.tolist(), 0

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_t → x_s with s the next timestep of the list (DDIM, equation 12); arguments as in `DDIMScheduler.step`.

        Raises:
            ValueError: `set_timesteps` was not called, or the timestep is not one of its list.
        """
        if self.num_inference_steps is None:
            raise ValueError("no timesteps yet: call set_timesteps first")
        alpha, alpha_next = self._alphas(int(timestep))
        sigma = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)) ** 0.5
        x0 = (sample - (1 - alpha) ** 0.5 * model_output) / alpha**0.5  # [B, C, H, W]
        if self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        if use_clipped_model_output:
            model_output = (sample - alpha**0.5 * x0) / (1 - alpha) ** 0.5
        moved = alpha_next**0.5 * x0 + (1 - alpha_next - sigma**2) ** 0.5 * model_output
        if eta > 0:
            noise = variance_noise
            if noise is None:
                noise = randn_tensor(sample.shape, generator, device=sample.device, dtype=sample.dtype)
            moved = moved + sigma * noise
        return DDIMSchedulerOutput(moved, x0) if return_dict else (moved, x0)

    def _alphas(self, timestep: int) -> tuple[Tensor, Tensor]:
        """ᾱ at this timestep and at the next one, or at the end; repeated timesteps are walked in order."""
        index = self._next
        if index >= len(self._path) or self._path[index] != timestep:
            index = self._path.index(timestep)
        self._next = index + 1
        last = self._next == len(self._path)
        alpha_next = self.final_alpha_cumprod if last else self.alphas_cumprod[self._path[self._next]]
        return self.alphas_cumprod[timestep], alpha_next
