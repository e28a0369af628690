"""Reference checkpoints made with the original code, and how a network of ours would look as an original checkpoint."""

from __future__ import annotations

import bz2
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cachequant.models.original.convert import Conversion, convert
from cachequant.models.original.keymap import Network

FOLDERS = {
    "ddpm-cifar10": "ddpm_cifar10", "ldm4-bedroom": "ldm4_bedroom", "ldm8-church": "ldm8_church",
    "ldm4-imagenet": "ldm4_imagenet", "sd-v1": "sd_v1", "dit-xl2": "dit_xl2",
}  # fmt: skip
FILES = {"ddpm-cifar10": "model-790000.ckpt", "dit-xl2": "DiT-XL-2-256x256.pt"}
GUIDED = ("ldm4-imagenet", "sd-v1")


@dataclass(frozen=True)
class Golden:
    """The reference folders, with their checkpoints unpacked beside each other in `unpacked`."""

    folder: Path
    unpacked: Path

    def tensors(self, family: str) -> dict[str, Tensor]:
        """Inputs and expected outputs."""
        return load_file(self.folder / FOLDERS[family] / "case.safetensors")

    def case(self, family: str) -> dict[str, Any]:
        """What the tensors are."""
        return json.loads((self.folder / FOLDERS[family] / "case.json").read_text())

    def config(self, family: str) -> Path | None:
        """The original YAML, which DiT has not."""
        path = self.folder / FOLDERS[family] / "config.yaml"
        return path if path.is_file() else None

    def checkpoint(self, family: str, name: str = "") -> Path:
        """A checkpoint file, unpacked once."""
        name = name or FILES.get(family, "model.ckpt")
        path = self.unpacked / f"{family}-{name}"
        if not path.exists():
            path.write_bytes(bz2.decompress((self.folder / FOLDERS[family] / f"{name}.bz2").read_bytes()))
        return path

    def convert(self, family: str, weights: str = "auto", name: str = "") -> Conversion:
        """A checkpoint as a pipeline."""
        made = convert(self.checkpoint(family, name), family, self.config(family), weights)
        made.pipe.set_progress_bar_config(disable=True)
        return made


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


def original_weights(network: Network, module: nn.Module) -> dict[str, Tensor]:
    """The inverse of the conversion: a network's weights under their original names, fused where they are fused there."""
    state: dict[str, Tensor] = {}
    fused: dict[str, dict[int, Tensor]] = {}
    for name, value in module.state_dict().items():
        source = network.source(name)
        key = network.prefix + source.key
        if source.part is None:
            state[key] = value
            continue
        parts = fused.setdefault(key, {})
        groups = source.groups(len(value))
        parts[source.part] = value.reshape(groups, -1, *value.shape[1:])  # [groups, C / groups, …]
        if len(parts) == 3:
            state[key] = torch.stack([parts[i] for i in range(3)], 1).reshape(-1, *value.shape[1:])  # [3·C, …]
    return state
