"""What the timestep alone decides, computed once a plan: the embedding's projections in a U-Net's resnets, from a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.quant.device_blocks import DeviceResnet
from cachequant.quant.device_layers import DeviceLayer
from cachequant.quant.step_tables import StepTables


class SteppedEmbedding:
    """`time_emb_proj(SiLU(time_embedding(t)))` of all resnets of a U-Net for the timestep of every step.

    Embedding and projections run once for each step, with the integers of that step where they are quantised, so that the
    numbers are those of computing them anew. In their place the network then has modules that do nothing, until `release`.

    Args:
        network: a U-Net with deployed layers that `step_embedding` has found fit.
        resnets: its blocks with a projection of the embedding.
        clock: tells the step; it is where it was afterwards.
        tables: frozen; they keep the row of the current step.
        timesteps: of all steps.
    """

    def __init__(
        self, network: Any, resnets: Sequence[Any], clock: FeatureCache, tables: StepTables, timesteps: Sequence[int]
    ) -> None:
        self.network = network
        self._originals = network.time_proj, network.time_embedding
        rows = [_projections(network, resnets, clock, tables, step, timesteps[step]) for step in range(len(timesteps))]
        row = tables.follow(torch.stack([torch.cat(parts) for parts in rows]))  # [Σ C]
        sizes = [len(part) for part in rows[0]]
        self._parts = {id(resnet): part for resnet, part in zip(resnets, row.split(sizes), strict=True)}
        network.time_proj, network.time_embedding = _Column(), _Same()
        for resnet in resnets:
            resnet.conv1.time = self

    def of(self, resnet: Any, temb: Tensor) -> Tensor:
        """The projection [B, C] for one resnet at the current step, one row for the whole batch of `temb` [B, ·]."""
        return self._parts[id(resnet)].expand(len(temb), -1)

    def release(self) -> None:
        """Give the network its embedding back."""
        self.network.time_proj, self.network.time_embedding = self._originals


def step_embedding(
    network: Any, clock: FeatureCache, tables: StepTables, timesteps: Sequence[int]
) -> SteppedEmbedding | None:
    """Table a U-Net's embedding; None where something beside the timestep is part of it, or reads it elsewhere."""
    resnets = [module for module in network.modules() if getattr(module, "time_emb_proj", None) is not None]
    if not resnets or not _alone(network) or not all(_reads_row(resnet) for resnet in resnets):
        return None
    return SteppedEmbedding(network, resnets, clock, tables, timesteps)


def _alone(network: Any) -> bool:
    """Whether the timestep is all that the embedding is made of, by layers that can be run ahead."""
    others = ("class_embedding", "add_embedding", "time_embed_act")
    embedding = getattr(network, "time_embedding", None)
    return (
        hasattr(network, "time_proj")
        and isinstance(embedding, nn.Module)
        and all(getattr(network, name, None) is None for name in others)
        and getattr(embedding, "cond_proj", None) is None
        and all(_runs_ahead(layer) for layer in embedding.children())
    )


def _reads_row(resnet: Any) -> bool:
    """A resnet whose fused forward takes the projection from `conv1.time`."""
    return type(resnet).__name__ == "ResnetBlock2D" and DeviceResnet.fits(resnet) and _runs_ahead(resnet.time_emb_proj)


def _runs_ahead(layer: nn.Module) -> bool:
    """A plain or deployed layer, or an activation."""
    return type(layer) in (nn.Linear, nn.SiLU, nn.GELU, nn.Mish, nn.ReLU) or isinstance(layer, DeviceLayer)


@torch.inference_mode(False)
@torch.no_grad()
def _projections(
    network: Any, resnets: Sequence[Any], clock: FeatureCache, tables: StepTables, step: int, timestep: int
) -> list[Tensor]:
    """The projections [C] of every resnet at one step."""
    dtype = next(p.dtype for p in network.parameters() if p.is_floating_point() and not p.is_meta)
    given = network.time_proj(torch.tensor([timestep], device=tables.device)).to(dtype)  # [1, F]
    with clock.at(step):
        temb = network.time_embedding(given)  # [1, E]
        return [
            resnet.time_emb_proj(temb if resnet.skip_time_act else resnet.nonlinearity(temb))[0] for resnet in resnets
        ]


class _Column(nn.Module):
    """Timesteps [B] as a column [B, 1]."""

    def forward(self, timesteps: Tensor) -> Tensor:
        return timesteps[:, None]


class _Same(nn.Module):
    """What it is given."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x
