"""Scales, shifts and gates of all adaptive norms of a DiT in a handful of launches a step, not a dozen a block."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cachequant.quant.once_a_forward import OnceAForward


class AdaptiveConditions:
    """What `norm1.emb` and `norm1.linear` of several blocks make of timestep and class, when the first of them asks.

    Every block has embeddings of its own, of equal shapes: their weights become views of stacked ones until `release`, and
    one batched product serves all blocks.

    Args:
        blocks: with an `AdaLayerNormZero` of plain linear layers.
    """

    def __init__(self, blocks: Sequence[Any]) -> None:
        norms = [block.norm1 for block in blocks]
        self.place = {id(block): i for i, block in enumerate(blocks)}
        self.time_proj = norms[0].emb.time_proj
        embedders = [norm.emb.timestep_embedder for norm in norms]
        self._layers = [[e.linear_1 for e in embedders], [e.linear_2 for e in embedders], [n.linear for n in norms]]
        self._tables = [norm.emb.class_embedder.embedding_table for norm in norms]
        self.weights = [_stacked(layers) for layers in self._layers]  # [L, O, I] each
        self.biases = [torch.stack([layer.bias.detach() for layer in layers])[:, None] for layers in self._layers]
        self.classes = _stacked(self._tables)  # [L, K, C]
        self._once = OnceAForward(self._compute)

    def of(self, block: Any, timestep: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """shift, scale, gate of the attention, then of the feed-forward layer: [6, B, C].

        Args:
            block: one of those that were joined.
            timestep, labels: [B].
            dtype: of the network.
        """
        return self._once.of(id(block), timestep, labels, dtype)[self.place[id(block)]]

    def _compute(self, timestep: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """[L, 6, B, C]."""
        x = self.time_proj(timestep).to(dtype).expand(len(self.place), -1, -1)  # [L, B, F]
        x = F.silu(self._product(0, x))  # [L, B, C]
        x = F.silu(self._product(1, x) + self.classes.to(dtype)[:, labels])
        return self._product(2, x).unflatten(2, (6, -1)).transpose(1, 2).contiguous()

    def _product(self, i: int, x: Tensor) -> Tensor:
        """Linear layer `i` of all blocks: [L, B, I] -> [L, B, O]."""
        return torch.baddbmm(self.biases[i].to(x.dtype), x, self.weights[i].to(x.dtype).transpose(1, 2))

    def release(self) -> None:
        """Give every layer memory of its own again."""
        for module in (*self._tables, *(layer for layers in self._layers for layer in layers)):
            module.weight.data = module.weight.data.clone()


def share_adaptive_conditions(network: nn.Module, shallow: Collection[str] = ()) -> list[AdaptiveConditions]:
    """Join the conditions of the blocks that a cached step runs, and those of the others.

    Args:
        network: with deployed layers; a block's first feed-forward projection carries the joint ones as `time`.
        shallow: names of the modules that a cached step runs.
    """
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for name, module in network.named_modules():
        block: Any = module
        if type(module).__name__.endswith("BasicTransformerBlock") and _joins(block):
            groups[name in shallow].append(block)
    made = []
    for blocks in groups.values():
        if len(blocks) > 1:
            made.append(AdaptiveConditions(blocks))
            for block in blocks:
                block.ff.net[0].proj.time = made[-1]
    return made


def _joins(block: Any) -> bool:
    """Plain layers between timestep and modulation, no label dropped, a deployed layer to carry the joint ones."""
    embeddings = getattr(getattr(block, "norm1", None), "emb", None)
    if getattr(block, "norm_type", "") != "ada_norm_zero" or embeddings is None:
        return False
    embedder = embeddings.timestep_embedder
    return (
        all(type(layer) is nn.Linear for layer in (embedder.linear_1, embedder.linear_2, block.norm1.linear))
        and all(layer.bias is not None for layer in (embedder.linear_1, embedder.linear_2, block.norm1.linear))
        and isinstance(embedder.act, nn.SiLU)
        and embedder.post_act is None
        and not block.training
        and hasattr(block.ff.net[0].proj, "time")
    )


def _stacked(modules: Sequence[Any]) -> Tensor:
    """The weights of modules of one shape, stacked, whose rows the modules read from now on."""
    stacked = torch.stack([module.weight.detach() for module in modules])
    for module, weight in zip(modules, stacked, strict=True):
        module.weight.data = weight
    return stacked
