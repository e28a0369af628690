"""From images to numbers without the published networks: sums over workers, paired metrics, references, refusals."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cachequant.errors import UserError
from cachequant.evaluation import measures, reference
from cachequant.evaluation.features import load_feature_network
from cachequant.evaluation.frechet import FeatureStatistics, ScoreSums, frechet_distance, inception_score
from cachequant.evaluation.inception import Inception, InceptionFeatures
from cachequant.evaluation.manifold import precision_recall
from cachequant.evaluation.paired import psnr, ssim
from cachequant.evaluation.suite import INCEPTION, Request, Suite

FASHION = "frechet_fashion_cnn"
WIDTHS = {"POOL": 6, "SPATIAL": 4, "CLASSES": 5}


class Projection(nn.Module):
    """Stands in for Inception: linear features of the pixels, from a seed."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.maps = [torch.randn(3 * 16 * 16, width, generator=generator).double() / 30 for width in WIDTHS.values()]

    def forward(self, images: Tensor) -> InceptionFeatures:
        """[B, 3, 16, 16] uint8."""
        pool, spatial, logits = (images.double().flatten(1) / 255 @ m for m in self.maps)
        return InceptionFeatures(pool, spatial, logits.softmax(1))


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Projection:
    """Replaces Inception."""
    projection = Projection()
    monkeypatch.setattr(Inception, "load", lambda _: projection)
    for name, width in WIDTHS.items():
        monkeypatch.setattr(measures, name, width)
    for name in ("POOL", "SPATIAL"):
        monkeypatch.setattr(reference, name, WIDTHS[name])
    return projection


def pictures(count: int, seed: int, channels: int = 3, size: int = 16) -> Tensor:
    return torch.randint(0, 256, (count, channels, size, size), generator=torch.Generator().manual_seed(seed)).byte()


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    """40 images and 30 references."""
    save_file({"images": pictures(40, 1)}, tmp_path / "made.safetensors")
    np.savez(tmp_path / "real.npz", arr_0=pictures(30, 2).permute(0, 2, 3, 1).numpy())
    return tmp_path / "made.safetensors", tmp_path / "real.npz"


def run(suite: Suite, batch_size: int) -> dict[str, float]:
    """One worker."""
    for images, measure in suite.passes:
        for start in range(0, images.count, batch_size):
            measure.update(start, images.read(start, min(start + batch_size, images.count)))
    return suite.results()


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    whole = FeatureStatistics(features.shape[1])
    whole.update(features)
    return whole.mean, whole.covariance


def test_numbers_are_the_formulas_of_all_features_at_once(network: Projection, paths: tuple[Path, Path]) -> None:
    found = run(Suite.of(Request(paths[0], INCEPTION, paths[1])), 7)
    made, real = network(pictures(40, 1)), network(pictures(30, 2))
    assert found["fid"] == pytest.approx(frechet_distance(*statistics(made.pool), *statistics(real.pool)), rel=1e-9)
    spatial = frechet_distance(*statistics(made.spatial), *statistics(real.spatial))
    assert found["sfid"] == pytest.approx(spatial, rel=1e-9)
    assert found["is"] == pytest.approx(inception_score(made.probabilities), rel=1e-9)
    assert (found["precision"], found["recall"]) == precision_recall(real.pool.float(), made.pool.float())
    assert list(found) == list(INCEPTION)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_number_of_workers_gives_the_same_numbers(
    network: Projection, paths: tuple[Path, Path], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker sees its part; states are added as the reduction over processes adds them."""
    monkeypatch.setattr(measures, "ScoreSums", partial(ScoreSums, size=9))  # several splits
    request = Request(paths[0], INCEPTION, paths[1])
    alone = run(Suite.of(request), 7)
    suites = [Suite.of(request) for _ in range(workers)]
    for rank, suite in enumerate(suites):
        for images, measure in suite.passes:
            first, last = images.count * rank // workers, images.count * (rank + 1) // workers
            for start in range(first, last, 4):
                measure.update(start, images.read(start, min(start + 4, last)))
    for number, (_, measure) in enumerate(suites[0].passes):
        states = [suite.passes[number][1].state() for suite in suites]
        measure.restore([sum(tensors[1:], tensors[0].clone()) for tensors in zip(*states, strict=True)])
    assert suites[0].results() == pytest.approx(alone, rel=1e-9, abs=1e-9)


def test_statistics_of_the_reference_file_come_before_its_images(network: Projection, paths: tuple[Path, Path]) -> None:
    """As in guided-diffusion: mu and sigma are of the whole data set, arr_0 holds fewer images, for precision and recall."""
    rng = np.random.default_rng(0)
    mu, root = rng.normal(size=6), rng.normal(size=(6, 6))
    extra = {"mu": mu, "sigma": root @ root.T, "mu_s": np.zeros(4), "sigma_s": np.eye(4)}
    path = paths[0].parent / "both.npz"
    np.savez(path, arr_0=pictures(30, 2).permute(0, 2, 3, 1).numpy(), **extra)
    found = run(Suite.of(Request(paths[0], INCEPTION, path)), 9)
    made, real = network(pictures(40, 1)), network(pictures(30, 2))
    expected = frechet_distance(*statistics(made.pool), torch.from_numpy(mu), torch.from_numpy(root @ root.T))
    assert found["fid"] == pytest.approx(expected, rel=1e-9)
    assert (found["precision"], found["recall"]) == precision_recall(real.pool.float(), made.pool.float())
    np.savez(path, **extra)
    assert set(run(Suite.of(Request(paths[0], ("fid", "sfid", "is"), path)), 9)) == {"fid", "sfid", "is"}
    with pytest.raises(UserError, match="recall needs images of the reference"):
        Suite.of(Request(paths[0], ("fid", "recall"), path))


def test_paired_metrics_are_means_over_pairs(paths: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pictures(40, 1).float(), pictures(40, 3).float()
    save_file({"images": torch.cat([b[:39], a[39:]]).byte()}, tmp_path / "other.safetensors")
    found = run(Suite.of(Request(paths[0], ("ssim", "psnr"), tmp_path / "other.safetensors")), 16)
    decibels = psnr(a[:39], b[:39], 255.0)
    assert found["psnr"] == pytest.approx((float(decibels.sum()) + 100.0) / 40)  # the last pair is equal
    assert found["ssim"] == pytest.approx((float(ssim(a[:39], b[:39], 255.0).sum()) + 1) / 40)
    with pytest.raises(UserError, match="40 images and 30 in --ref"):
        Suite.of(Request(paths[0], ("psnr",), paths[1]))


def test_the_miniatures_distance_is_that_of_its_features(tmp_path: Path) -> None:
    made, real = pictures(30, 4, 1, 32), pictures(25, 5, 1, 32)
    save_file({"images": made}, tmp_path / "made.safetensors")
    save_file({"images": real}, tmp_path / "real.safetensors")
    found = run(Suite.of(Request(tmp_path / "made.safetensors", (FASHION,), tmp_path / "real.safetensors")), 8)
    network = load_feature_network()
    features = [network.features(x.float() / 127.5 - 1) for x in (made, real)]
    expected = frechet_distance(*statistics(features[0]), *statistics(features[1]))
    assert found == {FASHION: pytest.approx(expected, rel=1e-6)}
    save_file({"images": pictures(4, 6, 3, 32)}, tmp_path / "colour.safetensors")
    with pytest.raises(UserError, match="in colour: choose fid"):
        run(Suite.of(Request(tmp_path / "colour.safetensors", (FASHION,), tmp_path / "real.safetensors")), 4)


def test_equal_sets_are_perfect(network: Projection, paths: tuple[Path, Path]) -> None:
    found = run(Suite.of(Request(paths[0], (*INCEPTION, "psnr", "ssim"), paths[0])), 11)
    assert found["fid"] == pytest.approx(0, abs=1e-6) and found["sfid"] == pytest.approx(0, abs=1e-6)
    assert found["precision"] == found["recall"] == 1.0
    assert found["psnr"] == 100.0 and found["ssim"] == pytest.approx(1.0)
    assert all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (("fidd",), "metric 'fidd' is unknown"),
        ((), "is unknown"),
        (("fid",), "give --ref"),
        (("clip",), "give --prompts"),
    ],
)
def test_impossible_requests_are_refused(metrics: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        Request(tmp_path, metrics)


def test_prompts_follow_the_seed_of_shards_and_the_order_of_files(tmp_path: Path) -> None:
    from cachequant.evaluation.images import open_images
    from cachequant.evaluation.suite import _texts
    from cachequant.shards import ShardSet

    one = ShardSet.create(tmp_path, {}, 7, 4, 4)
    one.write(one.shards()[0], torch.rand(4, 3, 4, 4))
    assert _texts(open_images(tmp_path), ("a", "b", "c")) == ["b", "c", "a", "b"]  # as `Generator` cycles them
    save_file({"images": pictures(2, 0)}, tmp_path / "x.safetensors")
    assert _texts(open_images(tmp_path / "x.safetensors"), ("a", "b")) == ["a", "b"]
    with pytest.raises(UserError, match="2 images and 3 prompts"):
        _texts(open_images(tmp_path / "x.safetensors"), ("a", "b", "c"))
