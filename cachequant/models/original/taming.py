"""The naming that DDPM's U-Net and the first stages of latent diffusion share: `down.0.block.1`, `mid.attn_1`, `up.3`."""

from __future__ import annotations

from collections.abc import Mapping

from cachequant.models.original.keymap import Source, renamed

_ENDS = {
    "time_embedding.linear_1": "temb.dense.0", "time_embedding.linear_2": "temb.dense.1",
    "mid_block.resnets.0": "mid.block_1", "mid_block.attentions.0": "mid.attn_1", "mid_block.resnets.1": "mid.block_2",
    "conv_norm_out": "norm_out",
}  # fmt: skip
_LEAVES = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "conv_shortcut": "nin_shortcut", "time_emb_proj": "temb_proj",
}  # fmt: skip


def level_table(levels: int) -> dict[str, str]:
    """Our lists of blocks -> the original ones; the decoder's levels are counted from the finest there."""
    table = dict(_ENDS)
    for level in range(levels):
        for ours, original in (("down_blocks", level), ("up_blocks", levels - 1 - level)):
            side = ours.removesuffix("_blocks")
            table[f"{ours}.{level}.resnets"] = f"{side}.{original}.block"
            table[f"{ours}.{level}.attentions"] = f"{side}.{original}.attn"
            table[f"{ours}.{level}.{side}samplers.0"] = f"{side}.{original}.{side}sample"
    return table


def taming_source(name: str, table: Mapping[str, str]) -> Source:
    """Original place of a weight of such a network."""
    path = renamed(name, table)
    *modules, parameter = path.split(".")
    for ours, original in _LEAVES.items():
        inner = ours.split(".")
        if modules[-len(inner) :] == inner:
            modules[-len(inner) :] = [original]
    return Source(".".join([*modules, parameter]))
