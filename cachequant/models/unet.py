"""Adapter for diffusers' convolutional U-Nets (`UNet2DModel`, `UNet2DConditionModel`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cachequant.cache.deepcache import cache_site, decoder_concats, shallow_module_names, shallow_view
from cachequant.models.adapter import Consumer, FullStep, Tap
from cachequant.types import AffineMap


class UNetAdapter:
    """Cuts a U-Net at one decoder concat; see `cachequant.models.adapter.Adapter` for the contract.

    Args:
        denoiser: the U-Net.
        branch: decoder positions behind the cut, 0 keeps only the last.

    Raises:
        UserError: the network has no such position.
    """

    channel_dim = 1

    def __init__(self, denoiser: nn.Module, branch: int = 0) -> None:
        self.denoiser, self.branch = denoiser, branch
        self._forward = type(denoiser).forward
        self.site = cache_site(denoiser, branch)
        self.width = self.site.width
        self._splits = _find_splits(denoiser)
        self.rebuild()

    def rebuild(self) -> None:
        """Make a fresh shallow view, after modules were replaced; the structure was read once, from the original."""
        self._view, self._entry = shallow_view(self.denoiser, self.site.tail)

    def full(self, x: Tensor, timestep: Any, cond: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Whole network and the tensor at the cache site: ([B, C, H, W], [B, width, h, w])."""
        with self.tapped() as run:
            return run(x, timestep, cond, **kwargs)

    @contextmanager
    def tapped(self) -> Iterator[FullStep]:
        """Inside, `full` with its tap at the cache site left in place between calls, as torch.compile needs it."""
        tap = Tap()

        def catch(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if not tap.awaited:  # a cached step runs this layer too, on the feature that it was given
                return
            h = inputs[0][0] if isinstance(inputs[0], tuple) else inputs[0][:, : self.width]  # fused blocks pass halves
            tap.put(h.clone(memory_format=torch.preserve_format))

        def run(x: Tensor, timestep: Any, cond: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
            tap.awaited = True
            return self._run(self.denoiser, x, timestep, cond, kwargs), tap.take()

        handle = self.site.consumer.register_forward_pre_hook(catch)
        try:
            yield run
        finally:
            handle.remove()

    def cached(
        self,
        x: Tensor,
        timestep: Any,
        cond: Any,
        cached_feature: Tensor,
        correction: AffineMap | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Stem, kept encoder head, kept decoder tail and head, from the (corrected) feature: [B, C, H, W]."""
        self._entry.feature = cached_feature if correction is None else correction.apply(cached_feature)
        try:
            return self._run(self._view, x, timestep, cond, _without_deep_residual(kwargs))
        finally:
            self._entry.feature = None

    def _run(self, network: nn.Module, x: Tensor, timestep: Any, cond: Any, kwargs: dict[str, Any]) -> Tensor:
        """One call of the class's own forward, past any wrapper installed on the instance."""
        if cond is not None:
            kwargs = {**kwargs, self._condition_name: cond}
        elif self._condition_name == "encoder_hidden_states":
            kwargs = {"encoder_hidden_states": None, **kwargs}
        return self._forward(network, x, timestep, **{**kwargs, "return_dict": False})[0]

    def pack(self, output: Tensor, return_dict: bool) -> Any:
        """The output as the network's own forward returns it."""
        if not return_dict:
            return (output,)
        from diffusers.models.unets.unet_2d import UNet2DOutput
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        kind = UNet2DConditionOutput if self._condition_name == "encoder_hidden_states" else UNet2DOutput
        return kind(sample=output)

    @property
    def _condition_name(self) -> str:
        """What `cond` means here: class ids, or the context of cross attention."""
        return "encoder_hidden_states" if hasattr(self.denoiser, "encoder_hid_proj") else "class_labels"

    def shallow_names(self) -> set[str]:
        """Names of the modules that a cached step runs."""
        return shallow_module_names(self.denoiser, self.site.tail)

    def end_names(self) -> set[str]:
        """The stem and the head: the only convolutions that read x_t or write the prediction."""
        return {"conv_in", "conv_out"}

    def time_names(self) -> set[str]:
        """Time (and class) embedding layers and the resnets' projections of it."""
        embedding = ("time_embedding.", "class_embedding.", "add_embedding.")
        return {
            name
            for name, _ in self.denoiser.named_modules()
            if name.startswith(embedding) or name.endswith("time_emb_proj")
        }

    def splits(self) -> dict[str, int]:
        """First convolution and shortcut of every decoder resnet: name -> channels of the h half."""
        return dict(self._splits)

    def consumers(self) -> tuple[Consumer, ...]:
        """First convolution and shortcut of the resnet that reads the cached feature.

        The shortcut reads concat(h, skip) itself. The convolution reads it behind a GroupNorm; where the group size does
        not divide the width of h, one group takes its mean and variance from both halves (DDPM CIFAR-10: 256 of 384
        channels in groups of 12). The released code then corrects the shortcut alone.
        """
        site: Any = self.site.consumer
        prefix = next(n for n, m in self.denoiser.named_modules() if m is site)
        group = site.norm1.num_channels // site.norm1.num_groups
        straddling = int(self.width % group != 0)  # the one that holds the border, if any does
        return tuple(
            Consumer(name, self.width, int(site.in_channels), straddling if name.endswith(".conv1") else 0)
            for name in self.splits()
            if name.startswith(f"{prefix}.")
        )

    def guided(self, kwargs: dict[str, Any]) -> bool | None:
        """The conditioning of a U-Net does not say which of its rows is the empty one."""
        return None


def _find_splits(unet: nn.Module) -> dict[str, int]:
    """Layers that read a decoder concat: name -> channels of the h half."""
    names = {id(m): n for n, m in unet.named_modules()}
    return {
        f"{names[id(resnet)]}.{child}": width
        for resnet, width in decoder_concats(unet)
        for child in ("conv1", "conv_shortcut")
        if getattr(resnet, child, None) is not None
    }


def _without_deep_residual(kwargs: dict[str, Any]) -> dict[str, Any]:
    """ControlNet adds a residual behind the mid block; the cached feature already holds its effect."""
    residual = kwargs.get("mid_block_additional_residual")
    if residual is None:
        return kwargs
    return {
        **kwargs,
        "mid_block_additional_residual": torch.zeros((), dtype=residual.dtype, device=residual.device),
    }
