"""The networks that judge the miniatures' images: there Inception and CLIP would say nothing.

Their distances and accuracies compare only with others over the same network, and carry its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cachequant.errors import UserError
from cachequant.evaluation.features import FEATURE_CHANNELS, FashionCNN, load_feature_network
from cachequant.evaluation.retrieval import are_found, load_judge, prompt_similarities

DRAWING = 64


class FeatureNetwork(nn.Module):
    """Features of images.

    Attributes:
        channels: how many.
    """

    channels: int

    def forward(self, images: Tensor) -> Tensor:
        """Features float32 [B, channels] of images [B, C, H, W] in [0, 1] on this module's device.

        Raises:
            UserError: images that this network was not made for.
        """
        raise NotImplementedError


class FashionFeatures(FeatureNetwork):
    """The 128 features of `assets/fashion-cnn`, of grey images of 32 × 32 in one channel or three equal ones."""

    channels = FEATURE_CHANNELS

    def __init__(self, network: FashionCNN | None = None) -> None:
        super().__init__()
        self.network = network or load_feature_network()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """[B, 1 or 3, 32, 32] -> [B, 128]."""
        grey = images[:, :1]
        if tuple(images.shape[2:]) != (32, 32) or not torch.equal(images, grey.expand_as(images)):
            raise UserError(
                f"fashion_cnn is for grey images of 32 × 32, these are {images.shape[3]} × {images.shape[2]} or in colour: "
                "choose fid"
            )
        return self.network.features(grey * 2 - 1).float()


class DrawingFeatures(FeatureNetwork):
    """Image embeddings of `assets/drawings-clip` on the unit sphere, and how well images fit prompts.

    Args:
        judge: of `cachequant.evaluation.retrieval.load_judge`.
    """

    def __init__(self, judge: tuple[Any, Any] | None = None) -> None:
        super().__init__()
        self.network, self._tokenizer = judge or load_judge()
        self.channels = int(self.network.config.projection_dim)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, 64, 64] -> [B, projection_dim]."""
        self._check(images)
        embedded = self.network.get_image_features(pixel_values=2 * images - 1).pooler_output
        return nn.functional.normalize(embedded.float(), dim=-1)

    def found(self, images: Tensor, answers: list[str], prompts: list[str]) -> Tensor:
        """Whether each image's own prompt is the most similar of all: float64 [B]; ties count against it.

        Args:
            images: [B, 3, 64, 64] in [0, 1].
            answers: the prompt of each.
            prompts: all that compete, each once.
        """
        self._check(images)
        scores = prompt_similarities((self.network, self._tokenizer), images, prompts)  # [B, M]
        place = {prompt: i for i, prompt in enumerate(prompts)}
        return are_found(scores, torch.tensor([place[answer] for answer in answers])).double()

    def _check(self, images: Tensor) -> None:
        if tuple(images.shape[1:]) != (3, DRAWING, DRAWING):
            raise UserError(
                f"drawings_clip is for colour images of {DRAWING} × {DRAWING}, these are "
                f"{images.shape[3]} × {images.shape[2]} in {images.shape[1]} channels: choose fid and clip"
            )


NETWORKS: dict[str, Callable[[], FeatureNetwork]] = {"fashion_cnn": FashionFeatures, "drawings_clip": DrawingFeatures}
"""By the name that their metrics end in."""


@dataclass(frozen=True)
class Features:
    """A network at work on sets of images that are held in memory.

    Attributes:
        network: with its weights.
        device: where it computes.
    """

    network: FeatureNetwork
    device: torch.device | str = "cpu"

    def __call__(self, images: Tensor, batch_size: int = 500) -> Tensor:
        """Features float32 [n, channels] on the CPU of images [n, C, H, W] in [0, 1]."""
        network = self.network.to(self.device).eval()
        return torch.cat([network(batch.to(self.device)).cpu() for batch in images.split(batch_size)])
