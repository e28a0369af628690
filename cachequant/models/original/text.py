"""Conditioners of latent diffusion: the class embedder and the CLIP text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cachequant.errors import UserError
from cachequant.models.original.keymap import Network, Source
from cachequant.models.original.settings import need

HEAD_WIDTH = 64
"""Channels of an attention head in every released CLIP text encoder (Radford et al., 2021, table 19)."""
NARROW_HEADS = 4
"""Heads assumed where the width is no multiple of that; the conversion says so."""
CLIP = "openai/clip-vit-large-patch14"
"""The text encoder of Stable Diffusion v1, whose tokenizer it needs."""

SIZE = 49408
"""Tokens of CLIP's vocabulary."""

_TEXT = "cond_stage_model.transformer."


def class_embedder(options: Mapping[str, Any]) -> Network:
    """`ClassEmbedder`: the original counts the unconditional class among its classes."""
    classes, width = (need(options, f"params.{key}", "cond_stage_config") for key in ("n_classes", "embed_dim"))

    def build() -> nn.Module:
        from cachequant.models.pipelines import ClassEmbedder

        return ClassEmbedder(classes - 1, width)

    return Network("class_embedder", "class embedder", build, "cond_stage_model.", Source)


def text_settings(tensors: Mapping[str, Tensor], options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of `CLIPTextConfig`, from the weights' shapes.

    Args:
        tensors: the checkpoint.
        options: `cond_stage_config` of the original YAML; `params.num_attention_heads` in it decides the heads.
        where: name of the checkpoint for messages.

    Raises:
        UserError: the checkpoint holds no such encoder.
    """
    head = f"{_TEXT}text_model."
    try:
        vocabulary, width = tensors[f"{head}embeddings.token_embedding.weight"].shape
        positions = tensors[f"{head}embeddings.position_embedding.weight"].shape[0]
        inner = tensors[f"{head}encoder.layers.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise UserError(f"{where}: no usable {error}, expected a CLIP text encoder: is the file complete?") from None
    guess = NARROW_HEADS if width % HEAD_WIDTH else width // HEAD_WIDTH
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": len({k.split(".")[5] for k in tensors if k.startswith(f"{head}encoder.layers.")}),
        "num_attention_heads": (options.get("params") or {}).get("num_attention_heads", guess),
        "max_position_embeddings": positions,
        "hidden_act": "quick_gelu",
        "projection_dim": width,
    }


def text_encoder(settings: Mapping[str, Any]) -> Network:
    """`CLIPTextModel`; newer transformers have no `text_model.` level in its names."""

    def build() -> nn.Module:
        from transformers import CLIPTextConfig, CLIPTextModel

        return CLIPTextModel(CLIPTextConfig(**settings))

    def source(name: str) -> Source:
        return Source(f"text_model.{name.removeprefix('text_model.')}")

    return Network("text_encoder", "text encoder", build, _TEXT, source)
