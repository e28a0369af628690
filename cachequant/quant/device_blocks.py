"""diffusers' blocks on the GPU: the structures of `cachequant.quant.blocks`, with GPU operators between the products.

Every activation is read once and written once: normalise + activate + quantise in one operator, residuals, shortcuts and the
second half of a decoder concat in the epilogue of a product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cachequant.kernels.cuda import ops
from cachequant.quant import blocks
from cachequant.quant.device_layers import DeviceLayer, nchw, nhwc


def normalise(
    norm: Any,
    parts: list[Tensor],
    reader: DeviceLayer,
    shift: Tensor | None,
    activate: bool,
    shortcut: DeviceLayer | None = None,
) -> list[Tensor]:
    """GroupNorm (+ shift before it, + SiLU behind it) of [B, H, W, C_i], as the integers that `reader` takes.

    Behind them those of the parts themselves that `shortcut`, a 1×1 convolution, takes.
    """
    raw, border = None if shortcut is None else shortcut.grids, list(reader.pad)
    return ops.group_norm_int8(
        parts, shift, norm.weight, norm.bias, norm.num_groups, norm.eps, activate, reader.grids, border, raw
    )


class DeviceResnet(blocks.FusedResnet):
    """`ResnetBlock2D`: six launches, nothing between two products but one operator."""

    def forward(self: Any, input_tensor: Any, temb: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        """[B, I, H, W], or its two halves behind a decoder concat, and the embedding [B, E] -> [B, O, H, W]."""
        halves = input_tensor if isinstance(input_tensor, tuple) else self.conv1.segments(input_tensor)
        parts = [nhwc(half) for half in halves]
        dtype = parts[0].dtype
        shortcut = self.conv_shortcut
        made = normalise(self.norm1, parts, self.conv1, None, True, shortcut)
        hidden = self.conv1.output(made[: len(parts)], dtype)  # [B, H, W, O]
        shift = None
        if temb is not None and self.conv1.time is not None:
            shift = self.conv1.time.of(self, temb).expand(len(temb), -1)  # [B, O]
        elif temb is not None and self.time_emb_proj is not None:
            shift = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb)).contiguous()
        integers = normalise(self.norm2, [hidden], self.conv2, shift, True)
        plus = parts[0] if shortcut is None else shortcut.output(made[len(parts) :], dtype)
        out = nchw(self.conv2.output(integers, dtype, plus))
        return out if self.output_scale_factor == 1.0 else out.div_(self.output_scale_factor)


class DeviceAttention2d(blocks.FusedAttention2d):
    """diffusers' `Attention` over the pixels of an image."""

    def forward(
        self: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kw: Any
    ) -> Any:
        """[B, C, H, W] -> the same shape."""
        if (
            hidden_states.dim() != 4
            or encoder_hidden_states is not None
            or kw.get("attention_mask") is not None
            or args
        ):
            return super().forward(hidden_states, encoder_hidden_states, *args, **kw)
        x = nhwc(hidden_states)  # [B, H, W, C]
        operands = project(
            (self.to_q, self.to_k, self.to_v),
            lambda layer: normalise(self.group_norm, [x], layer, None, False)[0].flatten(1, 2),
            x.dtype,
        )
        plus = x.flatten(1, 2) if self.residual_connection else None
        out = nchw(attend(self, operands, plus).view(x.shape))
        return out if self.rescale_output_factor == 1.0 else out.div_(self.rescale_output_factor)


class DeviceTransformerBlock(blocks.FusedTransformerBlock):
    """`BasicTransformerBlock`: LayerNorm + quantise, GEGLU + quantise, residuals in the epilogues; DiT's too."""

    @staticmethod
    def fits(module: Any) -> bool:
        """A text-to-image block, or a DiT block."""
        return adaptive(module) if module.norm_type == "ada_norm_zero" else blocks.FusedTransformerBlock.fits(module)

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Any = None,
        **more: Any,
    ) -> Tensor:
        """[B, N, C] and the context [B, M, E] -> [B, N, C]."""
        if attention_mask is not None or encoder_attention_mask is not None or cross_attention_kwargs or more:
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, **more,
            )  # fmt: skip
        if self.norm_type == "ada_norm_zero":
            return adaptive_block(self, hidden_states.contiguous(), timestep, class_labels)
        x = token_attention(self.attn1, self.norm1, hidden_states.contiguous(), None)
        if self.attn2 is not None:
            x = token_attention(self.attn2, self.norm2, x, encoder_hidden_states)
        wide, narrow, norm = self.ff.net[0].proj, self.ff.net[2], self.norm3
        (q,) = ops.layer_norm_int8(x, norm.weight, norm.bias, None, None, norm.eps, wide.grids)
        inner = wide.activated(q, "geglu", narrow.grids[0])  # [B, N, F]
        return narrow.output([inner], x.dtype, x)


class DeviceTransformer(blocks.Fused):
    """`Transformer2DModel` over an image: its norm is part of the first projection, its residual of the last."""

    @staticmethod
    def fits(module: Any) -> bool:
        """Continuous input, deployed projections without a split."""
        return (
            getattr(module, "is_input_continuous", False)
            and blocks._integer(module.proj_in, module.proj_out)
            and blocks._affine(module.norm, torch.nn.GroupNorm)
            and all(len(layer.widths) == 1 for layer in (module.proj_in, module.proj_out))
        )

    def _operate_on_continuous_inputs(self: Any, hidden_states: Tensor) -> tuple[Tensor, int]:
        """[B, C, H, W] -> tokens [B, H·W, C']."""
        x = nhwc(hidden_states)
        (q,) = normalise(self.norm, [x], self.proj_in, None, False)
        tokens = self.proj_in.output([q.flatten(1, 2)], x.dtype)
        return tokens, tokens.shape[-1]

    def _get_output_for_continuous_inputs(
        self: Any, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        """Tokens [B, H·W, C'] and the block's input -> [B, C, H, W]."""
        x = nhwc(residual)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        (q,) = self.proj_out.quantize([rows if not self.proj_out.geometry.is_conv else rows[None, None]])
        out = self.proj_out.output([q.view(batch_size, height * width, -1)], x.dtype, x.flatten(1, 2))
        return nchw(out.view(x.shape))


class DeviceUpsample(blocks.FusedUpsample):
    """`Upsample2D`: every integer is written four times, inside the convolution's border."""

    def forward(self: Any, hidden_states: Tensor, output_size: Any = None, *_: Any, **__: Any) -> Tensor:
        """[B, C, H, W] -> [B, O, 2H, 2W], or `output_size`."""
        conv = blocks._conv_of(self)
        height, width = hidden_states.shape[2:]
        if output_size is not None and tuple(output_size) != (2 * height, 2 * width):
            return conv(F.interpolate(hidden_states, size=output_size, mode="nearest"))
        return nchw(conv.output(conv.quantize([nhwc(hidden_states)], upsample=2), hidden_states.dtype))


class DeviceDownsample(blocks.FusedDownsample):
    """`Downsample2D`: a border of one row and column where it does not pad evenly."""

    def forward(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """[B, C, H, W] -> [B, O, H/2, W/2]."""
        pad = (0, 1, 0, 1) if self.padding == 0 else None
        return nchw(self.conv.output(self.conv.quantize([nhwc(hidden_states)], pad=pad), hidden_states.dtype))


class DeviceGroupNorm(blocks.Fused):
    """A norm that stands alone, such as the one before a U-Net's last convolution."""

    outermost = True

    @staticmethod
    def fits(module: Any) -> bool:
        """With weight and bias."""
        return blocks._affine(module, torch.nn.GroupNorm)

    def forward(self: Any, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        if x.dim() != 4:
            return super().forward(x)  # type: ignore[misc]
        return nchw(ops.group_norm_float(nhwc(x), self.weight, self.bias, self.num_groups, self.eps))


FORWARDS: dict[str, type[blocks.Fused]] = {
    "ResnetBlock2D": DeviceResnet,
    "Attention": DeviceAttention2d,
    "BasicTransformerBlock": DeviceTransformerBlock,
    "Transformer2DModel": DeviceTransformer,
    "Upsample2D": DeviceUpsample,
    "Downsample2D": DeviceDownsample,
    "UpBlock2D": blocks.FusedUpBlock,
    "AttnUpBlock2D": blocks.FusedUpBlock,
    "CrossAttnUpBlock2D": blocks.FusedUpBlock,
    "GroupNorm": DeviceGroupNorm,
}
"""diffusers' class -> fused forward on the GPU."""


def project(layers: tuple[DeviceLayer, ...], read: Callable[[DeviceLayer], Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs [..., N_i] of layers that read the same tensor; integers that several read are made once.

    Args:
        layers: linear layers, perhaps joined.
        read: gives the integers of the tensor on a layer's grid.
        dtype: of the outputs.
    """
    made: dict[int, Tensor] = {}
    outputs: list[Tensor] = []
    while len(outputs) < len(layers):
        layer = layers[len(outputs)]
        if layer.first_grid not in made:
            made[layer.first_grid] = read(layer)
        outputs += layer.outputs(made[layer.first_grid], dtype)
    return outputs


def attend(module: Any, operands: list[Tensor], plus: Tensor | None) -> Tensor:
    """Attention of query, key and value [B, ·, C] and its output projection (+ plus): [B, N, C']."""
    out = ops.multi_head_attention(*operands, module.heads)  # [B, N, C]
    return project_out(module, out, plus)


def project_out(module: Any, x: Tensor, plus: Tensor | None) -> Tensor:
    """Output projection of an attention's [B, N, C] (+ plus): [B, N, C']."""
    last = module.to_out[0]
    (made,) = last.quantize([x.flatten(0, 1)])
    return last.output([made.view(x.shape)], x.dtype, plus)


def token_attention(module: Any, norm: Any, x: Tensor, context: Tensor | None) -> Tensor:
    """x + attention(LayerNorm(x), context): [B, N, C]."""
    layers = (module.to_q, module.to_k, module.to_v)

    def normed(layer: DeviceLayer) -> Tensor:
        return ops.layer_norm_int8(x, norm.weight, norm.bias, None, None, norm.eps, layer.grids)[0]

    if context is None:
        return attend(module, project(layers, normed, x.dtype), x)
    held = None if module.to_k.context is None else module.to_k.context.held(module, context)
    operands = held or context_operands(module, context.to(x.dtype))
    if context.shape[1] == 1:  # whatever the query, all attention is on the one token
        return x + project_out(module, operands[1].contiguous(), None)
    return attend(module, project(layers[:1], normed, x.dtype) + operands, x)


def context_operands(module: Any, context: Tensor) -> list[Tensor]:
    """Key and value [B, M, C] of a cross-attention from its context [B, M, E]."""
    rows = context.flatten(0, 1).contiguous()
    return project(
        (module.to_k, module.to_v), lambda layer: layer.quantize([rows])[0].view(context.shape), context.dtype
    )


def adaptive(module: Any) -> bool:
    """Whether a block is DiT's: adaptive norms without parameters, self-attention, a tanh GELU, all deployed."""
    net = module.ff.net
    return (
        module.attn2 is None
        and module.pos_embed is None
        and blocks._plain_attention(module.attn1)
        and not module.attn1.residual_connection
        and module.attn1.group_norm is None
        and module.norm3.weight is None
        and type(net[0]).__name__ == "GELU"
        and blocks._integer(net[0].proj, net[2])
        and len(net) == 3
    )


def adaptive_block(block: Any, x: Tensor, timestep: Any, class_labels: Any) -> Tensor:
    """x + gate·attention(modulated norm of x), then the same with the feed-forward layer: [B, N, C]."""
    ada, net = block.norm1, block.ff.net
    joint = net[0].proj.time
    if joint is not None:
        parts = joint.of(block, timestep, class_labels, x.dtype)  # [6, B, C]
    else:
        embedding = ada.emb(timestep, class_labels, hidden_dtype=x.dtype)
        parts = ada.linear(ada.silu(embedding)).unflatten(1, (6, -1)).transpose(0, 1).contiguous()
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
    operands = project(
        (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v),
        lambda layer: ops.layer_norm_int8(x, None, None, scale, shift, ada.norm.eps, layer.grids)[0],
        x.dtype,
    )
    wide, narrow = net[0].proj, net[2]
    attention = attend(block.attn1, operands, None)
    x, (q,) = ops.gated_layer_norm_int8(x, attention, gate, scale_mlp, shift_mlp, block.norm3.eps, wide.grids)
    inner = wide.activated(q, "gelu_tanh" if net[0].approximate == "tanh" else "gelu", narrow.grids[0])  # [B, N, F]
    return ops.gated_sum(x, narrow.output([inner], x.dtype), gate_mlp)
