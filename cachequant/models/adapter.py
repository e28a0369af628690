"""An adapter answers structural questions about a denoiser: where it is cut, who reads the cached half, what a step runs."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cachequant.errors import UserError
from cachequant.types import AffineMap


class Adapter(Protocol):
    """What the method asks of a model; implemented once per kind of network."""

    denoiser: nn.Module
    width: int
    """Channels of the cached feature."""

    def full(self, x: Tensor, timestep: Any, cond: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Run the whole network: (output [B, C, H, W], cached feature [B, width, h, w])."""
        ...

    def cached(
        self,
        x: Tensor,
        timestep: Any,
        cond: Any,
        cached_feature: Tensor,
        correction: AffineMap | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run only what a cached step runs, from a raw feature and its correction: output [B, C, H, W]."""
        ...

    def pack(self, output: Tensor, return_dict: bool) -> Any:
        """The output as the network's own forward returns it."""
        ...

    def rebuild(self) -> None:
        """Look at the modules again after some were replaced."""
        ...

    def shallow_names(self) -> set[str]:
        """Names of the modules that a cached step runs."""
        ...

    def end_names(self) -> set[str]:
        """Names of the first and the last convolution, by structure."""
        ...

    def time_names(self) -> set[str]:
        """Names of the layers whose input depends on the timestep alone."""
        ...

    def splits(self) -> dict[str, int]:
        """Layers behind a decoder concat: name -> channels of the first (h) segment."""
        ...

    def consumers(self) -> tuple[str, ...]:
        """Names of the layers that multiply the cached half first (the layers DEC corrects)."""
        ...


def denoiser_of(pipe: Any) -> nn.Module:
    """The network that a pipeline calls at every step, or the network itself.

    Raises:
        UserError: the object has neither `unet` nor `transformer`.
    """
    if isinstance(pipe, nn.Module):
        return pipe
    for name in ("unet", "transformer"):
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return module
    raise UserError(
        f"got a {type(pipe).__name__} without .unet or .transformer, expected a diffusers pipeline: "
        "load one with cachequant.load_pipeline(folder_or_id)"
    )


def device_of(denoiser: nn.Module) -> torch.device:
    """Where a denoiser's parameters are; those that a plan keeps instead of the network are nowhere and do not count."""
    return next((p.device for p in denoiser.parameters() if not p.is_meta), torch.device("cpu"))


def adapter(pipe: Any, branch: int = 0) -> Adapter:
    """The adapter of a pipeline's denoiser (or of a denoiser).

    Args:
        pipe: a diffusers pipeline with `.unet`, or the network itself.
        branch: decoder positions behind the cache site (DeepCache's branch id), 0 keeps only the last.

    Raises:
        UserError: unsupported network, or a branch that it does not have.
    """
    from cachequant.models.unet import UNetAdapter

    denoiser = denoiser_of(pipe)
    if hasattr(denoiser, "up_blocks") and hasattr(denoiser, "conv_in"):
        return UNetAdapter(denoiser, branch)
    raise UserError(
        f"{type(denoiser).__name__} is not supported, expected UNet2DModel or UNet2DConditionModel: "
        "add an adapter in cachequant/models/"
    )
