"""Δ caching for transformers: a view of the network whose middle blocks are replaced by what they added.

A transformer has no skip over its blocks, so a stale hidden state cannot stand in for a fresh one. What a span of blocks
adds to it can: Δ = (hidden state behind the span) - (hidden state before it) changes slowly with the step (Δ-DiT, Chen et
al. 2024, section 4.1). A cached step runs the other blocks and adds the stored Δ where the span was.

Nothing is forked: the view is the same class with a shorter list of blocks, sharing every module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from cachequant.cache.deepcache import shallow_copy
from cachequant.errors import UserError

BLOCKS = "transformer_blocks"
Span = tuple[int, int]


class AddDelta(nn.Module):
    """Stands where the span stood and adds the Δ it was given.

    Args:
        replaced: the network's first block, where the span begins with it. diffusers' DiT computes the condition of its
            head with this block's embedding, which is therefore kept.
    """

    def __init__(self, replaced: nn.Module | None = None) -> None:
        super().__init__()
        self.delta: Tensor | None = None
        if replaced is not None:
            self.norm1 = nn.Module()
            self.norm1.emb = replaced.get_submodule("norm1.emb")

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """[B, tokens, C] -> [B, tokens, C]."""
        if self.delta is None:
            raise RuntimeError("the shallow network ran before a Δ was set")
        return hidden_states + self.delta


def block_list(transformer: nn.Module) -> list[nn.Module]:
    """The transformer's blocks in forward order."""
    return list(getattr(transformer, BLOCKS))


def middle_span(count: int) -> Span:
    """The middle half of `count` blocks: 7 … 20 of DiT-XL's 28 (CacheQuant: I = 7, N_c = 14)."""
    skipped = count // 4
    return skipped, count - skipped - 1


def checked_span(transformer: nn.Module, span: Sequence[int] | None) -> Span:
    """First and last cached block, 0-based and both inside; None is the middle half.

    Raises:
        UserError: the transformer has no such blocks, or nothing would be left to run on cached steps.
    """
    count = len(block_list(transformer))
    wanted = middle_span(count) if span is None else tuple(span)
    first, last = wanted if len(wanted) == 2 else (-1, -1)
    if not 0 <= first <= last < count or last - first + 1 == count:
        raise UserError(
            f"cache.span is {list(wanted)}, expected first and last cached block within 0 to {count - 1} and at least "
            "one block outside: correct cache.span"
        )
    return first, last


def delta_view(transformer: nn.Module, span: Span) -> tuple[nn.Module, AddDelta]:
    """The network of a cached step and the module through which its Δ is set."""
    blocks, (first, last) = block_list(transformer), span
    entry = AddDelta(blocks[0] if first == 0 else None)
    view = shallow_copy(transformer)
    view._modules[BLOCKS] = nn.ModuleList([*blocks[:first], entry, *blocks[last + 1 :]])
    return view, entry


def outer_module_names(transformer: nn.Module, span: Span) -> set[str]:
    """Names, in the whole network, of the modules that a cached step runs."""
    view, entry = delta_view(transformer, span)
    kept = {id(m) for m in view.modules()} - {id(view), id(entry)}
    return {name for name, module in transformer.named_modules() if id(module) in kept}
