"""Inception with seeded random weights: our features against torch-fidelity's and against float64, layer by layer."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cachequant.errors import UserError
from cachequant.evaluation.frechet import FeatureStatistics, frechet_distance, inception_score
from cachequant.evaluation.inception import Inception
from cachequant.evaluation.manifold import precision_recall
from cachequant.evaluation.measures import InceptionMeasure
from cachequant.evaluation.suite import INCEPTION, Request, Suite
from cachequant.evaluation.weights import WeightFile


def photos(count: int, seed: int, size: int = 40) -> Tensor:
    """Smooth random pictures [count, 3, size, size] uint8."""
    noise = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, size, mode="bicubic").clamp(0, 1).mul(255).byte()


def library_features(
    library: Any, state: dict[str, Tensor], images: Tensor, dtype: str = "float32"
) -> dict[str, Tensor]:
    """What torch-fidelity's own extractor gives."""
    names = ["2048", "logits_unbiased"]
    packed = io.BytesIO()
    torch.save(state, packed)
    packed.seek(0)
    network = library.FeatureExtractorInceptionV3(
        "own", names, feature_extractor_weights_path=packed, feature_extractor_internal_dtype=dtype
    )
    with torch.no_grad():
        return dict(zip(names, network(images), strict=True))


def test_features_are_the_librarys_and_close_to_float64(
    inception_library: Any, inception_state: dict[str, Tensor]
) -> None:
    images = photos(2, 0)
    mine = Inception(inception_state)(images)
    own = library_features(inception_library, inception_state, images)
    exact = library_features(inception_library, inception_state, images, "float64")
    assert torch.equal(mine.pool, own["2048"]) and torch.equal(mine.probabilities, own["logits_unbiased"].softmax(1))
    torch.testing.assert_close(mine.pool, exact["2048"], rtol=1e-4, atol=1e-4)
    assert mine.probabilities.shape == (2, 1008)


def test_spatial_features_are_seven_channels_of_mixed_6_conv_in_tensorflows_order(
    inception_state: dict[str, Tensor],
) -> None:
    """Convolution, normalisation and ReLU of mixed_6's first branch by hand in float64; features run fastest by channel."""
    images, network = photos(1, 1), Inception(inception_state)
    caught: list[Tensor] = []
    network.network.Mixed_6c.register_forward_hook(lambda _, __, output: caught.append(output))
    spatial = network(images).spatial
    x, w = caught[0].double(), {k: v.double() for k, v in inception_state.items() if k.startswith("Mixed_6d.branch1x1")}
    prefix = "Mixed_6d.branch1x1"
    y = torch.einsum("bihw,oi->bohw", x, w[f"{prefix}.conv.weight"][:, :, 0, 0])
    scale = w[f"{prefix}.bn.weight"] / (w[f"{prefix}.bn.running_var"] + 1e-3).sqrt()
    shift = w[f"{prefix}.bn.bias"] - w[f"{prefix}.bn.running_mean"] * scale
    y = (y * scale[:, None, None] + shift[:, None, None]).clamp(min=0)
    expected = np.transpose(y.numpy(), (0, 2, 3, 1))[..., :7].reshape(1, -1)  # NHWC, as the evaluator slices it
    assert spatial.shape == (1, 2023) and (spatial > 0).any()
    np.testing.assert_allclose(spatial.numpy(), expected, rtol=1e-4, atol=1e-4)


def low_rank_distance(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance of few samples in closed form: tr((C₁C₂)^½) is the nuclear norm of X₁X₂ᵀ."""
    a, b = a.double(), b.double()
    x, y = a - a.mean(0), b - b.mean(0)
    n, m = len(a) - 1, len(b) - 1
    cross = torch.linalg.svdvals(x @ y.T).sum() / (n * m) ** 0.5
    traces = x.square().sum() / n + y.square().sum() / m
    return float((a.mean(0) - b.mean(0)).square().sum() + traces - 2 * cross)


@pytest.mark.slow
def test_the_five_metrics_of_two_sets_of_images(
    inception_library: Any, inception_state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From files to numbers; reference values from the library's features and formulas that share no code with ours."""
    made, real = photos(12, 2), photos(10, 3)
    np.savez(tmp_path / "made.npz", arr_0=made.permute(0, 2, 3, 1).numpy())
    np.savez(tmp_path / "real.npz", arr_0=real.permute(0, 2, 3, 1).numpy())
    network = Inception(inception_state)
    monkeypatch.setattr(Inception, "load", lambda _: network)
    suite = Suite.of(Request(tmp_path / "made.npz", INCEPTION, tmp_path / "real.npz"))
    for images, measure in suite.passes:
        for start in range(0, images.count, 5):
            measure.update(start, images.read(start, min(start + 5, images.count)))
    found = suite.results()
    mine, theirs = (library_features(inception_library, inception_state, x) for x in (made, real))
    assert found["fid"] == pytest.approx(low_rank_distance(mine["2048"], theirs["2048"]), rel=1e-5)
    spatial = low_rank_distance(network(made).spatial, network(real).spatial)
    assert found["sfid"] == pytest.approx(spatial, rel=1e-5)
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    score = isc_features_to_metric(mine["logits_unbiased"], splits=1, shuffle=False)["inception_score_mean"]
    assert found["is"] == pytest.approx(score, rel=1e-5)
    pairs = {"prc_neighborhood": 3, "prc_batch_size": 4, "save_cpu_ram": False, "verbose": False}
    shares = prc_features_to_metric(mine["2048"], theirs["2048"], **pairs)
    assert (found["precision"], found["recall"]) == pytest.approx((shares["precision"], shares["recall"]))


def test_formulas_are_the_librarys_on_its_own_features(inception_library: Any) -> None:
    """The library's functions on features of another width, where its general eigenvalues are quick."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    generator = torch.Generator().manual_seed(4)
    made, real = (torch.randn(n, 24, generator=generator, dtype=torch.float64) * s for n, s in ((90, 1.1), (70, 0.9)))
    statistics = []
    for features in (made, real):
        statistics.append(FeatureStatistics(24))
        statistics[-1].update(features)
    a, b = statistics
    expected = fid_statistics_to_metric(fid_features_to_statistics(made), fid_features_to_statistics(real), False)
    measured = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert measured == pytest.approx(expected["frechet_inception_distance"], rel=1e-9)
    options = {"prc_neighborhood": 3, "prc_batch_size": 32, "save_cpu_ram": True, "verbose": False}
    shares = prc_features_to_metric(made, real, **options)
    assert precision_recall(real, made) == pytest.approx((shares["precision"], shares["recall"]))
    score = isc_features_to_metric(made, splits=3, shuffle=False)["inception_score_mean"]
    assert inception_score(made.softmax(1), 30) == pytest.approx(score, rel=1e-9)


def test_published_weights_load_from_a_folder_and_no_others(
    inception_state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cachequant.evaluation import inception
    from cachequant.storage import file_hash

    torch.save(inception_state, tmp_path / "x.pth")
    digest = file_hash(tmp_path / "x.pth")[:8]
    (tmp_path / "x.pth").rename(tmp_path / f"weights-{digest}.pth")
    monkeypatch.setattr(
        inception, "INCEPTION", WeightFile(f"weights-{digest}.pth", "https://example.org/x", "the test")
    )
    assert torch.equal(Inception.load(tmp_path).network.fc.weight, inception_state["fc.weight"])
    with pytest.raises(UserError, match="these are not"):
        Inception({"fc.weight": torch.zeros(1)})


def test_measures_keep_only_what_is_asked_for(inception_state: dict[str, Tensor]) -> None:
    measure = InceptionMeasure(Inception(inception_state), {"is"}, 3)
    assert measure.points is None and measure.pool is None and measure.spatial is None
    assert sum(tensor.numel() for tensor in measure.state()) < 2000
