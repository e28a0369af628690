"""Checkpoints of toy size in the original formats, made from networks of ours with random weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from cachequant.models.original.keymap import Network
from cachequant.models.original.recipes import ddpm_recipe, latent_recipe
from tests.models.original.reference import original_weights

DDPM: dict[str, Any] = {
    "data": {"image_size": 16},
    "model": {
        "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8],
    },
    "diffusion": {
        "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_diffusion_timesteps": 1000,
    },
}  # fmt: skip
LATENT: dict[str, Any] = {
    "model": {
        "params": {
            "linear_start": 0.0015, "linear_end": 0.0195, "image_size": 8,
            "unet_config": {
                "params": {
                    "in_channels": 3, "out_channels": 3, "model_channels": 32, "attention_resolutions": [2],
                    "num_res_blocks": 1, "channel_mult": [1, 2], "num_heads": 4,
                }
            },
            "first_stage_config": {
                "target": "ldm.models.autoencoder.VQModelInterface",
                "params": {
                    "embed_dim": 3, "n_embed": 16,
                    "ddconfig": {
                        "z_channels": 3, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32,
                        "ch_mult": [1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [],
                    },
                },
            },
            "cond_stage_config": "__is_unconditional__",
        }
    }
}  # fmt: skip


def changed(settings: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A copy with other values under names such as model__ch."""
    settings = copy.deepcopy(settings)
    for name, value in values.items():
        *parents, last = name.split("__")
        inner = settings
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    return settings


def weights_of(networks: list[Network], seed: int = 0) -> dict[str, Tensor]:
    """Random weights under their original names."""
    torch.manual_seed(seed)
    made = (original_weights(network, network.build()) for network in networks)
    return {key: value for state in made for key, value in state.items()}


def ddpm_weights(seed: int = 0) -> dict[str, Tensor]:
    """A DDPM's state dict."""
    return weights_of(ddpm_recipe(DDPM, {}, "").networks, seed)


def latent_weights(ema: bool = False) -> dict[str, Tensor]:
    """A latent-diffusion state dict with what training leaves in it, and with another model's copy under `model_ema.`."""
    networks = latent_recipe(LATENT, {}, "").networks
    state = weights_of(networks)
    state["betas"] = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000).square()
    state["first_stage_model.loss.logvar"] = torch.zeros(1)
    if ema:
        other = weights_of(networks, seed=1)
        names = {k: "model_ema." + k.removeprefix("model.").replace(".", "") for k in other if k.startswith("model.")}
        state |= {name: other[k] for k, name in names.items()}
        state["model_ema.decay"] = torch.tensor(0.9999)
    return state


def write(folder: Path, content: Any, settings: dict[str, Any], name: str = "model.ckpt") -> tuple[Path, Path]:
    """A checkpoint file and its YAML."""
    torch.save(content, folder / name)
    (folder / "original.yaml").write_text(yaml.safe_dump(settings))
    return folder / name, folder / "original.yaml"
