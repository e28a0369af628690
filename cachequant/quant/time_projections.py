"""The projections of the time embedding of all resnets as one product: a step reads them once, not twenty times."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cachequant.quant.once_a_forward import OnceAForward


class TimeProjections:
    """`time_emb_proj(SiLU(temb))` of several resnets, computed when the first of them asks in a step.

    The projections' weights become views of one matrix until `release`.

    Args:
        resnets: blocks with a linear `time_emb_proj` behind a SiLU.
    """

    def __init__(self, resnets: Sequence[Any]) -> None:
        self.layers: list[nn.Linear] = [resnet.time_emb_proj for resnet in resnets]
        self.sizes = [layer.out_features for layer in self.layers]
        self.weight = torch.cat([layer.weight.detach() for layer in self.layers])  # [Σ C, E]
        self.bias = torch.cat([layer.bias.detach() for layer in self.layers])  # [Σ C]
        for layer, weight in zip(self.layers, self.weight.split(self.sizes), strict=True):
            layer.weight.data = weight
        self._once = OnceAForward(self._compute)

    def of(self, resnet: Any, temb: Tensor) -> Tensor:
        """The projection [B, C] of the embedding `temb` [B, E] for one resnet; a view, whose rows lie apart."""
        return self._once.of(id(resnet), temb)[id(resnet.time_emb_proj)]

    def _compute(self, temb: Tensor) -> dict[int, Tensor]:
        """id of a projection -> [B, C]."""
        made = F.linear(F.silu(temb), self.weight.to(temb.dtype), self.bias.to(temb.dtype))  # [B, Σ C]
        return {id(layer): part for layer, part in zip(self.layers, made.split(self.sizes, dim=1), strict=True)}

    def release(self) -> None:
        """Give every projection memory of its own again."""
        for layer in self.layers:
            layer.weight.data = layer.weight.data.clone()


def share_time_projections(network: nn.Module, shallow: Collection[str] = ()) -> list[TimeProjections]:
    """Join the projections of the resnets that a cached step runs, and those of the others.

    Args:
        network: with deployed layers; a resnet's first convolution carries the joint projections as `time`.
        shallow: names of the modules that a cached step runs.
    """
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for name, module in network.named_modules():
        resnet: Any = module
        if type(module).__name__.endswith("ResnetBlock2D") and _joins(resnet):
            groups[name in shallow].append(resnet)
    made = []
    for resnets in groups.values():
        if len(resnets) > 1:
            made.append(TimeProjections(resnets))
            for resnet in resnets:
                resnet.conv1.time = made[-1]
    return made


def _joins(resnet: Any) -> bool:
    """A plain linear projection behind a SiLU, and a deployed convolution to carry the joint one."""
    return (
        type(resnet.time_emb_proj) is nn.Linear
        and resnet.time_emb_proj.bias is not None
        and isinstance(resnet.nonlinearity, nn.SiLU)
        and not resnet.skip_time_act
        and hasattr(resnet.conv1, "time")
    )
