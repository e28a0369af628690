"""Model cards, sample grids and the Fréchet FashionCNN distance: what goes beside a miniature's weights."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cachequant.evaluation.fashion_mnist import load_fashion_mnist, to_model_range
from cachequant.evaluation.features import FEATURE_CHANNELS, extract_features, load_feature_network
from cachequant.evaluation.frechet import FeatureStatistics, frechet_distance
from cachequant.evaluation.grid import image_grid, save_image

FASHION_LABELS = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip

FASHION_DATA = "Fashion-MNIST, 60,000 training images (Zalando Research, MIT licence), no augmentation"

FRECHET_NOTE = """The distance is over the 128 features of `assets/fashion-cnn`, and compares only with distances over them;
the feature network was trained on the training images.
"""


@dataclass(frozen=True)
class Quality:
    """Fréchet FashionCNN distance of samples to the test set, and of training images to it."""

    distance: float
    floor: float
    samples: int
    sample_steps: int
    sample_seed: int

    def rows(self) -> dict[str, str]:
        """The lines of a model card's table."""
        return {
            "samples": f"{self.samples:,}, {self.sample_steps} DDIM steps, eta 0, float32, seed {self.sample_seed}",
            "Fréchet FashionCNN distance": f"{self.distance:.3f}: the samples against the 10,000 test images",
            "its floor": f"{self.floor:.3f}: 10,000 training images against the same test images",
        }


def fashion_quality(
    images: Tensor, train_images: Tensor, data: Path | None, steps: int, seed: int, device: str
) -> Quality:
    """Compares samples, and 10,000 training images, with the test set; all `[N, 1, 32, 32]` in [-1, 1]."""
    network = load_feature_network()

    def statistics(x: Tensor) -> FeatureStatistics:
        result = FeatureStatistics(channels=FEATURE_CHANNELS)
        result.update(extract_features(network, x, batch_size=500, device=device))
        return result

    test_images, _ = load_fashion_mnist("test", data)
    test = statistics(to_model_range(test_images))
    rows = torch.randperm(len(train_images), generator=torch.Generator().manual_seed(seed))[:10_000]
    floor, made = statistics(train_images[rows]), statistics(images)
    return Quality(
        distance=frechet_distance(made.mean, made.covariance, test.mean, test.covariance),
        floor=frechet_distance(floor.mean, floor.covariance, test.mean, test.covariance),
        samples=len(images),
        sample_steps=steps,
        sample_seed=seed,
    )


def sample_classes(pipe: Any, labels: Sequence[int], batch_size: int, seed: int, **arguments: Any) -> Tensor:
    """One image per class id from a class-conditional pipeline: `[N, C, H, W]` in [-1, 1], on the CPU.

    The noise is drawn on the CPU from one generator: the same on every device, for one batch size.
    """
    generator = torch.Generator().manual_seed(seed)
    pipe.set_progress_bar_config(disable=True)
    batches = []
    for begin in range(0, len(labels), batch_size):
        print(f"sampling {begin}/{len(labels)}", flush=True)
        batch = list(labels[begin : begin + batch_size])
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            images = pipe(class_labels=batch, generator=generator, output_type="np", **arguments).images
        batches.append(torch.from_numpy(images).permute(0, 3, 1, 2) * 2.0 - 1.0)
    return torch.cat(batches)


def add_sample_options(parser: argparse.ArgumentParser, steps: int) -> None:
    """How Fashion-MNIST's miniatures are evaluated, and where the data is."""
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's idx files")
    parser.add_argument("--samples", type=int, default=10_000, help="samples to evaluate; 0: no evaluation")
    parser.add_argument("--sample-steps", type=int, default=steps, help="DDIM steps of the evaluation")
    parser.add_argument("--sample-batch", type=int, default=1000)
    parser.add_argument("--sample-seed", type=int, default=1)


def evaluate_classes(pipe: Any, train_images: Tensor, options: argparse.Namespace, guidance_scale: float) -> Quality:
    """Samples every class equally often; writes ten of each as `samples.png`; their distance to the test set."""
    classes = len(FASHION_LABELS)
    images = sample_classes(
        pipe,
        [i % classes for i in range(options.samples)],
        options.sample_batch,
        options.sample_seed,
        guidance_scale=guidance_scale,
        num_inference_steps=options.sample_steps,
    )
    rows = {name: images[i::classes][: min(10, len(images) // classes)] for i, name in enumerate(FASHION_LABELS)}
    save_grid(rows, options.out / "samples.png")
    quality = fashion_quality(
        images, train_images, options.data, options.sample_steps, options.sample_seed, options.device
    )
    print(f"Fréchet FashionCNN distance {quality.distance:.3f} (floor {quality.floor:.3f}); {options.out}")
    return quality


def save_grid(rows: dict[str, Tensor], path: Path, scale: int = 1) -> None:
    """Labelled rows of images `[n, C, H, W]` in [-1, 1] as one PNG."""
    save_image(image_grid({label: (images + 1.0) / 2.0 for label, images in rows.items()}, scale), path)


def training_rows(facts: dict[str, Any]) -> dict[str, str]:
    """What every card says of the training; `facts` as `training.facts` gives them."""
    trainings = [*facts["earlier"], facts]
    steps = ", then ".join(f"{part['steps']:,}" for part in trainings)
    again = " in each part" if len(trainings) > 1 else ""
    return {
        "training": f"{steps} steps of batch {facts['batch_size']}, AdamW, warm-up to {facts['lr']:g} then "
        f"cosine{again}, seed {facts['seed']}",
        "weights": f"exponential moving average (decay {facts['ema_decay']:g}), float16 safetensors",
        "wall time": f"{sum(part['minutes'] for part in trainings):.1f} minutes of training",
        "hardware": f"{facts['hardware']}, torch {facts['torch_version']}, precision {facts['precision']}",
    }


def write_card(
    folder: Path, front: dict[str, str], title: str, text: str, rows: dict[str, str], record: dict[str, Any]
) -> None:
    """`README.md` beside the weights, and `record` as `training.json`.

    Args:
        folder: the exported model's; made if absent.
        front: fields before the text, as model hubs read them.
        title: heading.
        text: paragraphs; what follows a line `TABLE` stands behind the table.
        rows: the table.
        record: numbers and settings of the training.
    """
    before, _, after = text.partition("TABLE\n")
    lines = ["---", *(f"{key}: {value}" for key, value in front.items()), "---", f"# {title}", "", before.rstrip(), ""]
    lines += ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())]
    lines += ["", after.strip()] if after.strip() else []
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def quality_record(quality: Quality | None) -> dict[str, Any]:
    """The distance as `training.json` holds it."""
    return {"frechet_fashion_cnn": asdict(quality) if quality else None}
