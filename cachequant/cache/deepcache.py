"""DeepCache for diffusers U-Nets: a shallow view of the network that starts from the cached feature.

The decoder of a U-Net is a list of positions (one resnet each, over all up blocks). A position concatenates the running
feature h with the skip of its encoder twin. With `tail` positions left, a cached step needs the first `tail` skips, the
feature h that enters the first of these positions, and nothing else (DeepCache, Ma et al., CVPR 2024, section 3.2).

Nothing is forked: the shallow view is the same class with shorter lists of blocks, sharing every module, whose mid block
hands out the cached feature. Its forward is diffusers' own, so conditioning, time embedding and head are untouched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cachequant.errors import UserError


class CachedFeature(nn.Module):
    """Stands where the mid block stood and returns the feature it was given, whatever it is called with."""

    feature: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """The feature [B, C, H, W] set for this step."""
        if self.feature is None:
            raise RuntimeError("the shallow network ran before a feature was set")
        return self.feature


@dataclass(frozen=True)
class CacheSite:
    """Where a U-Net is cut.

    Attributes:
        consumer: the resnet that reads concat(h, skip) first.
        width: channels of h, the cached half.
        tail: decoder positions that run on cached steps.
    """

    consumer: nn.Module
    width: int
    tail: int


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module of the same class that shares all parameters but whose children can be replaced independently."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def decoder_positions(unet: nn.Module) -> int:
    """Number of decoder positions (resnets over all up blocks)."""
    return sum(len(_children(block, "resnets")) for block in _children(unet, "up_blocks"))


def decoder_concats(unet: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """Every decoder resnet with the width of its h half, in forward order.

    The widths follow from the structure: a resnet's input minus its skip's channels.
    """
    skips = _skip_channels(unet)
    for block in _children(unet, "up_blocks"):
        for resnet in _children(block, "resnets"):
            yield resnet, _in_channels(resnet) - skips.pop()


def cache_site(unet: nn.Module, branch: int) -> CacheSite:
    """The cut that leaves `branch` + 1 decoder positions on cached steps.

    Raises:
        UserError: the network has no such position.
    """
    positions = list(decoder_concats(unet))
    if not 0 <= branch < len(positions):
        raise UserError(
            f"cache.branch is {branch}, expected 0 to {len(positions) - 1} for this network's "
            f"{len(positions)} decoder positions: lower cache.branch"
        )
    resnet, width = positions[-(branch + 1)]
    return CacheSite(resnet, width, branch + 1)


def shallow_view(unet: nn.Module, tail: int) -> tuple[nn.Module, CachedFeature]:
    """The network of a cached step and the module through which its feature is set.

    Args:
        unet: a `UNet2DModel` or `UNet2DConditionModel`.
        tail: decoder positions that are kept.
    """
    view = shallow_copy(unet)
    entry = CachedFeature()
    view._modules["mid_block"] = entry
    view._modules["down_blocks"] = nn.ModuleList(_encoder_head(unet, tail))
    view._modules["up_blocks"] = nn.ModuleList(_decoder_tail(unet, tail))
    return view, entry


def shallow_module_names(unet: nn.Module, tail: int) -> set[str]:
    """Names, in the whole network, of the modules that a cached step runs."""
    view, entry = shallow_view(unet, tail)
    kept = {id(m) for m in view.modules()} - {id(view), id(entry)}
    return {name for name, module in unet.named_modules() if id(module) in kept}


def _encoder_head(unet: nn.Module, skips: int) -> Iterator[nn.Module]:
    """Down blocks that make the first `skips` skip tensors (the stem makes the first), the last one cut short."""
    missing = skips - 1
    for block in _children(unet, "down_blocks"):
        layers = len(_children(block, "resnets"))
        downsampler = getattr(block, "downsamplers", None)
        if missing <= 0:
            return
        if missing >= layers + (downsampler is not None):
            yield block
        else:
            yield _slice(block, slice(0, min(missing, layers)), drop="downsamplers")
        missing -= layers + (downsampler is not None)


def _decoder_tail(unet: nn.Module, tail: int) -> list[nn.Module]:
    """Up blocks that hold the last `tail` positions, the first one cut short."""
    blocks: list[nn.Module] = []
    for block in reversed(list(_children(unet, "up_blocks"))):
        layers = len(_children(block, "resnets"))
        if tail <= 0:
            break
        blocks.append(block if tail >= layers else _slice(block, slice(layers - tail, layers)))
        tail -= layers
    return blocks[::-1]


def _slice(block: nn.Module, keep: slice, drop: str | None = None) -> nn.Module:
    """A view of a block with some of its layers; `drop` names a child that becomes None."""
    view = shallow_copy(block)
    for name in ("resnets", "attentions"):
        if name in view._modules:
            view._modules[name] = nn.ModuleList(list(_children(block, name))[keep])
    if drop is not None:
        view._modules[drop] = None
    return view


def _skip_channels(unet: nn.Module) -> list[int]:
    """Channels of the skip tensors in the order in which the encoder makes them."""
    channels = [_out_channels(unet.get_submodule("conv_in"))]
    for block in _children(unet, "down_blocks"):
        resnets = list(_children(block, "resnets"))
        channels += [_out_channels(resnet) for resnet in resnets]
        if getattr(block, "downsamplers", None) is not None:
            channels.append(_out_channels(resnets[-1]))
    return channels


def _children(module: nn.Module, name: str) -> nn.ModuleList:
    child = getattr(module, name, None)
    if not isinstance(child, nn.ModuleList):
        raise UserError(
            f"{type(module).__name__} has no list {name!r}, expected a diffusers U-Net with resnet blocks: "
            "use a UNet2DModel or UNet2DConditionModel"
        )
    return child


def _in_channels(resnet: nn.Module) -> int:
    return int(resnet.in_channels)  # type: ignore[arg-type]


def _out_channels(module: nn.Module) -> int:
    return int(module.out_channels)  # type: ignore[arg-type]
