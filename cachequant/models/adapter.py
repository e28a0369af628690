"""An adapter answers structural questions about a denoiser: where it is cut, who reads the cached half, what a step runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cachequant.errors import UserError
from cachequant.types import AffineMap

FullStep = Callable[..., tuple[Tensor, Tensor]]
"""`Adapter.full`'s signature and result."""


@dataclass(frozen=True)
class Consumer:
    """A layer that multiplies the cached feature.

    Attributes:
        name: the layer in the network.
        width: its input channels that come from the cached feature.
        channels: all its input channels.
        straddling_groups: normalisation groups before it that mix cached with fresh channels, so that what it reads of the
            cached feature also depends on the fresh half. Its correction is fitted on this joint input.
    """

    name: str
    width: int
    channels: int
    straddling_groups: int = 0


class Tap:
    """Hands one tensor from a hook to the code behind it; torch.compile follows it without a guard on its content.

    Attributes:
        awaited: whether somebody will take one, for hooks that also run where nobody does.
    """

    def __init__(self) -> None:
        self._held: Tensor | None = None
        self.awaited = False

    def put(self, tensor: Tensor) -> None:
        """Called by the hook."""
        self._held = tensor

    def take(self) -> Tensor:
        """What was put last; it is let go of."""
        held, self._held, self.awaited = self._held, None, False
        assert held is not None, "the layer that is tapped did not run"
        return held


class Adapter(Protocol):
    """What the method asks of a model; implemented once per kind of network."""

    denoiser: nn.Module
    width: int
    """Channels of the cached feature."""
    channel_dim: int
    """Where the cached feature has them: 1 for [B, width, h, w], 2 for [B, tokens, width]."""

    def full(self, x: Tensor, timestep: Any, cond: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Run the whole network: (output [B, C, H, W], cached feature with `width` channels at `channel_dim`)."""
        ...

    def tapped(self) -> AbstractContextManager[FullStep]:
        """Inside, a function that does what `full` does and can be compiled: nothing is installed at its calls."""
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

    def consumers(self) -> tuple[Consumer, ...]:
        """The layers that multiply the cached feature first (the layers DEC corrects)."""
        ...

    def guided(self, kwargs: dict[str, Any]) -> bool | None:
        """Whether a call's conditioning holds classifier-free guidance; None where it cannot be seen."""
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


@contextmanager
def on_card(device: torch.device) -> Iterator[None]:
    """Make a GPU the current one, on which events are recorded and graphs captured; nothing on other devices."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield


def adapter(pipe: Any, branch: int | None = None, span: Sequence[int] | None = None) -> Adapter:
    """The adapter of a pipeline's denoiser (or of a denoiser).

    Args:
        pipe: a diffusers pipeline with `.unet` or `.transformer`, or the network itself.
        branch: of a U-Net: decoder positions behind the cache site (DeepCache's branch id), 0 keeps only the last. None
            takes the one that the pipeline names as its own (`cache_branch`), else 0.
        span: of a transformer: first and last cached block, 0-based; None is the middle half.

    Raises:
        UserError: unsupported network, a cut that it does not have, or the other kind's setting.
    """
    from cachequant.models.dit import DiTAdapter
    from cachequant.models.unet import UNetAdapter

    denoiser = denoiser_of(pipe)
    kind, ancestry = type(denoiser).__name__, {c.__name__ for c in type(denoiser).__mro__}
    if hasattr(denoiser, "up_blocks") and hasattr(denoiser, "conv_in"):
        if span is not None:
            raise UserError(
                f"cache.span is {list(span)} for a {kind}, which has no block list: set cache.branch instead"
            )
        return UNetAdapter(denoiser, getattr(pipe, "cache_branch", 0) if branch is None else branch)
    if "DiTTransformer2DModel" in ancestry:
        if branch:
            raise UserError(f"cache.branch is {branch} for a {kind}, which has no decoder: set cache.span instead")
        return DiTAdapter(denoiser, span)
    raise UserError(
        f"{kind} is not supported, expected UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel: "
        "add an adapter in cachequant/models/"
    )
