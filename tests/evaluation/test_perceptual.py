"""LPIPS and the CLIP score with seeded random weights against their formulas in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cachequant.errors import UserError
from cachequant.evaluation.perceptual import ClipScore, Lpips


@pytest.fixture(scope="module")
def alexnet() -> nn.Module:
    """torchvision's AlexNet with random weights."""
    models = pytest.importorskip("torchvision.models", reason="needs torchvision: pip install -e '.[eval]'")
    torch.manual_seed(0)
    network: nn.Module = models.alexnet(weights=None).eval()
    return network


def test_lpips_is_its_formula_in_float64(alexnet: nn.Module) -> None:
    """Σ over five layers of the mean over places of w · (unit features' difference)²."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8) for _ in range(2))
    network = Lpips(alexnet.state_dict()).eval()
    shift = torch.tensor([-0.030, -0.088, -0.188]).double().view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).double().view(1, 3, 1, 1)

    def features(images: Tensor) -> list[Tensor]:
        x, found = (images.double() / 127.5 - 1 - shift) / scale, []
        for layer in alexnet.double().features:  # type: ignore[union-attr, operator]
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x / x.square().sum(1, keepdim=True).sqrt())
        return found

    expected = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for linear, x, y in zip(network.network.lins, features(a), features(b), strict=True):
            weights = linear.model[-1].weight.double()
            assert (weights >= 0).all() and weights.any()  # the published linear layers, which torchmetrics ships
            expected += (weights * (x - y).square()).sum(1).mean((1, 2))
    alexnet.float()
    torch.testing.assert_close(network(a, b).double(), expected, rtol=1e-3, atol=1e-6)
    assert torch.equal(network(a, a), torch.zeros(2))
    torch.testing.assert_close(network(a, b), network(b, a))


def test_other_weights_are_refused() -> None:
    pytest.importorskip("torchvision.models", reason="needs torchvision: pip install -e '.[eval]'")
    with pytest.raises(UserError, match="these are not alexnet"):
        Lpips({"features.0.weight": torch.zeros(1)})


@pytest.fixture(scope="module")
def clip() -> tuple[Any, Any, Any]:
    """A tiny open_clip model, its preprocessing and the real tokenizer."""
    library = pytest.importorskip("open_clip", reason="needs open_clip: pip install -e '.[eval]'")
    torch.manual_seed(0)
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    model = library.model.CLIP(16, vision, text).eval()
    return model, library.image_transform(32, is_train=False), library.get_tokenizer("ViT-g-14")


@pytest.mark.parametrize("sign", [1, -1])
def test_clip_score_is_a_hundred_times_the_cosine_or_zero(clip: tuple[Any, Any, Any], sign: int) -> None:
    model, preprocess, tokenize = copy.deepcopy(clip)
    model.text_projection.data *= sign  # turns every cosine round
    images = torch.randint(0, 256, (3, 3, 48, 40), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    texts = ["a fox in the snow", "two boats", "a red chair"]
    found = ClipScore(model, preprocess, tokenize)(images, texts)
    exact, cosines = copy.deepcopy(model).double(), []
    with torch.no_grad():
        for image, text in zip(images, texts, strict=True):
            pixels = preprocess(Image.fromarray(image.permute(1, 2, 0).numpy()))[None]
            x, y = exact.encode_image(pixels.double())[0], exact.encode_text(tokenize([text]))[0]
            cosines.append(float(x @ y / (x.norm() * y.norm())))
    assert all(c != 0 and (c > 0) == (cosines[0] > 0) for c in cosines)
    expected = torch.tensor([100 * max(0.0, c) for c in cosines])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
