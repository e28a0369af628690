"""Original checkpoints of the paper's six models into diffusers pipelines.

diffusers ships conversions of its own (`loaders.single_file_utils`), which drop what they do not know and cover neither the
unconditional latent U-Nets nor DDPM and DiT; here every key of a checkpoint is used or accounted for.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cachequant.config_values import FAMILIES
from cachequant.errors import UserError
from cachequant.models.hub import quiet
from cachequant.models.original.checkpoint import Checkpoint, read_checkpoint
from cachequant.models.original.companions import find_first_stage, find_tokenizer
from cachequant.models.original.keymap import fill
from cachequant.models.original.recipes import Recipe, ddpm_recipe, dit_recipe, latent_recipe, shape_of
from cachequant.models.original.settings import buildable, need, original_settings
from cachequant.storage import make_folder

WEIGHTS = ("auto", "ema", "raw")

_LATENT_SHAPES = {
    "ldm4-bedroom": "VQ-f4 first stage, conditioning: none",
    "ldm8-church": "KL-f8 first stage, conditioning: none",
    "ldm4-imagenet": "VQ-f4 first stage, conditioning: class",
    "sd-v1": "KL-f8 first stage, conditioning: text",
}
_MARKS = {  # the first pattern that begins a key decides: a conditioner says more than a first stage
    r"temb\.": "ddpm-cifar10",
    r"blocks\.\d+\.adaLN": "dit-xl2",
    r"cond_stage_model\.transformer\.": "sd-v1",
    r"cond_stage_model\.|model\.diffusion_model\..*\.attn2\.": "ldm4-imagenet",
    r"first_stage_model\.quantize\.": "ldm4-bedroom",
    r"first_stage_model\.": "ldm8-church",
}


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint.

    Attributes:
        pipe: the diffusers pipeline.
        family: of the paper's models.
        weights: "ema", "raw", or "only" where the file held one set.
        used: keys of the checkpoint that ended in a network.
        unused: reason -> keys that did not.
        notes: what was assumed or comes from elsewhere.
    """

    pipe: Any
    family: str
    weights: str
    used: set[str]
    unused: dict[str, list[str]]
    notes: list[str]

    def parameters(self) -> dict[str, int]:
        """Component -> number of its weights."""
        networks = {k: v for k, v in self.pipe.components.items() if hasattr(v, "parameters")}
        return {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}

    def summary(self) -> str:
        """A few lines: sizes, which weights, what was left over and why, what was assumed."""
        sizes = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in self.parameters().items())
        chosen = {"ema": "EMA", "raw": "raw", "only": "the one set in the file"}[self.weights]
        unused = [f"not used     {len(keys)}: {reason}" for reason, keys in self.unused.items()]
        notes = [f"note         {note}" for note in self.notes]
        head = [f"family       {self.family}", f"parameters   {sizes}", f"weights      {chosen}"]
        return "\n".join([*head, *unused, *notes])

    def save(self, folder: Path) -> None:
        """Write the diffusers folder, complete or not at all.

        Raises:
            UserError: there is something already, or it cannot be written.
        """
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"{folder} is there already, expected a new or an empty folder: choose another")
        make_folder(folder.absolute().parent)
        temporary = folder.absolute().with_name(f".{folder.name}.{os.getpid()}.tmp")
        try:
            with quiet():
                self.pipe.save_pretrained(temporary)
            os.replace(temporary, folder)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"cannot write {folder}: {reason}; free space or choose another folder") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def convert(
    path: Path,
    family: str,
    config: Path | None = None,
    weights: str = "auto",
    tokenizer: str | None = None,
    vae: str | None = None,
) -> Conversion:
    """Convert one original checkpoint.

    Args:
        path: .ckpt, .pt, .pth or .safetensors file.
        family: one of `FAMILIES`.
        config: its original YAML, by default that of the released checkpoint (DiT's sizes are read from the weights).
        weights: "ema" or "raw"; "auto" takes EMA weights wherever the file has them, for every family alike.
        tokenizer: folder or hub id for sd-v1, whose checkpoint holds none.
        vae: folder or hub id of DiT's first stage, whose checkpoint holds none.

    Raises:
        UserError: everything about the file, the family and the configuration that does not fit together.
    """
    _check_options(family, weights, tokenizer, vae)
    checkpoint = read_checkpoint(path)
    settings = {} if family == "dit-xl2" and config is None else original_settings(family, config)
    return convert_weights(checkpoint, family, settings, weights, tokenizer, vae)


def convert_weights(
    checkpoint: Checkpoint,
    family: str,
    settings: Mapping[str, Any],
    weights: str = "auto",
    tokenizer: str | None = None,
    vae: str | None = None,
) -> Conversion:
    """`convert` of a checkpoint and a configuration that were read already; works on the meta device too."""
    _check_family(checkpoint, family)
    with quiet():
        return _convert(checkpoint, family, settings, weights, tokenizer, vae)


def _convert(
    checkpoint: Checkpoint,
    family: str,
    settings: Mapping[str, Any],
    weights: str,
    tokenizer: str | None,
    vae: str | None,
) -> Conversion:
    checkpoint, chosen = checkpoint.choose(weights)
    with buildable():
        recipe = _recipe(family, settings, checkpoint)
    parts: dict[str, Any] = {}
    used: set[str] = set()
    for network in recipe.networks:
        parts[network.component], keys = fill(network, checkpoint.tensors, checkpoint.name)
        used |= keys
    unused = {**checkpoint.unused, **_leftover(recipe, checkpoint, used)}
    notes = list(recipe.notes)
    if family == "ldm4-bedroom" and chosen == "ema":
        notes.append("the released scripts sample bedrooms with the raw weights: --weights raw does as they do")
    if family == "sd-v1":
        parts["tokenizer"], origin = find_tokenizer(tokenizer, parts["text_encoder"].config.vocab_size)
        notes.append(f"tokenizer: {origin}")
    if family == "dit-xl2":
        parts["vae"], origin = find_first_stage(vae)
        notes.append(f"first stage: {origin}")
    stored = checkpoint.stored if chosen == "ema" else {}
    return Conversion(recipe.assemble(**parts), family, chosen, {stored.get(k, k) for k in used}, unused, notes)


def _recipe(family: str, settings: Mapping[str, Any], checkpoint: Checkpoint) -> Recipe:
    if family in _LATENT_SHAPES:
        _check_shape(family, settings)
        return latent_recipe(settings, checkpoint.tensors, checkpoint.name)
    make = ddpm_recipe if family == "ddpm-cifar10" else dit_recipe
    return make(settings, checkpoint.tensors, checkpoint.name)


def _leftover(recipe: Recipe, checkpoint: Checkpoint, used: set[str]) -> dict[str, list[str]]:
    """Reason -> keys that no network took.

    Raises:
        UserError: a key without a reason.
    """
    reasons: dict[str, list[str]] = {}
    for key in sorted(set(checkpoint.tensors) - used):
        reason = next((why for pattern, why in recipe.unused.items() if re.fullmatch(pattern, key)), None)
        if reason is None:
            raise UserError(
                f"{checkpoint.name}: {key} has no place in this model, expected the keys of its configuration: "
                "give the YAML that belongs to this checkpoint"
            )
        reasons.setdefault(reason, []).append(key)
    return reasons


def _check_options(family: str, weights: str, tokenizer: str | None, vae: str | None) -> None:
    if family not in FAMILIES:
        raise UserError(f"family is {family!r}, expected one of {', '.join(FAMILIES)}")
    if weights not in WEIGHTS:
        raise UserError(f"weights is {weights!r}, expected one of {', '.join(WEIGHTS)}")
    for option, given, owner in (("--tokenizer", tokenizer, "sd-v1"), ("--vae", vae, "dit-xl2")):
        if given is not None and family != owner:
            raise UserError(f"{option} is for {owner}, expected none for {family}: drop it")


def _check_family(checkpoint: Checkpoint, family: str) -> None:
    """Refuse a checkpoint whose keys are those of another family."""
    keys = list(checkpoint.tensors)
    found = next((name for mark, name in _MARKS.items() if any(re.match(mark, k) for k in keys)), None)
    if found is None:
        some = ", ".join(keys[:2])
        raise UserError(f"{checkpoint.name} holds {some}, …, expected a checkpoint of one of {', '.join(FAMILIES)}")
    if found != family:
        raise UserError(f"{checkpoint.name} is a {found} checkpoint, expected {family}: convert with --family {found}")


def _check_shape(family: str, settings: Mapping[str, Any]) -> None:
    """Refuse a configuration of another family, or whose latents and images do not fit together.

    Stable Diffusion's first stage was configured for 256 pixels and is used at 512, so only the others are compared.
    """
    params = need(settings, "model.params")
    found, expected = shape_of(params), _LATENT_SHAPES[family]
    if found != expected:
        raise UserError(f"the configuration has: {found}; {family} has: {expected}; give this family's YAML")
    latent, image = need(params, "image_size"), need(params, "first_stage_config.params.ddconfig.resolution")
    factor = int(expected[expected.index("-f") + 2])
    if family != "sd-v1" and latent * factor != image:
        raise UserError(
            f"the configuration has latents of {latent} and images of {image} pixels, expected a ratio of {factor} for "
            f"{family}: give the YAML that belongs to this checkpoint"
        )
