"""The full-size originals: every key of their checkpoints is used or named as unused, without holding a weight."""

from __future__ import annotations

import gzip
import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from cachequant.errors import UserError
from cachequant.models.original.checkpoint import Checkpoint, with_ema_apart
from cachequant.models.original.convert import Conversion, convert_weights
from cachequant.models.original.settings import original_settings
from tests.models.original.reference import FOLDERS, Golden


def listed(golden: Golden, family: str) -> dict[str, Any]:
    """Names, shapes and types of all entries, and the parameters of each part."""
    return json.loads(gzip.decompress((golden.folder / FOLDERS[family] / "full_keys.json.gz").read_bytes()))


def published(golden: Golden, family: str) -> dict[str, Tensor]:
    """Tensors on the meta device; what a conversion looks into is real."""
    keys = listed(golden, family)["keys"]
    tensors = {k: torch.empty(s, dtype=getattr(torch, d), device="meta") for k, (s, d) in keys.items()}
    if "betas" in tensors:
        params = original_settings(family, None)["model"]["params"]
        ends = [params[key] ** 0.5 for key in ("linear_start", "linear_end")]
        tensors["betas"] = torch.linspace(*ends, 1000, dtype=torch.float64).square().float()
    if "scale_factor" in tensors:
        tensors["scale_factor"] = torch.tensor(0.2273)
    return tensors


def converted(tensors: dict[str, Tensor], family: str, weights: str = "auto") -> Conversion:
    """The conversion with the configuration that the repository ships, on the meta device."""
    settings = {} if family == "dit-xl2" else original_settings(family, None)
    with torch.device("meta"):
        return convert_weights(with_ema_apart(Checkpoint("full", tensors)), family, settings, weights)


@pytest.mark.parametrize("weights", ["auto", "raw"])
@pytest.mark.parametrize("family", FOLDERS)
def test_every_key_is_accounted_for(golden: Golden, family: str, weights: str) -> None:
    tensors = published(golden, family)
    made = converted(tensors, family, weights)
    unused = [key for keys in made.unused.values() for key in keys]
    assert made.used | set(unused) == set(tensors)
    assert len(made.used) + len(unused) == len(tensors)
    counts = listed(golden, family)["param_counts"]
    assert made.parameters().get("unet") == counts.get("unet")
    assert made.parameters().get("vqvae", made.parameters().get("vae")) == counts.get("first_stage")
    conditioner = made.parameters().get("class_embedder", made.parameters().get("text_encoder", 0))
    assert conditioner == counts.get("cond_stage", 0)
    assert (made.weights == "only") == (family not in ("ldm4-bedroom", "ldm8-church"))
    from_ema = {key for key in made.used if key.startswith("model_ema.")}
    assert bool(from_ema) == (made.weights == "ema")


@pytest.mark.parametrize("weights", ["auto", "raw"])
@pytest.mark.parametrize("family", FOLDERS)
def test_a_key_too_few_or_too_many_is_named(golden: Golden, family: str, weights: str) -> None:
    tensors = published(golden, family)
    needed = sorted(converted(tensors, family, weights).used)
    for key in (needed[0], needed[len(needed) // 2], needed[-1]):
        with pytest.raises(UserError, match=re.escape(key)):
            converted({k: v for k, v in tensors.items() if k != key}, family, weights)
        with pytest.raises(UserError, match=re.escape(f"{key}_more")):
            converted({**tensors, f"{key}_more": torch.empty(1, device="meta")}, family, weights)


@pytest.mark.parametrize("family", FOLDERS)
def test_a_weight_of_another_shape_is_named(golden: Golden, family: str) -> None:
    tensors = published(golden, family)
    matrices = sorted(k for k in converted(tensors, family, "raw").used if tensors[k].dim() > 1)
    key = matrices[len(matrices) // 3]
    wrong = torch.empty([2 * n for n in tensors[key].shape], device="meta")
    with pytest.raises(UserError, match=re.escape(key)):
        converted({**tensors, key: wrong}, family, "raw")
