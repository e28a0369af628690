"""What some checkpoints do not hold and pipelines need: Stable Diffusion's tokenizer and DiT's first stage."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from typing import Any

from cachequant.errors import UserError
from cachequant.models.hub import hub_folder

CLIP = "openai/clip-vit-large-patch14"
"""The text encoder of Stable Diffusion v1, whose tokenizer it needs."""
DIT_VAE = "stabilityai/sd-vae-ft-mse"
"""The first stage with which DiT's own sampling script decodes."""
CLIP_TOKENS = 49408
"""Tokens of CLIP."""


def find_tokenizer(wanted: str | None, vocabulary: int) -> tuple[Any, str]:
    """A CLIP tokenizer and a line that says where it came from; None where there is none.

    Args:
        wanted: folder or hub id; None looks for CLIP's own in the hub's cache, then for open_clip's vocabulary.
        vocabulary: tokens that the text encoder knows.

    Raises:
        UserError: the wanted one cannot be had, or is not for this text encoder.
    """
    from transformers import CLIPTokenizer

    folder = _folder(wanted, CLIP, "tokenizer", ["tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json"])
    if folder is not None:
        made = CLIPTokenizer.from_pretrained(folder)
        if len(made) != vocabulary:  # transformers makes an empty one where it finds no files
            raise UserError(
                f"the tokenizer {wanted or CLIP} has {len(made)} tokens, expected the text encoder's {vocabulary}: "
                "give the folder of its tokenizer"
            )
        return made, wanted or CLIP
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations or vocabulary != CLIP_TOKENS:
        return None, f"none found, so only prompt embeddings will work: give --tokenizer {CLIP} or a folder"
    path = Path(package.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    return clip_tokenizer(path), "made from the vocabulary of the installed open_clip"


def find_first_stage(wanted: str | None) -> tuple[Any, str]:
    """An `AutoencoderKL` and a line that says where it came from; None where there is none.

    Args:
        wanted: folder or hub id; None looks for DiT's own in the hub's cache.

    Raises:
        UserError: the wanted one cannot be had.
    """
    from diffusers import AutoencoderKL

    folder = _folder(wanted, DIT_VAE, "first stage", ["config.json", "*.safetensors"])
    if folder is None:
        return None, f"none found, so latents cannot be decoded: give --vae {DIT_VAE} or a folder"
    try:
        return AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False), wanted or DIT_VAE
    except Exception as error:  # diffusers raises many kinds for a damaged or a foreign folder
        reason = " ".join(str(error).split())[:80]
        raise UserError(f"{folder} holds no AutoencoderKL ({reason}): give a folder that does") from None


def clip_tokenizer(merges_file: Path) -> Any:
    """CLIP's byte-pair tokenizer from its published list of merges.

    The tokens are the 256 bytes, the same at the end of a word, the first 48,894 merges, and the two ends of a text
    (Radford et al., 2021, section 2.4).
    """
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    lines = gzip.decompress(merges_file.read_bytes()).decode("utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines[1 : 1 + CLIP_TOKENS - 2 * 256 - 2]]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    numbers = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(numbers, merges, model_max_length=77)


def _folder(wanted: str | None, default: str, title: str, patterns: list[str]) -> Path | None:
    """Folder of the wanted one; without one, the default's where the hub's cache has it."""
    if wanted is not None:
        return Path(wanted) if Path(wanted).is_dir() else hub_folder(wanted, title, patterns)
    try:
        return hub_folder(default, title, patterns, download=False)
    except UserError:
        return None
