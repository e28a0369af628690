"""diffusers' blocks around deployed layers, with everything between two integer products in one pass.

A block that fits gets a subclass of its own class whose forward is the fused one: attributes, names and hooks stay, nothing
is forked, and `unfuse` gives the class back. What a fused forward does not cover (masks, FreeU) runs the class's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cachequant.kernels.cpu import rows_of
from cachequant.kernels.fused import Grid, Sum, attention, geglu, group_norm, layer_norm, quantize

ROWS = 1024
"""Rows of a feed-forward layer that are in flight at once: its wide hidden state then stays in the processor's cache."""


def pixels(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H·W, C]; a view of channels-last memory."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1]).contiguous()


def image(x: Tensor, like: Tensor) -> Tensor:
    """[B, H·W, C] -> [B, C, H, W] in channels-last memory, with the height and width of `like`."""
    return x.view(x.shape[0], like.shape[2], like.shape[3], x.shape[2]).permute(0, 3, 1, 2)


def nhwc(x: Tensor) -> Tensor:
    """The same image in channels-last memory."""
    return x.contiguous(memory_format=torch.channels_last)


class Fused:
    """What all fused forwards share.

    Attributes:
        outermost: whether it is of use only outside other fused blocks.
    """

    outermost = False

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether a module's structure is the one this forward computes."""
        raise NotImplementedError


class FusedResnet(Fused):
    """`ResnetBlock2D`: normalise + SiLU + quantise in one pass, the time embedding in it, the residual in an epilogue."""

    @staticmethod
    def fits(module: Any) -> bool:
        """A plain resnet with deployed convolutions."""
        shortcut = module.conv_shortcut
        return (
            _integer(module.conv1, module.conv2)
            and (shortcut is None or (_integer(shortcut) and shortcut.widths == module.conv1.widths))
            and all(_affine(n, nn.GroupNorm) for n in (module.norm1, module.norm2))
            and isinstance(module.nonlinearity, nn.SiLU)
            and module.upsample is None
            and module.downsample is None
            and module.time_embedding_norm == "default"
        )

    def forward(self: Any, input_tensor: Any, temb: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        """[B, I, H, W], or its two halves behind a decoder concat, and the embedding [B, E] -> [B, O, H, W]."""
        halves = input_tensor if isinstance(input_tensor, tuple) else self.conv1.segments(input_tensor)
        parts = tuple(nhwc(half) for half in halves)
        hidden = self.conv1.open(_normalise(self.norm1, parts, self.conv1.grids()))  # [B·P, O]
        shift = None
        if temb is not None and self.conv1.time is not None:
            shift = self.conv1.time.of(self, temb).float()  # [1, O]
        elif temb is not None and self.time_emb_proj is not None:
            shift = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))  # [B, O]
        norm, batch = self.norm2, len(parts[0])
        hidden = Sum(tuple(rows.view(batch, -1, rows.shape[1]) for rows in hidden.dense), hidden.sums, hidden.columns)
        (q,) = group_norm(
            (hidden,), norm.weight, norm.bias, norm.num_groups, norm.eps, True, self.conv2.grids(), shift
        )  # [B, P, O]
        out = self._residual(image(q, parts[0]), parts)
        return out if self.output_scale_factor == 1.0 else out.div_(self.output_scale_factor)

    def _residual(self: Any, q: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """The second convolution and what it is added to."""
        shortcut = self.conv_shortcut
        if shortcut is None:
            return self.conv2.output((q,), rows_of(parts[0], self.conv2.geometry))
        out = self.conv2.output((q,))
        return shortcut.output(shortcut.quantize(parts), rows_of(out, shortcut.geometry), reuse=True)


class FusedAttention2d(Fused):
    """diffusers' `Attention` over the pixels of an image: normalise + quantise once, attention in blocks, residual fused."""

    @staticmethod
    def fits(module: Any) -> bool:
        """Self-attention with a group norm, deployed projections and the plain processor."""
        return _plain_attention(module) and _affine(module.group_norm, nn.GroupNorm)

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
            return super().forward(hidden_states, encoder_hidden_states, *args, **kw)  # type: ignore[misc]
        x = nhwc(hidden_states)
        layers = (self.to_q, self.to_k, self.to_v)
        grids = _distinct(layers)
        normed = {g: _normalise(self.group_norm, (x,), (g,), activate=False)[0] for g in grids}
        q, k, v = (layer.output((pixels(normed[layer.grids()[0]]),)) for layer in layers)
        plus = pixels(x) if self.residual_connection else None
        out = image(_attend(self, q, k, v, plus), x)
        return out if self.rescale_output_factor == 1.0 else out.div_(self.rescale_output_factor)


class FusedTransformerBlock(Fused):
    """`BasicTransformerBlock`: LayerNorm + quantise in one pass, attention in blocks, GEGLU a few rows at a time."""

    @staticmethod
    def fits(module: Any) -> bool:
        """Plain layer norms, self- (and cross-) attention and a GEGLU feed-forward, all deployed."""
        attentions = [a for a in (module.attn1, module.attn2) if a is not None]
        norms = [module.norm1, module.norm3, *([module.norm2] if module.attn2 is not None else [])]
        net = module.ff.net
        return (
            module.norm_type == "layer_norm"
            and module.pos_embed is None
            and not module.only_cross_attention
            and not hasattr(module, "fuser")
            and all(_plain_attention(a) and not a.residual_connection and a.group_norm is None for a in attentions)
            and all(_affine(n, nn.LayerNorm) for n in norms)
            and type(net[0]).__name__ == "GEGLU"
            and _integer(net[0].proj, net[2])
            and len(net) == 3
        )

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
            return super().forward(  # type: ignore[misc]
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, **more,
            )  # fmt: skip
        x = hidden_states.contiguous()
        x = _token_attention(self.attn1, self.norm1, x, None)
        if self.attn2 is not None:
            x = _token_attention(self.attn2, self.norm2, x, encoder_hidden_states)
        return _feed_forward(self.ff.net[0].proj, self.ff.net[2], self.norm3, x)


class FusedUpBlock(Fused):
    """The decoder blocks whose resnets read concat(h, skip): the halves are handed on as they are."""

    @staticmethod
    def fits(module: Any) -> bool:
        """Every resnet is fused and takes two halves."""
        resnets: list[Any] = list(module.resnets)
        return (
            bool(resnets)
            and all(isinstance(r, FusedResnet) for r in resnets)
            and all(len(r.conv1.widths) == 2 for r in resnets)
        )

    def forward(
        self: Any,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        *args: Any,
        upsample_size: Any = None,
        **conditioning: Any,
    ) -> Tensor:
        """h [B, C, H, W] and the skips, last one first -> the block's output."""
        if args or all(getattr(self, name, None) for name in ("s1", "s2", "b1", "b2")):  # FreeU changes the halves
            more = {"upsample_size": upsample_size, **conditioning}
            return super().forward(hidden_states, res_hidden_states_tuple, temb, *args, **more)  # type: ignore[misc]
        attentions = getattr(self, "attentions", None)
        for i, resnet in enumerate(self.resnets):
            skip = res_hidden_states_tuple[-1 - i]
            hidden_states = resnet((hidden_states, skip), temb)
            if attentions is not None:
                made = attentions[i](hidden_states, **({**conditioning, "return_dict": False} if conditioning else {}))
                hidden_states = made[0] if isinstance(made, tuple) else made
        for upsampler in self.upsamplers or ():
            hidden_states = upsampler(hidden_states, upsample_size)
        return hidden_states


class FusedUpsample(Fused):
    """`Upsample2D`: integers are repeated instead of floats, a quarter of the bytes."""

    @staticmethod
    def fits(module: Any) -> bool:
        """Nearest neighbour followed by a deployed convolution."""
        return (
            module.norm is None and module.interpolate and not module.use_conv_transpose and _integer(_conv_of(module))
        )

    def forward(self: Any, hidden_states: Tensor, output_size: Any = None, *_: Any, **__: Any) -> Tensor:
        """[B, C, H, W] -> [B, O, 2H, 2W], or `output_size`."""
        conv = _conv_of(self)
        (q,) = conv.quantize((hidden_states,))
        scale = 2.0 if output_size is None else None
        return conv.output((nhwc(F.interpolate(q, size=output_size, scale_factor=scale, mode="nearest")),))


class FusedDownsample(Fused):
    """`Downsample2D`: the asymmetric padding is done on integers, with the zero point."""

    @staticmethod
    def fits(module: Any) -> bool:
        """A deployed strided convolution."""
        return module.norm is None and module.use_conv and _integer(module.conv)

    def forward(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """[B, C, H, W] -> [B, O, H/2, W/2]."""
        (q,) = self.conv.quantize((hidden_states,))
        if self.padding == 0:
            q = nhwc(F.pad(q, (0, 1, 0, 1), value=self.conv.grids()[0].zero_point))
        return self.conv.output((q,))


FORWARDS: dict[str, type[Fused]] = {
    "ResnetBlock2D": FusedResnet,
    "Attention": FusedAttention2d,
    "BasicTransformerBlock": FusedTransformerBlock,
    "Upsample2D": FusedUpsample,
    "Downsample2D": FusedDownsample,
    "UpBlock2D": FusedUpBlock,
    "AttnUpBlock2D": FusedUpBlock,
    "CrossAttnUpBlock2D": FusedUpBlock,
}
"""diffusers' class -> fused forward; the blocks that hold others come last."""


def fuse(network: nn.Module, forwards: dict[str, type[Fused]] = FORWARDS) -> dict[str, str]:
    """Give every block that fits its fused forward: name -> what it was. Deployed layers must stand in it already."""
    fused: dict[str, str] = {}
    for kind, mixin in forwards.items():
        for name, module in network.named_modules():
            within = mixin.outermost and any(name.startswith(f"{block}.") for block in fused)
            if type(module).__name__ == kind and not within and mixin.fits(module):
                module.__class__ = type(f"Fused{kind}", (mixin, type(module)), {})
                fused[name] = kind
    return fused


def unfuse(network: nn.Module, names: Sequence[str]) -> None:
    """Give the blocks their own class back."""
    for name in names:
        module = network.get_submodule(name)
        module.__class__ = type(module).__bases__[1]


def _integer(*layers: Any) -> bool:
    return all(getattr(layer, "deployed", False) for layer in layers)


def _affine(norm: Any, kind: type[nn.Module]) -> bool:
    """A norm of this kind with weight and bias; the CPU's operators read float32 ones."""
    return isinstance(norm, kind) and all(
        p is not None and (p.dtype == torch.float32 or p.is_cuda) for p in (norm.weight, norm.bias)
    )


def _plain_attention(module: Any) -> bool:
    """Deployed projections, diffusers' own processor, nothing on the operands."""
    return (
        type(module.processor).__name__ in ("AttnProcessor", "AttnProcessor2_0")
        and _integer(module.to_q, module.to_k, module.to_v, module.to_out[0])
        and all(getattr(module, name, None) is None for name in ("norm_q", "norm_k", "spatial_norm"))
        and not module.norm_cross
        and all(len(layer.widths) == 1 for layer in (module.to_q, module.to_k, module.to_v, module.to_out[0]))
    )


def _conv_of(module: Any) -> Any:
    return module.conv if module.name == "conv" else module.Conv2d_0


def _normalise(
    norm: Any,
    parts: tuple[Tensor, ...],
    grids: tuple[Grid, ...],
    activate: bool = True,
) -> tuple[Tensor, ...]:
    """`group_norm` of images [B, C_i, H, W]."""
    flat = tuple(pixels(part) for part in parts)
    made = group_norm(flat, norm.weight, norm.bias, norm.num_groups, norm.eps, activate, grids)
    return tuple(image(q, parts[0]) for q in made)


def _distinct(layers: Sequence[Any]) -> tuple[Grid, ...]:
    """The different grids of layers that read the same tensor, usually one."""
    return tuple(dict.fromkeys(layer.grids()[0] for layer in layers))


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, plus: Tensor | None) -> Tensor:
    """Attention and its output projection: [B, N, C]."""
    out = module.to_out[0]
    (grid,) = out.grids()
    q = attention(query, key, value, module.heads, (query.shape[2] // module.heads) ** -0.5, grid)
    return out.output((q,), None if plus is None else plus.flatten(0, 1))


def _token_attention(module: Any, norm: Any, x: Tensor, context: Tensor | None) -> Tensor:
    """x + attention(LayerNorm(x), context): [B, N, C]."""
    layers = (module.to_q, module.to_k, module.to_v)
    readers = layers if context is None else layers[:1]
    grids = _distinct(readers)
    made = layer_norm(x.flatten(0, 1), norm.weight, norm.bias, norm.eps, grids)
    normed = {grid: q.view(x.shape) for grid, q in zip(grids, made, strict=True)}
    operands = [layer.output((normed[layer.grids()[0]],)) for layer in readers]
    if context is not None:
        seen = {grid: quantize(context.float().contiguous(), grid) for grid in _distinct(layers[1:])}
        operands += [layer.output((seen[layer.grids()[0]],)) for layer in layers[1:]]
    query, key, value = operands
    return _attend(module, query, key, value, x)


def _feed_forward(wide: Any, narrow: Any, norm: Any, x: Tensor) -> Tensor:
    """x + narrow(GEGLU(wide(LayerNorm(x)))), a few rows at a time: [B, N, C]."""
    rows = x.flatten(0, 1)  # [R, C]
    out = torch.empty_like(rows)
    (grid,), (inner,) = wide.grids(), narrow.grids()
    for part, target in zip(rows.split(ROWS), out.split(ROWS), strict=True):
        (q,) = layer_norm(part, norm.weight, norm.bias, norm.eps, (grid,))
        target.copy_(narrow.output((geglu(wide.output((q,)), inner),), part))
    return out.view(x.shape)
