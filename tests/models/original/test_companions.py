"""The tokenizer and the first stage that some checkpoints do not hold."""

from __future__ import annotations

import gzip
import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL

from cachequant.errors import UserError
from cachequant.models.original.companions import CLIP_TOKENS, clip_tokenizer, find_first_stage, find_tokenizer

MERGES = ["#version", "a b", "ab c</w>", "i t</w>"]


@pytest.fixture
def merges(tmp_path: Path) -> Path:
    """A list of three merges in CLIP's format."""
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress("\n".join(MERGES).encode()))
    return path


def test_tokens_are_bytes_word_ends_merges_and_the_two_ends(merges: Path) -> None:
    tokenizer = clip_tokenizer(merges)
    assert len(tokenizer) == 2 * 256 + 3 + 2
    start, end = 515, 516
    assert tokenizer("ABC it").input_ids == [start, 513, 514, end]  # lower case, whole words by merges
    letters = {c: tokenizer(c).input_ids[1] for c in "!x"}
    assert letters == {"!": 256, "x": 256 + ord("x") - ord("!")}  # printable bytes first, these at a word's end
    assert tokenizer("it", padding="max_length").input_ids == [start, 514, *[end] * 75]


def test_a_saved_tokenizer_is_found_and_must_fit_the_text_encoder(merges: Path, tmp_path: Path) -> None:
    clip_tokenizer(merges).save_pretrained(tmp_path / "tokenizer")
    made, origin = find_tokenizer(str(tmp_path / "tokenizer"), 517)
    assert made("abc").input_ids == [515, 513, 516]
    assert origin == str(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"has 517 tokens, expected the text encoder's 49408"):
        find_tokenizer(str(tmp_path / "tokenizer"), CLIP_TOKENS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected the text encoder's 49408"):
        find_tokenizer(str(tmp_path / "empty"), CLIP_TOKENS)


@pytest.fixture
def nothing_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither hub files nor open_clip."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_what_is_nowhere_is_none_and_says_how_to_get_it(nothing_cached: None) -> None:
    made, note = find_tokenizer(None, CLIP_TOKENS)
    assert made is None
    assert "--tokenizer openai/clip-vit-large-patch14" in note
    made, note = find_first_stage(None)
    assert made is None
    assert "--vae stabilityai/sd-vae-ft-mse" in note
    with pytest.raises(UserError, match="hf download openai/clip-vit-large-patch14"):
        find_tokenizer("openai/clip-vit-large-patch14", CLIP_TOKENS)


def test_the_vocabulary_of_open_clip_is_used_where_it_is_installed(
    nothing_cached: None, merges: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.machinery.ModuleSpec("open_clip", None, is_package=True)
    spec.submodule_search_locations = [str(merges.parent)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    made, note = find_tokenizer(None, CLIP_TOKENS)
    assert made("it").input_ids == [515, 514, 516]
    assert "open_clip" in note
    assert find_tokenizer(None, 1000)[0] is None  # not for another text encoder


def test_a_first_stage_from_a_folder(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"block_out_channels": [8], "norm_num_groups": 4, "latent_channels": 2}
    AutoencoderKL(**settings).save_pretrained(tmp_path / "vae")
    made, _ = find_first_stage(str(tmp_path / "vae"))
    assert made.config.latent_channels == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no AutoencoderKL"):
        find_first_stage(str(tmp_path / "empty"))
