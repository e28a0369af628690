"""Trains the feature network of the miniature's metrics: `python scripts/train/train_fashion_cnn.py`."""

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from cachequant.errors import UserError
from cachequant.evaluation.fashion_mnist import load_fashion_mnist, to_model_range
from cachequant.evaluation.features import FashionCNN, save_test_statistics

REPOSITORY = Path(__file__).resolve().parents[2]

CARD = """---
license: mit
datasets: [zalando-datasets/fashion_mnist]
---
# FashionCNN

The classifier whose 128 features give the "Fréchet FashionCNN distance" of the Fashion-MNIST miniature. It is
no Inception network: its distances compare only with each other, and they are not FID.

| | |
| --- | --- |
| architecture | `cachequant.evaluation.features.FashionCNN`, {parameters:,} parameters, float32 safetensors |
| input | `[B, 1, 32, 32]` in [-1, 1]: 28 × 28 images with 2 pixels of -1 all round |
| data | Fashion-MNIST, 60,000 training images (Zalando Research, MIT licence) |
| licence | MIT |
| test accuracy | {accuracy:.2%} of 10,000 images |
| training | {epochs} epochs, batch {batch_size}, AdamW, one-cycle learning rate {lr:g}, seed {seed} |
| time and hardware | {seconds:.0f} s on {hardware}, torch {torch_version} |

Made by `python scripts/train/train_fashion_cnn.py`.
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's idx files")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "assets" / "fashion-cnn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def train(network: FashionCNN, images: Tensor, labels: Tensor, options: argparse.Namespace) -> None:
    """Cross-entropy on images `[N, 1, 32, 32]` and labels `[N]`; changes `network` in place."""
    batches = len(images) // options.batch_size
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr, weight_decay=0.05)
    total_steps = options.epochs * batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=total_steps)
    network.train()
    for epoch in range(options.epochs):
        order = torch.randperm(len(images), device=images.device)[: batches * options.batch_size]
        title = f"epoch {epoch + 1}/{options.epochs}"
        for rows in tqdm(order.split(options.batch_size), title, mininterval=5):
            loss = F.cross_entropy(network(images[rows]), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(network: FashionCNN, images: Tensor, labels: Tensor) -> float:
    """Share of images `[N, 1, 32, 32]` whose class is right."""
    network.eval()
    predicted = torch.cat([network(batch).argmax(1) for batch in images.split(500)])  # [N]
    return float((predicted == labels).double().mean())


def load(split: str, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    images, labels = load_fashion_mnist(split, options.data)
    return to_model_range(images).to(options.device), labels.long().to(options.device)


def hardware(device: str) -> str:
    """A GPU's name, or the processor's kind and thread count."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    torch.manual_seed(options.seed)
    network = FashionCNN().to(options.device)
    train_images, train_labels = load("train", options)
    begin = time.perf_counter()
    train(network, train_images, train_labels, options)
    seconds = time.perf_counter() - begin
    test_images, test_labels = load("test", options)
    score = accuracy(network, test_images, test_labels)
    options.out.mkdir(parents=True, exist_ok=True)
    state = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
    save_file(state, options.out / "model.safetensors")
    save_test_statistics(options.out, test_images)
    card = CARD.format(
        parameters=sum(p.numel() for p in network.parameters()),
        accuracy=score,
        seconds=seconds,
        hardware=hardware(options.device),
        torch_version=torch.__version__,
        **vars(options),
    )
    (options.out / "README.md").write_text(card, encoding="utf-8")
    print(f"test accuracy {score:.2%} in {seconds:.0f} s; wrote {options.out}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
