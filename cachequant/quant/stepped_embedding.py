"""What the timestep alone decides, computed once a plan: the embedding's projections in a U-Net's resnets, from a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.quant.blocks import FusedResnet
from cachequant.quant.step_tables import StepTables


class SteppedEmbedding:
    """`time_emb_proj(SiLU(time_embedding(t)))` of all resnets of a U-Net for the timestep of every step.

    Embedding and projections run once for each step, on one row, with the integers of that step where they are quantised:
    the numbers are those of computing them anew. A GPU's tables follow them, so they run ahead; on a CPU they run when a
    step first asks. In their place the network then has modules that do nothing, until `release`.

    Args:
        network: a U-Net with deployed layers that `step_embedding` has found fit.
        resnets: its blocks with a projection of the embedding.
        clock: tells the step; it is where it was afterwards.
        timesteps: of all steps.
        tables: frozen; they keep the row of the current step. None on a CPU.
    """

    def __init__(
        self,
        network: Any,
        resnets: Sequence[Any],
        clock: FeatureCache,
        timesteps: Sequence[int],
        tables: StepTables | None = None,
    ) -> None:
        self.network, self._clock, self._timesteps = network, clock, timesteps
        self._originals = network.time_proj, network.time_embedding
        self._embedded: dict[int, Tensor] = {}  # step -> [1, E]
        self._rows: dict[tuple[int, int], Tensor] = {}  # step and resnet -> [1, C]
        self._followed: dict[int, Tensor] = {}
        if tables is not None:
            made = [[self._row(step, resnet) for resnet in resnets] for step in range(len(timesteps))]
            row = tables.follow(torch.cat([torch.cat(parts, dim=1) for parts in made]))  # [Σ C]
            parts = row[None].split([part.shape[1] for part in made[0]], dim=1)
            self._followed = {id(resnet): part for resnet, part in zip(resnets, parts, strict=True)}
            self._embedded.clear()
        network.time_proj, network.time_embedding = _Column(network.time_proj), _Same(network.time_embedding)
        for resnet in resnets:
            resnet.conv1.time = self

    def of(self, resnet: Any, temb: Tensor) -> Tensor:
        """The projection [1, C] for one resnet at the current step, whatever the rows of `temb` [B, ·] are."""
        followed = self._followed.get(id(resnet))
        if followed is not None:
            return followed
        key = self._clock.step, id(resnet)
        if key not in self._rows:
            self._rows[key] = self._row(self._clock.step, resnet)
        return self._rows[key]

    def release(self) -> None:
        """Give the network its embedding back."""
        self.network.time_proj, self.network.time_embedding = self._originals

    @torch.inference_mode(False)
    @torch.no_grad()
    def _row(self, step: int, resnet: Any) -> Tensor:
        """The projection [1, C] for one resnet at one step."""
        with self._clock.at(step):
            if step not in self._embedded:
                self._embedded[step] = self._embed(self._timesteps[step])
            temb = self._embedded[step]
            made: Tensor = resnet.time_emb_proj(temb if resnet.skip_time_act else resnet.nonlinearity(temb))
            return made

    def _embed(self, timestep: int) -> Tensor:
        """The embedding [1, E] of one timestep."""
        project, embed = self._originals
        weight = next(p for p in self.network.parameters() if p.is_floating_point() and not p.is_meta)
        given = project(torch.tensor([timestep], device=weight.device)).to(weight.dtype)  # [1, F]
        made: Tensor = embed(given)
        return made


def step_embedding(
    network: Any, clock: FeatureCache, timesteps: Sequence[int], tables: StepTables | None = None
) -> SteppedEmbedding | None:
    """Table a U-Net's embedding; None where something beside the timestep is part of it, or reads it elsewhere."""
    resnets = [module for module in network.modules() if getattr(module, "time_emb_proj", None) is not None]
    if not resnets or not _alone(network) or not all(_reads_row(resnet) for resnet in resnets):
        return None
    return SteppedEmbedding(network, resnets, clock, timesteps, tables)


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
    return type(resnet).__name__ == "ResnetBlock2D" and FusedResnet.fits(resnet) and _runs_ahead(resnet.time_emb_proj)


def _runs_ahead(layer: nn.Module) -> bool:
    """A plain or deployed layer, or an activation."""
    return type(layer) in (nn.Linear, nn.SiLU, nn.GELU, nn.Mish, nn.ReLU) or hasattr(layer, "deployed")


class _InPlaceOf(nn.Module):
    """Stands where a module stood, which `.to()` still reaches."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._original = (original,)  # a tuple hides it from the module tree

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _InPlaceOf:
        self._original[0]._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self


class _Column(_InPlaceOf):
    """Timesteps [B] as a column [B, 1]."""

    def forward(self, timesteps: Tensor) -> Tensor:
        return timesteps[:, None]


class _Same(_InPlaceOf):
    """What it is given."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x
