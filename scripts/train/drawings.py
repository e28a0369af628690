"""The packed drawings (`prepare_drawings.py`), their prompts, and the tokeniser of the prompts."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cachequant.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY / ".data" / "drawings.npz"
HELD_OUT_SHARE = 0.1

SETS = {
    "noto": ("emoji-datasource-google", "img/google/64/{image}"),
    "twemoji": ("emoji-datasource-twitter", "img/twitter/64/{image}"),
    "fluent": ("@lobehub/fluent-emoji-3d", "assets/{code}.webp"),
}
"""Style word -> npm package and the file of a drawing in it."""

ATTRIBUTION = """The drawings, as npm packages `emoji-datasource-google`, `emoji-datasource-twitter` and `@lobehub/fluent-emoji-3d` hold them:

- noto: Noto Emoji, © Google LLC, Apache-2.0 (github.com/googlefonts/noto-emoji)
- twemoji: Twemoji, © Twitter, Inc and other contributors, CC-BY-4.0 (github.com/twitter/twemoji)
- fluent: Fluent Emoji, © Microsoft Corporation, MIT (github.com/microsoft/fluentui-emoji)

They were put on white and scaled to 64 × 64 pixels; their names are Unicode's. Nothing here is endorsed by their authors.
"""  # noqa: E501

MAX_TOKENS = 24
MERGES = 1200


@dataclass(frozen=True)
class Drawings:
    """Named drawings.

    Attributes:
        images: uint8 [N, 3, 64, 64].
        names: what each shows.
        sets: its style.
        held_out: bool [N], whether its concept is in the test part.
    """

    images: Tensor
    names: tuple[str, ...]
    sets: tuple[str, ...]
    held_out: Tensor

    def part(self, held_out: bool) -> Drawings:
        """The training part, or the held-out one."""
        rows = (self.held_out == held_out).nonzero().flatten().tolist()
        return Drawings(
            self.images[rows],
            tuple(self.names[i] for i in rows),
            tuple(self.sets[i] for i in rows),
            self.held_out[rows],
        )


def load_drawings(path: Path = DATA) -> Drawings:
    """All drawings of the packed file.

    Raises:
        UserError: no such file.
    """
    if not path.is_file():
        raise UserError(f"no file {path}; expected the packed drawings: run scripts/train/prepare_drawings.py")
    with np.load(path) as file:
        content, ends = file["webp"].tobytes(), file["ends"].tolist()
        names, sets, held_out = (file[key] for key in ("names", "sets", "held_out"))
    begins = [0, *ends[:-1]]
    pixels = [np.asarray(Image.open(io.BytesIO(content[a:b]))) for a, b in zip(begins, ends, strict=True)]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()  # [N, 3, 64, 64]
    return Drawings(images, tuple(names.tolist()), tuple(sets.tolist()), torch.from_numpy(held_out))


def to_model_range(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def prompt(name: str, style: str | None = None) -> str:
    """ "red apple" or "red apple, noto style"."""
    return name if style is None else f"{name}, {style} style"


def tokenise(tokenizer: Any, prompts: list[str]) -> Tensor:
    """Token ids [N, L], padded to the tokeniser's length."""
    length = tokenizer.model_max_length
    encoded = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: Tensor = encoded.input_ids
    return ids


def make_tokenizer(names: list[str]) -> Any:
    """A `CLIPTokenizer` with CLIP's rules and a byte-pair vocabulary of these names' words.

    Like CLIP's: every byte within a word, every byte at its end, the merges, then begin and end of text.
    """
    from tokenizers import Tokenizer, models, trainers
    from transformers import CLIPTokenizer

    template = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = template.normalizer, template.pre_tokenizer
    corpus = [prompt(name, style) for name in names for style in (None, *SETS)]
    trainer = trainers.BpeTrainer(
        vocab_size=10**6, max_token_length=None, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(corpus, trainer)
    merges = _merges(learner)[:MERGES]
    alphabet = sorted(_byte_alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def _merges(tokenizer: Any) -> list[tuple[str, str]]:
    """The merges of a trained byte-pair tokeniser, in order."""
    import json

    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def _byte_alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    alphabet: list[str] = pre_tokenizers.ByteLevel.alphabet()
    return alphabet
