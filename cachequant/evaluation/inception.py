"""The Inception network of FID and its relatives: torch-fidelity's port of the 2015 TensorFlow graph, with its weights."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cachequant.errors import UserError
from cachequant.evaluation.extra import require
from cachequant.evaluation.weights import INCEPTION, find_weights
from cachequant.models.original.checkpoint import read_checkpoint

POOL, SPATIAL, CLASSES = 2048, 2023, 1008
SPATIAL_CHANNELS = 7


@dataclass(frozen=True)
class InceptionFeatures:
    """What guided-diffusion's evaluator reads from the graph.

    Attributes:
        pool: [B, 2048] of pool_3, for FID, precision and recall.
        spatial: [B, 2023] the first 7 of mixed_6/conv's channels at 17 × 17 places, channels last, for sFID.
        probabilities: [B, 1008] softmax of the logits without their bias, for IS.
    """

    pool: Tensor
    spatial: Tensor
    probabilities: Tensor


class Inception(nn.Module):
    """Takes images [B, 3, H, W] uint8 of any size; resizes them as TensorFlow 1 does.

    mixed_6 is called Mixed_6d in torchvision's and torch-fidelity's naming; its `conv` is the 1 × 1 branch after ReLU.

    Args:
        state: the network's weights, of `torch_fidelity`'s FeatureExtractorInceptionV3.

    Raises:
        UserError: torch-fidelity is missing, or the weights are another network's.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        library = require("torch_fidelity")
        packed = io.BytesIO()  # the library reads a file itself, with pickle allowed; ours was read without
        torch.save(state, packed)
        packed.seek(0)
        try:
            self.network = library.FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=packed
            )
        except (RuntimeError, TypeError, AttributeError) as error:
            raise UserError(
                f"these are not {INCEPTION.name} ({str(error).splitlines()[0][:60]}): fetch it again"
            ) from None
        self._spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._catch)

    @staticmethod
    def load(folder: Path | None = None) -> Inception:
        """The original weights, from `folder` or torch.hub's cache (`find_weights`).

        Raises:
            UserError: they are not there, or damaged.
        """
        return Inception(read_checkpoint(find_weights(INCEPTION, folder)).tensors).eval()

    def _catch(self, _: nn.Module, __: Any, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS]

    @torch.no_grad()
    def forward(self, images: Tensor) -> InceptionFeatures:
        """Features of images [B, 3, H, W] uint8."""
        pool, logits = self.network(images)  # [B, 2048], [B, 1008]
        assert self._spatial is not None
        spatial = self._spatial.permute(0, 2, 3, 1).flatten(1)  # [B, 17 · 17 · 7]
        self._spatial = None
        return InceptionFeatures(pool, spatial, logits.softmax(1))
