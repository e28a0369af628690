"""Networks with seeded random weights in place of the published ones."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture(scope="session")
def inception_library() -> Any:
    """torch-fidelity, of the `eval` extra."""
    return pytest.importorskip("torch_fidelity", reason="needs torch-fidelity: pip install -e '.[eval]'")


@pytest.fixture(scope="session")
def inception_state(inception_library: Any) -> dict[str, Tensor]:
    """Weights of torch-fidelity's Inception under which activations keep their size from layer to layer."""
    kind = inception_library.FeatureExtractorInceptionV3
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "load_state_dict", lambda *_: None)
        network = kind("random", ["2048"], feature_extractor_weights_path=empty)
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            module.weight.data = torch.randn(module.weight.shape, generator=generator) * (2 / fan_in) ** 0.5
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features, generator=generator) * 0.1  # type: ignore[assignment]
            module.running_var = 0.5 + torch.rand(module.num_features, generator=generator)  # type: ignore[assignment]
            module.bias.data = torch.randn(module.num_features, generator=generator) * 0.1
    state: dict[str, Tensor] = network.state_dict()
    return state
