"""Attention with quantised operands: query, key, value and the softmax output (CacheQuant section 4.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.quant.layers import Mode
from cachequant.quant.observer import StepQuantizer
from cachequant.types import ActivationTable

OPERANDS = ("query", "key", "value", "probabilities")


class QuantAttention:
    """A diffusers attention processor whose matrix products read quantised operands.

    Args:
        original: the processor that it replaces; it runs in the modes that do not quantise.
        tables: operand -> table; missing ones are observed.
        bits: grid size of operands without a table.
        search: range search.
        clock: tells the step.
    """

    def __init__(
        self, original: Any, tables: dict[str, ActivationTable], bits: int, search: str, clock: FeatureCache
    ) -> None:
        self.original, self.clock, self.mode = original, clock, Mode.QUANTIZED
        self.quantizers = {
            name: StepQuantizer(tables[name].bits if name in tables else bits, search, tables.get(name))
            for name in OPERANDS
        }

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """diffusers' processor contract: [B, C, H, W] or [B, n, C] in, the same shape out."""
        if self.mode in (Mode.FLOAT, Mode.RECORD, Mode.PAIR):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **kwargs)
        module: Any = attn
        residual, shape = hidden_states, hidden_states.shape
        if module.spatial_norm is not None:
            hidden_states = module.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # [B, HW, C]
        if module.group_norm is not None:
            hidden_states = module.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and module.norm_cross:
            context = module.norm_encoder_hidden_states(context)
        batch, length, _ = context.shape
        mask = module.prepare_attention_mask(attention_mask, length, batch)  # [B·heads, 1, n] or None
        query = self._heads(module, module.to_q(hidden_states), "query")  # [B·heads, m, d]
        key = self._heads(module, module.to_k(context), "key")
        value = self._heads(module, module.to_v(context), "value")
        probabilities = self._operand(module.get_attention_scores(query, key, mask), "probabilities")
        hidden_states = module.batch_to_head_dim(torch.bmm(probabilities, value))  # [B, m, C]
        hidden_states = module.to_out[1](module.to_out[0](hidden_states))
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(1, 2).reshape(shape)
        if module.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / module.rescale_output_factor

    def _heads(self, module: Any, x: Tensor, name: str) -> Tensor:
        return self._operand(module.head_to_batch_dim(x), name)

    def _operand(self, x: Tensor, name: str) -> Tensor:
        if self.mode is Mode.OBSERVE:
            self.quantizers[name].observe(x)
            return x
        return self.quantizers[name].fake(x, self.clock.step)
