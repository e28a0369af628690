"""DiT: the transformer's sizes are read from the weights, since its checkpoints come without a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cachequant.errors import UserError
from cachequant.models.original.keymap import Network, Source, renamed
from cachequant.models.original.settings import at_most

HEADS = {1152: 16, 1024: 16, 768: 12, 384: 6}
"""Attention heads of the released sizes XL, L, B and S (Peebles and Xie, ICCV 2023, table 1)."""
NARROW_HEADS = 4
"""Heads assumed for any other width; the conversion says so."""

_BLOCK = {
    "attn1.to_out.0": "attn.proj", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2",
    "norm1.linear": "adaLN_modulation.1",
}  # fmt: skip
_EMBEDDINGS = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0", "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder": "y_embedder",
}  # fmt: skip
_ENDS = {
    "pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}  # fmt: skip
_FUSED = {"attn1.to_q": 0, "attn1.to_k": 1, "attn1.to_v": 2}


def dit_settings(tensors: Mapping[str, Tensor], options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of `DiTTransformer2DModel`.

    Args:
        tensors: the checkpoint.
        options: `num_heads` and `input_size` of the original, as far as known; a size that the weights do not have is
            refused.
        where: name of the checkpoint for messages.

    Raises:
        UserError: tensors that no DiT has, or a configuration of another size.
    """
    at_most(options, ("num_heads", "input_size"), "the DiT section")
    try:
        width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
        tokens, rows = tensors["pos_embed"].shape[1], tensors["final_layer.linear.weight"].shape[0]
        classes = tensors["y_embedder.embedding_table.weight"].shape[0] - 1
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{where}: no usable {error}, expected the weights of a DiT: is the file complete?") from None
    size = round(tokens**0.5) * patch
    if options.get("input_size", size) != size:
        raise UserError(
            f"{where} was made for latents of {size} pixels, the configuration says input_size {options['input_size']}: "
            "give the YAML that belongs to this checkpoint"
        )
    heads = int(options.get("num_heads", HEADS.get(width, NARROW_HEADS)))
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": rows // patch**2,
        "num_layers": len({k.split(".")[1] for k in tensors if k.startswith("blocks.")}),
        "sample_size": size,
        "patch_size": patch,
        "num_embeds_ada_norm": classes,
        "norm_eps": 1e-6,
    }


def dit(settings: Mapping[str, Any]) -> Network:
    """The transformer; diffusers keeps a copy of the timestep and class embeddings in every block."""

    def build() -> nn.Module:
        from cachequant.models.networks import OriginalDiT

        return OriginalDiT(**settings)

    return Network("transformer", "denoiser", build, "", _source)


def _source(name: str) -> Source:
    if not name.startswith("transformer_blocks."):
        return Source(renamed(name, _ENDS))
    _, number, leaf = name.split(".", 2)
    module, _, parameter = leaf.rpartition(".")
    if module in _FUSED:
        return Source(f"blocks.{number}.attn.qkv.{parameter}", _FUSED[module])
    if leaf.startswith("norm1.emb."):
        return Source(renamed(leaf.removeprefix("norm1.emb."), _EMBEDDINGS))
    return Source(f"blocks.{number}.{renamed(leaf, _BLOCK)}")
