"""Networks that judge images as people do: LPIPS for pairs, CLIP for an image and its text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from cachequant.errors import UserError
from cachequant.evaluation.extra import require
from cachequant.evaluation.weights import (
    ALEXNET,
    CLIP_FILES,
    CLIP_REPOSITORY,
    VARIABLE,
    find_clip_weights,
    find_weights,
)
from cachequant.models.original.checkpoint import read_checkpoint

CLIP_MODEL = "ViT-g-14"


class Lpips(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018) over AlexNet, version 0.1; torchmetrics ships its linear layers.

    Args:
        backbone: torchvision's AlexNet weights.
    """

    def __init__(self, backbone: dict[str, Tensor]) -> None:
        super().__init__()
        require("torchvision.models")
        from torchmetrics.functional.image.lpips import _LPIPS

        self.network = _LPIPS(net="alex", pnet_rand=True)
        features = {k.removeprefix("features."): v for k, v in backbone.items() if k.startswith("features.")}
        slices = {name: name.split(".", 1)[1] for name in self.network.net.state_dict()}  # slice2.3.weight: 3.weight
        try:
            self.network.net.load_state_dict({name: features[layer] for name, layer in slices.items()})
        except (KeyError, RuntimeError) as error:
            raise UserError(f"these are not {ALEXNET.name} ({str(error)[:60]}): fetch it again") from None

    @staticmethod
    def load(folder: Path | None = None) -> Lpips:
        """The original weights, from `folder` or torch.hub's cache.

        Raises:
            UserError: they are not there, or damaged.
        """
        return Lpips(read_checkpoint(find_weights(ALEXNET, folder)).tensors).eval()

    @torch.no_grad()
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance [B] of images [B, 3, H, W] uint8."""
        a, b = (x.float() / 127.5 - 1 for x in (a, b))  # [-1, 1]
        distance: Tensor = self.network(a, b)  # [B, 1, 1, 1]
        return distance.flatten()


class ClipScore(nn.Module):
    """100 · max(cos(image, text), 0) (Hessel et al. 2021, with 100 for 2.5, as DeepCache and BK-SDM report it).

    Args:
        model: an open_clip model.
        preprocess: picture -> [3, H, W].
        tokenize: texts -> [B, L].
    """

    def __init__(self, model: Any, preprocess: Callable[[Any], Tensor], tokenize: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self._preprocess, self._tokenize = model, preprocess, tokenize

    @staticmethod
    def load(folder: Path | None = None) -> ClipScore:
        """ViT-g/14 trained on LAION-2B (34B samples), from `folder` or the hub's cache.

        Raises:
            UserError: open_clip is missing, or its weights are not there.
        """
        library, source = require("open_clip"), find_clip_weights(folder)
        try:
            model, _, preprocess = library.create_model_and_transforms(CLIP_MODEL, pretrained=source)
        except Exception as error:  # the hub's client raises many kinds; each means that the file cannot be had
            raise UserError(
                f"weights of CLIP's {CLIP_MODEL} cannot be had ({' '.join(str(error).split())[:60]}): put {CLIP_FILES[0]} "
                f"from huggingface.co/{CLIP_REPOSITORY} into a folder that --weights or {VARIABLE} names"
            ) from None
        return ClipScore(model.eval(), preprocess, library.get_tokenizer(CLIP_MODEL))

    @torch.no_grad()
    def forward(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] uint8 and a text each."""
        device = next(self.model.parameters()).device
        pictures = [Image.fromarray(x.permute(1, 2, 0).cpu().numpy()) for x in images]
        pixels = torch.stack([self._preprocess(picture) for picture in pictures]).to(device)
        image = nn.functional.normalize(self.model.encode_image(pixels).float(), dim=-1)  # [B, D]
        text = nn.functional.normalize(self.model.encode_text(self._tokenize(list(texts)).to(device)).float(), dim=-1)
        return 100 * (image * text).sum(-1).clamp(min=0)
