"""A small Fashion-MNIST classifier whose features stand in for Inception's in the miniature's metrics."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cachequant.assets import assets_folder
from cachequant.errors import UserError
from cachequant.evaluation.frechet import FeatureStatistics, Gaussian
from cachequant.storage import load_tensors, save_tensors

FEATURE_CHANNELS = 128
TEST_STATISTICS = "test_statistics.safetensors"


class FashionCNN(nn.Module):
    """Three convolutions and two linear layers; 0.36 M parameters; the 128 features are non-negative."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 32, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),  # [B, 32, 16, 16]
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),  # [B, 64, 8, 8]
            nn.Conv2d(64, 128, 3, padding=1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.MaxPool2d(2),  # [B, 128, 4, 4]
            nn.Flatten(),
            nn.Dropout(0.25),
            nn.Linear(2048, FEATURE_CHANNELS),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(FEATURE_CHANNELS, 10)

    def features(self, x: Tensor) -> Tensor:
        """Images `[B, 1, 32, 32]` in [-1, 1] to features `[B, 128]`."""
        return self.trunk(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, 1, 32, 32]` in [-1, 1] to logits `[B, 10]`."""
        return self.classifier(self.features(x))


def load_feature_network(path: Path | None = None) -> FashionCNN:
    """The trained network, frozen and in evaluation mode, from `path` or the repository's assets.

    Raises:
        UserError: the file is absent.
    """
    path = path or assets_folder() / "fashion-cnn" / "model.safetensors"
    if not path.is_file():
        raise UserError(f"no file {path}; expected weights: run scripts/train/train_fashion_cnn.py")
    network = FashionCNN()
    network.load_state_dict(load_file(path))
    return network.eval().requires_grad_(False)


@torch.no_grad()
def extract_features(
    network: FashionCNN, images: Tensor, batch_size: int = 500, device: torch.device | str = "cpu"
) -> Tensor:
    """Features float32 `[N, 128]` on the CPU of images `[N, 1, 32, 32]` in [-1, 1].

    Moves `network` to `device` and into evaluation mode.
    """
    network = network.to(device).eval()
    return torch.cat([network.features(batch.to(device)).float().cpu() for batch in images.split(batch_size)])


def save_test_statistics(folder: Path, images: Tensor) -> None:
    """Write mean and covariance of the features of Fashion-MNIST's test images [N, 1, 32, 32] beside the network."""
    statistics = FeatureStatistics(FEATURE_CHANNELS)
    statistics.update(extract_features(load_feature_network(folder / "model.safetensors"), images))
    mean, covariance = statistics.gaussian
    save_tensors(folder / TEST_STATISTICS, {"mean": mean, "covariance": covariance})


def fashion_statistics(folder: Path | None = None) -> Gaussian:
    """What `save_test_statistics` wrote, so that the distance to the test images does not need them.

    Raises:
        UserError: the file is absent or damaged.
    """
    path = (folder or assets_folder() / "fashion-cnn") / TEST_STATISTICS
    tensors = load_tensors(path)
    if not {"mean", "covariance"} <= set(tensors):
        raise UserError(
            f"{path} holds {sorted(tensors)}, expected mean and covariance: run scripts/train/train_fashion_cnn.py"
        )
    return tensors["mean"], tensors["covariance"]
