"""First stages of latent diffusion: the VQ and the KL autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from cachequant.errors import UserError
from cachequant.models.original.keymap import Network, Source
from cachequant.models.original.settings import need
from cachequant.models.original.taming import level_table, taming_source

KINDS = {"VQModelInterface": "VQ", "VQModel": "VQ", "AutoencoderKL": "KL"}


def kind_of(options: Mapping[str, Any]) -> str:
    """ "VQ" or "KL" of a `first_stage_config`.

    Raises:
        UserError: another class of first stage.
    """
    target = str(need(options, "target", "first_stage_config")).rpartition(".")[2]
    if target not in KINDS:
        raise UserError(f"first_stage_config.target is {target}, expected one of {', '.join(KINDS)}")
    return KINDS[target]


def first_stage(options: Mapping[str, Any], component: str, scale_factor: float) -> Network:
    """`VQModel` or `AutoencoderKL`; the encoder's and the decoder's attention is in the middle block only.

    Args:
        options: `first_stage_config` of the original YAML.
        component: "vqvae" or "vae", as the pipeline calls it.
        scale_factor: what the latents were multiplied with for diffusion.

    Raises:
        UserError: an option is missing, or attention outside the middle block.
    """
    kind, inner = kind_of(options), need(options, "params.ddconfig", "first_stage_config")
    if need(inner, "attn_resolutions", "ddconfig"):
        raise UserError("ddconfig.attn_resolutions is not empty, expected attention in the middle block only")
    levels = len(need(inner, "ch_mult", "ddconfig"))
    build = partial(_build, kind, options, inner, scale_factor)
    source = partial(_source, table=level_table(levels))
    return Network(component, f"first stage ({kind})", build, "first_stage_model.", source)


def downsampling(options: Mapping[str, Any]) -> int:
    """Image pixels per latent pixel of a side."""
    return 2 ** (len(need(options, "params.ddconfig.ch_mult", "first_stage_config")) - 1)


def _build(kind: str, options: Mapping[str, Any], inner: Mapping[str, Any], scale_factor: float) -> nn.Module:
    from diffusers import AutoencoderKL, VQModel

    width, factors, layers, inputs, outputs, latents, resolution = (
        need(inner, key, "ddconfig")
        for key in ("ch", "ch_mult", "num_res_blocks", "in_channels", "out_ch", "z_channels", "resolution")
    )
    settings = {
        "in_channels": inputs,
        "out_channels": outputs,
        "latent_channels": latents,
        "block_out_channels": [width * factor for factor in factors],
        "layers_per_block": layers,
        "down_block_types": ["DownEncoderBlock2D"] * len(factors),
        "up_block_types": ["UpDecoderBlock2D"] * len(factors),
        "sample_size": resolution,
        "scaling_factor": scale_factor,
    }
    embed = need(options, "params.embed_dim", "first_stage_config")
    if kind == "VQ":
        codes = need(options, "params.n_embed", "first_stage_config")
        return VQModel(**settings, num_vq_embeddings=codes, vq_embed_dim=embed)
    if embed != latents:
        raise UserError(f"first_stage_config has embed_dim {embed} and z_channels {latents}, expected equal ones")
    return AutoencoderKL(**settings)


def _source(name: str, table: Mapping[str, str]) -> Source:
    """`encoder.` and `decoder.` each follow the shared naming; the rest has its original names already."""
    side, _, rest = name.partition(".")
    if side not in ("encoder", "decoder"):
        return Source(name)
    return Source(f"{side}.{taming_source(rest, table).key}")
