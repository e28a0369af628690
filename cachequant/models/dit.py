"""Adapter for diffusers' class-conditional transformer (`DiTTransformer2DModel`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cachequant.cache.delta_dit import BLOCKS, block_list, checked_span, delta_view, outer_module_names
from cachequant.models.adapter import Consumer, FullStep, Tap
from cachequant.types import AffineMap


class DiTAdapter:
    """Caches what a span of blocks adds; see `cachequant.models.adapter.Adapter` for the contract.

    Args:
        denoiser: the transformer.
        span: first and last cached block, 0-based; None is the middle half (the paper's choice for 28 blocks).

    Raises:
        UserError: the transformer has no such span.
    """

    channel_dim = 2

    def __init__(self, denoiser: nn.Module, span: Sequence[int] | None = None) -> None:
        self.denoiser = denoiser
        self._forward = type(denoiser).forward
        self.span = checked_span(denoiser, span)
        self.width = int(denoiser.inner_dim)  # type: ignore[arg-type]
        self.rebuild()

    def rebuild(self) -> None:
        """Make a fresh view, after modules were replaced."""
        self._view, self._entry = delta_view(self.denoiser, self.span)

    def full(self, x: Tensor, timestep: Any, cond: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Whole network, and the span's Δ beside it: ([B, C, H, W], [B, tokens, width])."""
        with self.tapped() as run:
            return run(x, timestep, cond, **kwargs)

    @contextmanager
    def tapped(self) -> Iterator[FullStep]:
        """Inside, `full` with its taps around the span left in place between calls, as torch.compile needs it."""
        before, behind = Tap(), Tap()
        blocks, (first, last) = block_list(self.denoiser), self.span

        def run(x: Tensor, timestep: Any, cond: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
            output = self._run(self.denoiser, x, timestep, cond, kwargs)
            return output, behind.take() - before.take()

        handles = (
            blocks[first].register_forward_pre_hook(lambda _, inputs: before.put(inputs[0])),
            blocks[last].register_forward_hook(lambda _, __, output: behind.put(output)),
        )
        try:
            yield run
        finally:
            for handle in handles:
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
        """Embedding, the blocks outside the span with the (corrected) Δ added where it was, and head: [B, C, H, W]."""
        delta = cached_feature
        if correction is not None:
            delta = correction.apply(cached_feature, channel_dim=self.channel_dim)
        self._entry.delta = delta
        try:
            return self._run(self._view, x, timestep, cond, kwargs)
        finally:
            self._entry.delta = None

    def _run(self, network: nn.Module, x: Tensor, timestep: Any, cond: Any, kwargs: dict[str, Any]) -> Tensor:
        """One call of the class's own forward, past any wrapper installed on the instance."""
        if cond is not None:
            kwargs = {**kwargs, "class_labels": cond}
        steps = torch.as_tensor(timestep, device=x.device).reshape(-1).expand(len(x))  # [B], which the embedding needs
        return self._forward(network, x, steps, **{**kwargs, "return_dict": False})[0]

    def pack(self, output: Tensor, return_dict: bool) -> Any:
        """The output as the network's own forward returns it."""
        if not return_dict:
            return (output,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=output)

    def shallow_names(self) -> set[str]:
        """Names of the modules that a cached step runs."""
        return outer_module_names(self.denoiser, self.span)

    def end_names(self) -> set[str]:
        """The patch embedding and the last projection: what reads x_t and what writes the prediction."""
        return {"pos_embed.proj", "proj_out_2"}

    def time_names(self) -> set[str]:
        """Embedding of timestep and class, and every projection of it to the scales and shifts of adaptive norms."""
        parts = ("norm1.emb.timestep_embedder.linear_1", "norm1.emb.timestep_embedder.linear_2", "norm1.linear")
        blocks = range(len(block_list(self.denoiser)))
        return {"proj_out_1", *(f"{BLOCKS}.{i}.{part}" for i in blocks for part in parts)}

    def splits(self) -> dict[str, int]:
        """A transformer concatenates nothing."""
        return {}

    def consumers(self) -> tuple[Consumer, ...]:
        """The first linear layers that read x + Δ: query, key and value of the block behind the span, or the head.

        What they read is normalised over all channels of x + Δ together, so the whole input counts as cached. The
        residual path takes x + Δ on without a product.
        """
        behind = self.span[1] + 1
        if behind == len(block_list(self.denoiser)):
            names = ["proj_out_2"]
        else:
            names = [f"{BLOCKS}.{behind}.attn1.{part}" for part in ("to_q", "to_k", "to_v")]
        return tuple(Consumer(name, self.width, self.width) for name in names)

    def guided(self, kwargs: dict[str, Any]) -> bool | None:
        """Whether some rows of a call carry the null class, which stands for no condition."""
        labels = kwargs.get("class_labels")
        if not isinstance(labels, Tensor):
            return None
        null: int = self.denoiser.config.num_embeds_ada_norm  # type: ignore[union-attr,assignment]
        return bool((labels == null).any())
