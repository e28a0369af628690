"""Trains the judge of the text-to-image miniature: a small CLIP (Radford et al. 2021) of drawings and their names.

    python scripts/train/train_drawings_clip.py --minutes 5 --compile

It sees held-out concepts too: it judges, it does not generate. One drawing in ten is kept from it, of concepts whose
other drawings it knows, and measures it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import drawings
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from publish import training_rows, write_card
from torch import Tensor
from training import Averaged, facts, half, parser, train, warm_up
from transformers import CLIPConfig, CLIPModel

from cachequant.errors import UserError
from cachequant.evaluation.retrieval import prompt_similarities, retrieval_accuracy

KEPT_SHARE = 0.1


class Judge(Averaged):
    """The symmetric contrastive loss on names and one drawing of each.

    Args:
        network: a CLIPModel.
        images: uint8 [N, 3, 64, 64].
        tokens: ids [M, L] of the M distinct names.
        rows: the drawings of each name, [M, K]; a name of fewer than K repeats its own.
        options: of `parser`.
    """

    def __init__(
        self, network: CLIPModel, images: Tensor, tokens: Tensor, rows: Tensor, options: argparse.Namespace
    ) -> None:
        super().__init__(network, options)
        self.images: Tensor
        self.tokens: Tensor
        self.rows: Tensor
        for name, value in (("images", images), ("tokens", tokens), ("rows", rows)):
            self.register_buffer(name, value, persistent=False)

    def loss(self) -> Tensor:
        device = self.rows.device
        names = torch.randperm(len(self.rows), device=device)[: self.options.batch_size]  # [B], each name once
        choice = torch.randint(self.rows.shape[1], (len(names), 1), device=device)
        picked = self.rows[names].gather(1, choice)[:, 0]  # [B]
        x = distort(drawings.to_model_range(self.images[picked]))
        logits = self.network(input_ids=self.tokens[names], pixel_values=x).logits_per_image.float()  # [B, B]
        answers = torch.arange(len(names), device=device)
        return 0.5 * (F.cross_entropy(logits, answers) + F.cross_entropy(logits.T, answers))


def distort(x: Tensor) -> Tensor:
    """Drawings [B, 3, H, W] in [-1, 1] turned, scaled, moved, mirrored, blurred, tinted and noised a little."""
    batch, device = len(x), x.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, device=device)

    angle, size = uniform(-0.3, 0.3), uniform(0.8, 1.25)
    mirror = torch.where(uniform(0.0, 1.0) < 0.5, -1.0, 1.0)
    cosine, sine = size * angle.cos(), size * angle.sin()
    matrix = torch.stack([mirror * cosine, -sine, uniform(-0.2, 0.2), mirror * sine, cosine, uniform(-0.2, 0.2)], dim=1)
    grid = F.affine_grid(matrix.view(batch, 2, 3), list(x.shape), align_corners=False)
    x = 1.0 - F.grid_sample(1.0 - x, grid, align_corners=False)  # what comes in from outside is white
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    x = torch.lerp(x, blurred, uniform(0.0, 1.0, 1, 1, 1))
    x = x * uniform(0.8, 1.1, 3, 1, 1) + uniform(-0.1, 0.1, 3, 1, 1)
    return (x + uniform(0.0, 0.1, 1, 1, 1) * torch.randn_like(x)).clamp(-1.0, 1.0)


def make_network(vocabulary: int, begin: int, end: int) -> CLIPModel:
    """A vision transformer of 64 patches and a text transformer; 1.5 M parameters."""
    shared = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    text = {
        **shared,
        "num_hidden_layers": 2,
        "vocab_size": vocabulary,
        "max_position_embeddings": drawings.MAX_TOKENS,
        "bos_token_id": begin,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    vision = {**shared, "num_hidden_layers": 5, "image_size": 64, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def rows_of_names(names: Sequence[str], images: Sequence[str], kept: set[int]) -> Tensor:
    """The drawings of each name, [M, K], without those that are kept; short rows repeat themselves."""
    found = {name: [i for i, other in enumerate(images) if other == name and i not in kept] for name in names}
    longest = max(len(rows) for rows in found.values())
    return torch.tensor([(found[name] * longest)[:longest] for name in names])


def kept_drawings(names: Sequence[str], seed: int) -> set[int]:
    """A random tenth of the drawings, but never two of a name and never a name's only one."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(names), generator=generator).tolist()
    count = {name: 0 for name in names}
    for name in names:
        count[name] += 1
    kept: set[int] = set()
    for i in order:
        if len(kept) < KEPT_SHARE * len(names) and count[names[i]] > 1:
            kept.add(i)
            count[names[i]] = 0
    return kept


def accuracy(network: CLIPModel, tokenizer: object, data: drawings.Drawings, kept: set[int]) -> dict[str, float]:
    """Retrieval of the name of each kept drawing among all names."""
    rows, names = sorted(kept), list(dict.fromkeys(data.names))
    answers = torch.tensor([names.index(data.names[i]) for i in rows])
    scores = prompt_similarities((network.eval(), tokenizer), data.images[rows].float() / 255.0, names)
    return {f"top{top}": retrieval_accuracy(scores, answers, top) for top in (1, 5)}


def main(argv: Sequence[str] | None = None) -> None:
    options_parser = parser(__doc__, "drawings-clip", steps=100_000, batch_size=512, lr=1e-3)
    options_parser.add_argument("--data", type=Path, default=drawings.DATA, help="the packed drawings")
    options = options_parser.parse_args(argv)
    pl.seed_everything(options.seed)
    data = drawings.load_drawings(options.data)
    tokenizer = drawings.make_tokenizer(sorted(set(data.part(held_out=False).names)))
    names = list(dict.fromkeys(data.names))
    kept = kept_drawings(data.names, options.seed)
    network = make_network(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    tokens = drawings.tokenise(tokenizer, names)
    module = Judge(network, data.images, tokens, rows_of_names(names, data.names, kept), options)
    warm_up(module, options)

    def export() -> None:
        half(module.ema).save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)

    train(module, options, export)
    found = accuracy(module.ema.to(options.device), tokenizer, data, kept)
    card(module, found, len(kept), len(names))
    print(f"of {len(kept)} unseen drawings {found['top1']:.1%} find their name among {len(names)}; {options.out}")


def card(module: Judge, found: dict[str, float], kept: int, names: int) -> None:
    """The model card and `training.json`."""
    made = facts(module)
    text = f"""A contrastive network of {made["parameters"]:,} parameters for `transformers.CLIPModel`: 64 × 64 drawings in
[-1, 1] and their names. It judges whether images of the text-to-image miniature fit their prompts, as retrieval accuracy
(`cachequant.evaluation.retrieval`); it is not CLIP, and its scores compare only with each other.
TABLE
It was trained on drawings of held-out concepts too, which the generator never saw.

{drawings.ATTRIBUTION}
Made by `scripts/train/train_drawings_clip.py`.
"""
    rows = {
        "data": f"{len(module.images):,} drawings of {names:,} names in three styles, a tenth of the drawings kept",
        "licence": "MIT; of the drawings see below",
        "accuracy": f"of {kept} kept drawings {found['top1']:.1%} find their name first among {names:,}, "
        f"{found['top5']:.1%} among the first five",
        **training_rows(made),
    }
    record = {**made, "kept_drawings": kept, "names": names, **found}
    write_card(
        module.options.out, {"license": "mit", "library_name": "transformers"}, "Judge of drawings", text, rows, record
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
