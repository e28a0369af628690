"""What a correction leaves of the error of a reused feature, in closed form from streaming sums."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from cachequant.correction import NEGLIGIBLE_VARIANCE
from cachequant.schedule import num_groups


class ResidualBand:
    """Streams features in sampling order and keeps, per channel, the products that every reuse could ask a fit for.

    The variance of X_t that least squares on the reused feature X_s leaves unexplained follows from the sums of X_t, X_s,
    their squares and their product (CacheQuant equation 10 gives the fit; its residual as a cost is ours). With `reach` 2
    the feature refreshed one group earlier is a second regressor (the forecast), and lags are kept up to two groups.

    Memory: G = min(reach·L, T) features of one batch, L = min(2N, T), and T × (G + 3) × C float64 numbers, with `hold`
    T × (2G + 3) × C.

    Args:
        num_steps: evaluations of the sampler (T).
        interval: N; groups are at most L long.
        channel_dim: where a feature has its channels.
        reach: 1 for one reused feature, 2 for two.
        hold: what is reused of a feature (rounding); None is the feature as it is.

    Raises:
        UserError: impossible interval.
    """

    def __init__(
        self,
        num_steps: int,
        interval: int,
        channel_dim: int = 1,
        reach: int = 1,
        hold: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        num_groups(num_steps, interval)
        self.num_steps, self.interval, self.channel_dim, self.hold = num_steps, interval, channel_dim, hold
        self.max_length, self.reach = min(2 * interval, num_steps), reach
        self.lags = min(reach * self.max_length, num_steps)
        self.peak_bytes = 0
        self._step = self._count = 0
        self._ring: deque[Tensor] = deque(maxlen=self.lags)
        self._sums: dict[str, Tensor] = {}

    def update(self, feature: Tensor) -> None:
        """Take the feature of the next step [..., C, ...]; after T of them a new pass (batch) begins."""
        exact = self._rows(feature).double()  # [C, n]
        held = self._rows(feature if self.hold is None else self.hold(feature))
        self._ring.appendleft(held)  # lag d is at place d
        self.peak_bytes = max(self.peak_bytes, sum(x.numel() * x.element_size() for x in self._ring))
        rows = held.double()
        moments = torch.stack([exact.sum(1), exact.square().sum(1), rows.sum(1)])  # [3, C]
        self._add("moments", moments)
        self._add("cross", self._with_past(exact))
        if self.hold is not None:
            self._add("own", self._with_past(rows))
        self._step = (self._step + 1) % self.num_steps
        if self._step == 0:
            self._count += exact.shape[1]
            self._ring.clear()

    def _rows(self, feature: Tensor) -> Tensor:
        return feature.detach().movedim(self.channel_dim, 0).flatten(1).contiguous()  # [C, n]

    def _with_past(self, rows: Tensor) -> Tensor:
        """Products with the feature of every lag: [lags, C] float64, 0 where the run had not begun."""
        found = torch.stack([(rows * past).sum(1) for past in self._ring])
        return torch.cat([found, found.new_zeros(self.lags - len(found), found.shape[1])])

    def _add(self, name: str, value: Tensor) -> None:
        if name not in self._sums:
            self._sums[name] = value.new_zeros(self.num_steps, *value.shape)
        self._sums[name][self._step] += value

    def merge(self, other: ResidualBand) -> None:
        """Take the sums of another band of the same run in: the fit of all guidance contexts together."""
        self._count += other._count
        self.peak_bytes += other.peak_bytes
        self._sums = {name: sums + other._sums[name] for name, sums in self._sums.items()}

    @property
    def values(self) -> Tensor:
        """[T, L] float64 on the CPU: squares of X_t that a fit on X_{t-d} leaves; 0 for d = 0, where X_t itself is used.

        With `reach` 2, [T, L, L + 1]: the last index p is the length of the group before, 0 where there is none (the run's
        first group). Where X_{t-d-p} does not exist the value is inf.
        """
        fit = _Covariances(self._sums, self._count, self.lags)
        alone, slope = fit.after_one(self.max_length)  # [T, L, C]
        parts = [_total(alone)]
        if self.reach == 2:
            parts += [self._with_second(fit, alone, slope, p) for p in range(1, self.max_length + 1)]
        return torch.stack(parts, dim=2) if self.reach == 2 else parts[0]

    def _with_second(self, fit: _Covariances, alone: Tensor, slope: Tensor, length: int) -> Tensor:
        """[T, L] what is left with X_{t-d-length} as second regressor."""
        step, lag = torch.arange(self.num_steps)[:, None], torch.arange(self.max_length)
        absent = (step - lag < length) & (lag > 0)
        if length >= self.lags:
            return torch.where(absent, torch.inf, 0.0).double()
        return torch.where(absent, torch.inf, _total(fit.after_two(alone, slope, length)))


def _total(left: Tensor) -> Tensor:
    """Sum over channels of [T, L, C], on the CPU; nothing is lost where the feature itself is used (d = 0)."""
    total = left.clamp(min=0.0).sum(2).cpu()
    lag, step = torch.arange(total.shape[1]), torch.arange(len(total))[:, None]
    return torch.where((lag > 0) & (lag <= step), total, 0.0)


class _Covariances:
    """n times the covariances of X_t, and of what is held of X_{t-d}, per channel."""

    def __init__(self, sums: dict[str, Tensor], count: int, lags: int) -> None:
        exact, squares, held = sums["moments"].unbind(1)  # [T, C]
        own = sums.get("own", sums["cross"])
        self.source = (torch.arange(len(exact))[:, None] - torch.arange(lags)).clamp(min=0)  # [T, lags]
        self.target = squares - exact.square() / count  # [T, C]
        self.cross = sums["cross"] - exact[:, None] * held[self.source] / count  # [T, lags, C] of X_t with held X_{t-d}
        self.own = own - held[:, None] * held[self.source] / count  # [T, lags, C] of held with held
        self.alive = self.own[:, 0] > NEGLIGIBLE_VARIANCE * own[:, 0]  # [T, C]
        self.inverse = torch.where(self.alive, 1 / torch.where(self.alive, self.own[:, 0], 1.0), 0.0)

    def after_one(self, length: int) -> tuple[Tensor, Tensor]:
        """What least squares on X_{t-d} leaves, and its slope: [T, length, C] both."""
        cross = self.cross[:, :length]
        slope = cross * self.inverse[self.source[:, :length]]
        return self.target[:, None] - slope * cross, slope

    def after_two(self, left: Tensor, slope: Tensor, gap: int) -> Tensor:
        """What X_{t-d-gap} leaves of that, its own part that X_{t-d} explains taken out first (Frisch and Waugh 1933)."""
        length = left.shape[1]
        near = self.source[:, :length]  # [T, L] t - d
        far = (near - gap).clamp(min=0)
        lag = torch.arange(length)
        between = self.own[near, gap]  # [T, L, C] Cov(X_{t-d}, X_{t-d-gap})
        rest = self.own[far, 0] - between.square() * self.inverse[near]
        partial = self.cross[:, (lag + gap).clamp(max=self.cross.shape[1] - 1)] - slope * between
        usable = self.alive[far] & (rest > NEGLIGIBLE_VARIANCE * self.own[far, 0])
        return left - torch.where(usable, partial.square() / torch.where(usable, rest, 1.0), 0.0)
