"""Scales, shifts and gates of all adaptive norms of a DiT in a handful of launches a step, not a dozen a block."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.kernels.cuda.reference import quantize
from cachequant.quant.device_layers import DeviceLayer
from cachequant.quant.once_a_forward import OnceAForward
from cachequant.quant.step_tables import StepTables


class Product(Protocol):
    """One linear layer of every block."""

    def __call__(self, x: Tensor) -> Tensor:
        """[L, B, I] -> [L, B, O]."""
        ...

    def release(self) -> None:
        """Give back what was taken of the layers."""
        ...


class Embedding(Protocol):
    """What every block makes of the timestep."""

    def __call__(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """Timesteps [B] -> [L, B, C], or [L, 1, C] where all have the same timestep."""
        ...

    def release(self) -> None:
        """Give back what was taken of the embedders."""
        ...


class AdaptiveConditions:
    """What `norm1.emb` and `norm1.linear` of several blocks make of timestep and class, when the first of them asks.

    Every block has embeddings of its own, of equal shapes; the class tables become views of a stacked one until `release`.

    Args:
        blocks: with an `AdaLayerNormZero`.
        embedding: of their timesteps.
        product: their `norm1.linear`.
    """

    def __init__(self, blocks: Sequence[Any], embedding: Embedding, product: Product) -> None:
        self.place = {id(block): i for i, block in enumerate(blocks)}
        self.embedding, self.product = embedding, product
        self._tables = [block.norm1.emb.class_embedder.embedding_table for block in blocks]
        self.classes = _stacked(self._tables)  # [L, K, C]
        self._once = OnceAForward(self._compute)

    @staticmethod
    def of_blocks(
        blocks: Sequence[Any], clock: FeatureCache, tables: StepTables, timesteps: Sequence[int] | None
    ) -> AdaptiveConditions:
        """Conditions of blocks whose layers are plain or, where `timesteps` are known, deployed.

        Args:
            blocks: of `AdaptiveConditions`.
            clock: tells the step.
            tables: frozen.
            timesteps: of all steps, whose embeddings are tabled; None computes them at every step.
        """
        layers = [block.norm1.linear for block in blocks]
        deployed = isinstance(layers[0], DeviceLayer)
        product = DeployedProducts(layers, tables) if deployed else PlainProduct(layers)
        tabled = None if timesteps is None else TabledEmbedding(blocks, clock, tables, timesteps)
        return AdaptiveConditions(blocks, ComputedEmbedding(blocks) if tabled is None else tabled, product)

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
        x = F.silu(self.embedding(timestep, dtype) + self.classes.to(dtype)[:, labels])  # [L, B, C]
        return self.product(x).unflatten(2, (6, -1)).transpose(1, 2).contiguous()

    def release(self) -> None:
        """Give every layer memory of its own again."""
        self.embedding.release()
        self.product.release()
        _separate(self._tables)


class PlainProduct:
    """Layers of one shape as one batched product; their weights become views of stacked ones until `release`."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._layers = layers
        self.weight = _stacked(layers)  # [L, O, I]
        self.bias = torch.stack([layer.bias.detach() for layer in layers])[:, None]  # [L, 1, O]

    def __call__(self, x: Tensor) -> Tensor:
        """[L, B, I] -> [L, B, O]."""
        return torch.baddbmm(self.bias.to(x.dtype), x, self.weight.to(x.dtype).transpose(1, 2))

    def release(self) -> None:
        """Give every layer memory of its own again."""
        _separate(self._layers)


class DeployedProducts:
    """Deployed linear layers, quantised in one go, on a grid of its own each."""

    def __init__(self, layers: Sequence[DeviceLayer], tables: StepTables) -> None:
        self._layers, self._tables = layers, tables
        self._places = torch.tensor([layer.first_grid for layer in layers], device=tables.device)

    def __call__(self, x: Tensor) -> Tensor:
        """[L, B, I] -> [L, B, O]."""
        self._tables.ensure(self._layers[0].clock.step)
        grids = self._tables.grids[self._places]  # [L, 4]
        integers = quantize(x, grids.T[:, :, None, None])  # [L, B, I]
        return torch.stack([layer.output([q], x.dtype) for layer, q in zip(self._layers, integers, strict=True)])

    def release(self) -> None:
        """The layers' own integers are read: nothing was taken."""


class ComputedEmbedding:
    """The timestep's embedding of every block, as two batched products."""

    def __init__(self, blocks: Sequence[Any]) -> None:
        embedders = [block.norm1.emb.timestep_embedder for block in blocks]
        self._count, self._project = len(blocks), blocks[0].norm1.emb.time_proj
        self._products = [PlainProduct([e.linear_1 for e in embedders]), PlainProduct([e.linear_2 for e in embedders])]

    def __call__(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """[L, B, C]."""
        x = self._project(timestep).to(dtype).expand(self._count, -1, -1)  # [L, B, F]
        return self._products[1](F.silu(self._products[0](x)))

    def release(self) -> None:
        """Give every layer memory of its own again."""
        for product in self._products:
            product.release()


class TabledEmbedding:
    """The timestep's embedding of every block at every step, computed once, with the integers of that step."""

    def __init__(
        self, blocks: Sequence[Any], clock: FeatureCache, tables: StepTables, timesteps: Sequence[int]
    ) -> None:
        self._count = len(blocks)
        rows = [_embeddings(blocks, clock, tables, step, timesteps[step]) for step in range(len(timesteps))]
        self._row = tables.follow(torch.stack(rows).flatten(1))  # [L·C] of the current step
        self._tables, self._clock = tables, clock

    def __call__(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """[L, 1, C], whatever `timestep` is: it is the step's."""
        self._tables.ensure(self._clock.step)
        return self._row.to(dtype).view(self._count, 1, -1)

    def release(self) -> None:
        """The embedders were only run: nothing was taken."""


@torch.inference_mode(False)
@torch.no_grad()
def _embeddings(blocks: Sequence[Any], clock: FeatureCache, tables: StepTables, step: int, timestep: int) -> Tensor:
    """Every block's embedding of one step's timestep: [L, C]."""
    dtype = blocks[0].norm1.emb.class_embedder.embedding_table.weight.dtype
    given = blocks[0].norm1.emb.time_proj(torch.tensor([timestep], device=tables.device)).to(dtype)  # [1, F]
    with clock.at(step):
        return torch.cat([block.norm1.emb.timestep_embedder(given) for block in blocks])


def share_adaptive_conditions(
    network: nn.Module,
    clock: FeatureCache,
    tables: StepTables,
    shallow: Collection[str] = (),
    timesteps: Sequence[int] | None = None,
) -> list[AdaptiveConditions]:
    """Join the conditions of the blocks that a cached step runs, and those of the others.

    Args:
        network: with deployed layers; a block's first feed-forward projection carries the joint ones as `time`.
        clock, tables, timesteps: of `AdaptiveConditions.of_blocks`.
        shallow: names of the modules that a cached step runs.
    """
    groups: dict[tuple[bool, type], list[Any]] = {}
    for name, module in network.named_modules():
        block: Any = module
        if type(module).__name__.endswith("BasicTransformerBlock") and _joins(block, timesteps is not None):
            groups.setdefault((name in shallow, type(block.norm1.linear)), []).append(block)
    made = []
    for blocks in groups.values():
        if len(blocks) > 1:
            made.append(AdaptiveConditions.of_blocks(blocks, clock, tables, timesteps))
            for block in blocks:
                block.ff.net[0].proj.time = made[-1]
    return made


def _joins(block: Any, tabled: bool) -> bool:
    """Plain layers between timestep and modulation, or deployed ones if `tabled`; no label dropped.

    A deployed layer carries the joint conditions.
    """
    embeddings = getattr(getattr(block, "norm1", None), "emb", None)
    if getattr(block, "norm_type", "") != "ada_norm_zero" or embeddings is None:
        return False
    embedder = embeddings.timestep_embedder
    return (
        all(_runs(layer, tabled) for layer in (embedder.linear_1, embedder.linear_2, block.norm1.linear))
        and isinstance(embedder.act, nn.SiLU)
        and embedder.post_act is None
        and not block.training
        and hasattr(block.ff.net[0].proj, "time")
    )


def _runs(layer: Any, tabled: bool) -> bool:
    return (type(layer) is nn.Linear and layer.bias is not None) or (tabled and isinstance(layer, DeviceLayer))


def _stacked(modules: Sequence[Any]) -> Tensor:
    """The weights of modules of one shape, stacked, whose rows the modules read from now on."""
    stacked = torch.stack([module.weight.detach() for module in modules])
    for module, weight in zip(modules, stacked, strict=True):
        module.weight.data = weight
    return stacked


def _separate(modules: Sequence[Any]) -> None:
    """Undo `_stacked`: memory of its own for the weight of each."""
    for module in modules:
        module.weight.data = module.weight.data.clone()
