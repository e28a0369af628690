"""A denoiser as torch.compile sees it: whole steps, and full and cached steps, without anything installed at a call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from cachequant.models.adapter import Adapter
from cachequant.types import AffineMap

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def inductor(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for fixed shapes; what replays the result is up to the caller (CUDA graphs of our own)."""
    return torch.compile(function, dynamic=False)


class Whole:
    """A network without a cache, with the steps of an adapter: `full` gives an empty feature.

    Args:
        network: of diffusers.
        compile: applied to its forward; None runs it as it is.
    """

    width = 0

    def __init__(self, network: nn.Module, compile: Compile | None = None) -> None:
        kind: Any = type(network)

        def forward(x: Tensor, timestep: Any, kwargs: dict[str, Any]) -> Tensor:
            return kind.forward(network, x, timestep, **kwargs, return_dict=False)[0]

        self._forward = forward if compile is None else compile(forward)

    def full(self, x: Tensor, timestep: Any, cond: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(output [B, C, H, W], [0])."""
        return self._forward(x, timestep, kwargs), x.new_empty(0)


class CompiledAdapter:
    """An adapter with compiled steps; everything else is the wrapped adapter's.

    Args:
        adapter: of the network.
        stack: holds the taps of the full step while this is in use.
        compile: makes a fast function of a function.
    """

    def __init__(self, adapter: Adapter, stack: ExitStack, compile: Compile = inductor) -> None:
        self.adapter = adapter
        self._full, self._cached = compile(stack.enter_context(adapter.tapped())), compile(adapter.cached)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.adapter, name)

    def full(self, x: Tensor, timestep: Any, cond: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """`Adapter.full`, compiled."""
        return self._full(x, timestep, cond, **kwargs)

    def cached(
        self,
        x: Tensor,
        timestep: Any,
        cond: Any,
        cached_feature: Tensor,
        correction: AffineMap | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`Adapter.cached`, compiled; the correction is applied before."""
        feature = (
            cached_feature if correction is None else correction.apply(cached_feature, channel_dim=self.channel_dim)
        )
        return self._cached(x, timestep, cond, feature, None, **kwargs)
