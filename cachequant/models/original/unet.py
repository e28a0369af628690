"""U-Nets of the original code: the latent-diffusion one (`UNetModel`) and the pixel one of DDPM and DDIM (`Model`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from cachequant.errors import UserError
from cachequant.models.original.keymap import Network, Source, one_group, renamed
from cachequant.models.original.settings import at_most, need
from cachequant.models.original.taming import level_table, taming_source

_LDM_OPTIONS = {
    "image_size", "in_channels", "out_channels", "model_channels", "attention_resolutions", "num_res_blocks",
    "channel_mult", "num_heads", "num_head_channels", "use_spatial_transformer", "transformer_depth", "context_dim",
    "use_scale_shift_norm", "resblock_updown", "use_new_attention_order", "use_checkpoint", "legacy", "dropout",
    "use_fp16",
}  # fmt: skip
_LDM_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_LDM_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_LDM_LEAVES = {
    "resnets": _LDM_RESNET,
    "downsamplers": {**_LDM_RESNET, "conv": "op"},
    "upsamplers": _LDM_RESNET,
    "attentions": {"group_norm": "norm", "to_out.0": "proj_out"},
}
_FUSED = {"to_q": 0, "to_k": 1, "to_v": 2}


def ldm_unet(options: Mapping[str, Any], sample_size: int) -> Network:
    """The denoiser of latent diffusion, with cross attention (`UNet2DConditionModel`) or without (`UNet2DModel`).

    Args:
        options: `unet_config.params` of the original YAML.
        sample_size: latent pixels of an image's side.

    Raises:
        UserError: an option is missing, or one that this mapping does not know.
    """
    at_most(options, _LDM_OPTIONS, "unet_config.params")
    layers, factors, resolutions = (
        need(options, key, "unet_config.params") for key in ("num_res_blocks", "channel_mult", "attention_resolutions")
    )
    attended = [2**level in resolutions for level in range(len(factors))]
    build = _build_crossed if options.get("use_spatial_transformer") else _build_plain
    groups = one_group if options.get("use_new_attention_order") else partial(_heads, options)

    def source(name: str) -> Source:
        return _ldm_source(name, places, groups)

    places = _ldm_places(layers, attended)
    return Network("unet", "denoiser", partial(build, options, attended, sample_size), "model.diffusion_model.", source)


def _ldm_places(layers: int, attended: Sequence[bool]) -> dict[str, str]:
    """Our blocks -> their places in the original's two flat lists of blocks."""
    places = dict(_LDM_ENDS)
    for level, attends in enumerate(attended):
        first = 1 + level * (layers + 1)  # the stem is input_blocks.0
        for layer in range(layers):
            places[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{first + layer}.0"
            places[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{first + layer}.1"
        places[f"down_blocks.{level}.downsamplers.0"] = f"input_blocks.{first + layers}.0"
        block = len(attended) - 1 - level
        first = block * (layers + 1)
        for layer in range(layers + 1):
            places[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{first + layer}.0"
            places[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{first + layer}.1"
        places[f"up_blocks.{block}.upsamplers.0"] = f"output_blocks.{first + layers}.{1 + attends}"
    return places


def _ldm_source(name: str, places: Mapping[str, str], groups: Any) -> Source:
    block = next((ours for ours in places if name.startswith(f"{ours}.")), "")
    leaf = name[len(block) + 1 :]
    kind = next((kind for kind in _LDM_LEAVES if kind in block), "")
    module, _, parameter = leaf.rpartition(".")
    if module in _FUSED:
        return Source(f"{places[block]}.qkv.{parameter}", _FUSED[module], groups)
    return Source(f"{places[block]}.{renamed(leaf, _LDM_LEAVES.get(kind, {}))}")


def _heads(options: Mapping[str, Any], channels: int) -> int:
    """Attention heads of a layer with `channels` channels."""
    width = int(options.get("num_head_channels", -1))
    return channels // width if width != -1 else int(need(options, "num_heads", "unet_config.params"))


def _shared(options: Mapping[str, Any], sample_size: int) -> dict[str, Any]:
    """Settings that both of diffusers' U-Nets have."""
    width, inputs, outputs = (
        need(options, key, "unet_config.params") for key in ("model_channels", "in_channels", "out_channels")
    )
    return {
        "sample_size": sample_size,
        "in_channels": inputs,
        "out_channels": outputs,
        "block_out_channels": [width * factor for factor in options["channel_mult"]],
        "layers_per_block": options["num_res_blocks"],
        "resnet_time_scale_shift": "scale_shift" if options.get("use_scale_shift_norm") else "default",
    }


def _build_plain(options: Mapping[str, Any], attended: Sequence[bool], sample_size: int) -> nn.Module:
    from diffusers import UNet2DModel

    from cachequant.models.networks import FixedHeadsUNet2DModel

    updown = bool(options.get("resblock_updown"))
    plain = "Resnet{}sampleBlock2D" if updown else "{}Block2D"
    settings = {
        **_shared(options, sample_size),
        "down_block_types": ["AttnDownBlock2D" if attends else plain.format("Down") for attends in attended],
        "up_block_types": ["AttnUpBlock2D" if attends else plain.format("Up") for attends in attended[::-1]],
        "downsample_type": "resnet" if updown else "conv",
        "upsample_type": "resnet" if updown else "conv",
        "attn_norm_num_groups": 32,
    }
    width = options.get("num_head_channels", -1)
    if width != -1:
        return UNet2DModel(**settings, attention_head_dim=width)
    return FixedHeadsUNet2DModel(num_attention_heads=_heads(options, 0), **settings)


def _build_crossed(options: Mapping[str, Any], attended: Sequence[bool], sample_size: int) -> nn.Module:
    from diffusers import UNet2DConditionModel

    if options.get("resblock_updown"):
        raise UserError("unet_config.params has resblock_updown with use_spatial_transformer: this is not supported")
    shared = _shared(options, sample_size)
    return UNet2DConditionModel(
        **shared,
        down_block_types=["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in attended],
        up_block_types=["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in attended[::-1]],
        cross_attention_dim=need(options, "context_dim", "unet_config.params"),
        transformer_layers_per_block=options.get("transformer_depth", 1),
        # diffusers' older name: these are numbers of heads
        attention_head_dim=[_heads(options, width) for width in shared["block_out_channels"]],
    )


def ddpm_unet(options: Mapping[str, Any], resolution: int) -> Network:
    """The pixel U-Net of DDPM and DDIM: one attention head, asymmetric padding, sines before cosines.

    Args:
        options: the `model` section of the original YAML.
        resolution: pixels of an image's side.
    """
    width, factors, layers, resolutions = (
        need(options, key, "model") for key in ("ch", "ch_mult", "num_res_blocks", "attn_resolutions")
    )
    attended = [resolution // 2**level in resolutions for level in range(len(factors))]

    def build() -> nn.Module:
        """The network as diffusers makes it, weights not yet loaded."""
        from diffusers import UNet2DModel

        return UNet2DModel(
            sample_size=resolution,
            in_channels=need(options, "in_channels", "model"),
            out_channels=need(options, "out_ch", "model"),
            block_out_channels=[width * factor for factor in factors],
            layers_per_block=layers,
            down_block_types=["AttnDownBlock2D" if attends else "DownBlock2D" for attends in attended],
            up_block_types=["AttnUpBlock2D" if attends else "UpBlock2D" for attends in attended[::-1]],
            attention_head_dim=None,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-6,
        )

    return Network("unet", "denoiser", build, "", partial(taming_source, table=level_table(len(factors))))
