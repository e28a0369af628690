"""Agreement of images and prompts as retrieval: does an image find its own prompt among the others?

The similarities come from a small CLIP-style network (`assets/drawings-clip`). It is not CLIP: its scores compare only
with each other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cachequant.assets import assets_folder
from cachequant.errors import UserError
from cachequant.models.hub import quiet


def load_judge(folder: Path | None = None) -> tuple[Any, Any]:
    """The network (`CLIPModel`, frozen, float32) and its tokeniser, from `folder` or the repository's assets.

    Raises:
        UserError: it is not there.
    """
    from transformers import CLIPModel, CLIPTokenizer

    folder = folder or assets_folder() / "drawings-clip"
    if not (folder / "config.json").is_file():
        raise UserError(
            f"no network in {folder}; expected CLIP-style weights: run scripts/train/train_drawings_clip.py"
        )
    with quiet():
        network = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        return network, CLIPTokenizer.from_pretrained(folder)


@torch.no_grad()
def prompt_similarities(judge: tuple[Any, Any], images: Tensor, prompts: list[str], batch_size: int = 256) -> Tensor:
    """Scores float32 [N, M] on the CPU of images [N, 3, 64, 64] in [0, 1] and M prompts; each row a softmax's logits."""
    network, tokenizer = judge
    encoded = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    ids = encoded.input_ids.to(network.device)
    batches = [
        network(input_ids=ids, pixel_values=2.0 * batch.to(network.device) - 1.0).logits_per_image
        for batch in images.split(batch_size)
    ]
    return torch.cat(batches).float().cpu()


def retrieval_accuracy(similarities: Tensor, answers: Tensor, top: int = 1) -> float:
    """Share of rows whose right column is among the `top` most similar ones; ties count against it.

    Args:
        similarities: [N, M].
        answers: the right column of each row, [N].
        top: 1 or more.

    Raises:
        UserError: no rows, or another number of answers.
    """
    if len(similarities) == 0 or answers.shape != similarities.shape[:1]:
        given = f"similarities {list(similarities.shape)} and answers {list(answers.shape)} given"
        raise UserError(f"{given}; expected [N, M] and [N] with N >= 1: one answer for each image")
    return float(are_found(similarities, answers, top).double().mean())


def are_found(similarities: Tensor, answers: Tensor, top: int = 1) -> Tensor:
    """Whether each row of [N, M] has its right column [N] among the `top` most similar: bool [N]; ties count against it."""
    right = similarities.gather(1, answers[:, None])  # [N, 1]
    return (similarities >= right).sum(1) <= top  # the right one included
