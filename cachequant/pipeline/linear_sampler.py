"""A scheduler's step from a table: deterministic samplers are linear in the sample and in the predictions so far.

DDIM without noise (Song et al., ICLR 2021), PLMS (Liu et al., ICLR 2022) and their like compute
x_{t+1} = a·x_t + Σ_k b_k·ε_{t-k}, with numbers that the timesteps alone decide, by some twenty operators for each step. On a
fast GPU these take longer than a cached step of the network, so that the loop waits for them; from the table they are two
to six.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from cachequant.errors import UserError

HISTORY = 5
"""Predictions that a step may read: PLMS of order four leaves its second one out."""
TOLERANCE, ROUNDING = 1e-5, 1e-12
"""Shares of the largest coefficient that count as none: of schedulers that compute in float32, and of float64."""
LARGE = 1e4
"""A factor that a clipped or thresholded sample does not survive."""


def linear_rows(scheduler: Any) -> Tensor | None:
    """(a, b_0, …, b_4) of every evaluation, [T, 6] float64; None for a scheduler whose steps are not of this form.

    A copy of the scheduler walks once from the unit vector of x_0, with those of ε_0 … ε_{T-1} as predictions: what it holds
    after a step are the coefficients of its sample. Once more, `LARGE` times as long, shows what is not linear.

    Args:
        scheduler: of diffusers, behind `set_timesteps`.
    """
    steps = len(scheduler.timesteps)
    try:
        with torch.random.fork_rng(devices=[]):
            path, far = (_walk(scheduler, factor) for factor in (1.0, LARGE))
    except (
        AttributeError,
        IndexError,
        RuntimeError,
        TypeError,
        ValueError,
    ):  # it wants other arguments or samples
        return None
    if path is None or far is None or not _close(far / LARGE, path, path.abs().amax()):
        return None
    rows = torch.zeros(steps, 1 + HISTORY, dtype=torch.float64)
    for step in range(steps):
        now, after = path[step], path[step + 1]  # [1 + T] each
        if not now[0]:
            return None
        scale = after[0] / now[0]
        rest, used = after - scale * now, min(HISTORY, step + 1)
        newest, size = rest[step + 2 - used : step + 2].flip(0), after.abs().amax()  # of ε_t, ε_{t-1}, …
        least = torch.maximum(TOLERANCE * newest.abs().amax(), ROUNDING * size)
        rows[step, 0], rows[step, 1 : 1 + used] = scale, torch.where(newest.abs() > least, newest, 0.0)
        rest[step + 2 - used : step + 2] = 0.0
        if not _close(rest, torch.zeros_like(rest), size):
            return None
    return rows


def _walk(scheduler: Any, factor: float) -> Tensor | None:
    """Coefficients of x_0 … x_T, [T + 1, T + 1] times `factor`; None where a copy has other timesteps."""
    twin, steps = copy.copy(scheduler), len(scheduler.timesteps)
    for name in ("set_timesteps", "step"):
        vars(twin).pop(name, None)  # what somebody put over them
    twin.set_timesteps(scheduler.num_inference_steps)
    if twin.timesteps.tolist() != scheduler.timesteps.tolist():
        return None
    units = factor * torch.eye(1 + steps, dtype=torch.float64).view(1 + steps, 1, 1, 1, -1)  # as images of one row
    path = [units[0]]
    for step, timestep in enumerate(twin.timesteps):
        path.append(twin.step(units[1 + step], timestep, path[-1], return_dict=False)[0].double())
    return torch.stack(path).flatten(1)


def _close(found: Tensor, expected: Tensor, size: Tensor) -> bool:
    """Whether nothing differs by more than rounding of numbers up to `size`; not a number never does."""
    return bool(((found - expected).abs() <= TOLERANCE * size).all())


class LinearSampler:
    """Takes the place of a scheduler's `step` in runs that begin with the first evaluation.

    Args:
        scheduler: its own `step` runs where there is no table: noise on the way, clipped samples, runs that begin later.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self._known: dict[tuple[int, ...], list[list[float]] | None] = {}
        self._rows: list[list[float]] | None = None
        self._recent: list[Tensor] = []  # predictions, the newest first
        self._next = 0

    def begin(self) -> None:
        """A run starts, at timesteps that the scheduler knows."""
        key = tuple(self.scheduler.timesteps.tolist())
        if key not in self._known:
            rows = linear_rows(self.scheduler)
            self._known[key] = None if rows is None else rows.tolist()
        self._rows, self._recent, self._next = self._known[key], [], 0

    def move(self, step: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the scheduler's `step(*args, **kwargs)` returns, without the denoised sample; None where that has to run.

        Args:
            step: evaluation, from 0.
            args: prediction ε_t [B, C, H, W] with guidance, timestep, x_t [B, C, H, W].
            kwargs: further arguments.

        Raises:
            UserError: a run asks for noise, or skips an evaluation, after steps that were taken from the table.
        """
        if self._rows is None or len(args) != 3 or step != self._next or not _is_plain(kwargs):
            if self._next:
                raise UserError(
                    f"scheduler step {step} is not like those before (eta, noise or order changed), expected a whole run "
                    "of one kind: keep its arguments as they are"
                )
            self._rows = None
            return None
        output, _, sample = args
        self._recent = [output, *self._recent[: HISTORY - 1]]
        self._next += 1
        scale, *factors = self._rows[step]
        moved = sample * scale
        for prediction, factor in zip(self._recent, factors, strict=False):  # the first steps have fewer
            if factor:
                moved.add_(prediction, alpha=factor)
        return SchedulerOutput(prev_sample=moved) if kwargs.get("return_dict", True) else (moved,)


def _is_plain(kwargs: dict[str, Any]) -> bool:
    """Whether further arguments of a step ask for nothing but the deterministic move."""
    others = (value for name, value in kwargs.items() if name not in ("generator", "return_dict"))
    return all(value is None or (isinstance(value, bool | int | float) and not value) for value in others)
