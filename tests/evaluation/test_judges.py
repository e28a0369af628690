"""The miniatures' judges: features and retrieval against plain recomputation, their metrics in `cachequant evaluate`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cachequant.errors import UserError
from cachequant.evaluation.features import FEATURE_CHANNELS, TEST_STATISTICS, fashion_statistics, load_feature_network
from cachequant.evaluation.frechet import FeatureStatistics, frechet_distance
from cachequant.evaluation.judges import DrawingFeatures, FashionFeatures, Features
from cachequant.evaluation.retrieval import load_judge, prompt_similarities, retrieval_accuracy
from cachequant.evaluation.suite import Request, Suite

PROMPTS = ("red apple", "bus", "black cat", "rocket", "red apple")


@pytest.fixture(scope="module")
def drawings() -> DrawingFeatures:
    """The judge of drawings."""
    return DrawingFeatures()


def pictures(count: int, seed: int, channels: int, size: int) -> Tensor:
    return torch.randint(0, 256, (count, channels, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def run(suite: Suite, batch_size: int) -> dict[str, float]:
    for images, measure in suite.passes:
        for start in range(0, images.count, batch_size):
            measure.update(start, images.read(start, min(start + batch_size, images.count)))
    return suite.results()


def test_embeddings_of_drawings_are_those_whose_cosines_are_the_scores(drawings: DrawingFeatures) -> None:
    images = pictures(5, 0, 3, 64).float() / 255
    features = drawings(images)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
    network, tokenizer = load_judge()
    ids = tokenizer(list(PROMPTS), padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        text = torch.nn.functional.normalize(network.get_text_features(input_ids=ids).pooler_output, dim=-1)
        scores = features @ text.T * network.logit_scale.exp()
    torch.testing.assert_close(scores, prompt_similarities((network, tokenizer), images, list(PROMPTS)))
    answers, distinct = [PROMPTS[i] for i in (0, 1, 2, 3, 4)], list(dict.fromkeys(PROMPTS))
    found = drawings.found(images, answers, distinct)
    similar = prompt_similarities((network, tokenizer), images, distinct)
    assert float(found.mean()) == retrieval_accuracy(similar, torch.tensor([0, 1, 2, 3, 0]))
    assert set(found.tolist()) <= {0.0, 1.0}
    best = [distinct[i] for i in similar.argmax(1)]
    assert drawings.found(images, best, distinct).tolist() == [1.0] * 5


def test_features_do_not_depend_on_the_batch(drawings: DrawingFeatures) -> None:
    for network, images in ((drawings, pictures(7, 1, 3, 64)), (FashionFeatures(), pictures(7, 1, 1, 32))):
        x = images.float() / 255
        torch.testing.assert_close(Features(network)(x, 3), Features(network)(x, 7), rtol=1e-5, atol=1e-6)


def test_images_that_a_judge_was_not_made_for_are_refused(drawings: DrawingFeatures) -> None:
    with pytest.raises(
        UserError, match="drawings_clip is for colour images of 64 × 64, these are 32 × 32 in 3 channels"
    ):
        drawings(torch.zeros(1, 3, 32, 32))
    with pytest.raises(UserError, match="fashion_cnn is for grey images"):
        FashionFeatures()(torch.rand(2, 3, 32, 32))


def test_distances_of_pairs_and_of_sets_and_retrieval_as_metrics(drawings: DrawingFeatures, tmp_path: Path) -> None:
    made, real = pictures(9, 2, 3, 64), pictures(9, 3, 3, 64)
    save_file({"images": made}, tmp_path / "made.safetensors")
    save_file({"images": real}, tmp_path / "real.safetensors")
    names = ("frechet_drawings_clip", "distance_drawings_clip", "retrieval")
    prompts = tuple(PROMPTS[i % 4] for i in range(9))
    found = run(Suite.of(Request(tmp_path / "made.safetensors", names, tmp_path / "real.safetensors", prompts)), 4)
    ours, theirs = (drawings(x.float() / 255).double() for x in (made, real))
    assert found["distance_drawings_clip"] == pytest.approx(float((ours - theirs).norm(dim=1).mean()), rel=1e-5)
    gaussians = []
    for features in (ours, theirs):
        statistics = FeatureStatistics(features.shape[1])
        statistics.update(features)
        gaussians.append(statistics.gaussian)
    assert found["frechet_drawings_clip"] == pytest.approx(frechet_distance(*gaussians[0], *gaussians[1]), rel=1e-3)
    hits = drawings.found(made.float() / 255, list(prompts), list(PROMPTS[:4]))
    assert found["retrieval"] == pytest.approx(float(hits.mean()))
    with pytest.raises(UserError, match="retrieval needs the text"):
        Request(tmp_path / "made.safetensors", ("retrieval",))


def test_the_shipped_statistics_are_of_non_negative_features() -> None:
    mean, covariance = fashion_statistics()
    assert mean.shape == (FEATURE_CHANNELS,) and (mean >= 0).all()
    assert torch.equal(covariance, covariance.T) and torch.linalg.eigvalsh(covariance).min() > -1e-9


def test_the_shipped_statistics_are_of_the_test_images() -> None:
    from cachequant.evaluation.fashion_mnist import load_fashion_mnist, to_model_range

    try:
        images = to_model_range(load_fashion_mnist("test")[0])
    except UserError:
        pytest.skip("Fashion-MNIST is not here")
    mean, _ = fashion_statistics()
    with torch.no_grad():
        features = torch.cat([load_feature_network().features(x) for x in images.split(1000)])
    torch.testing.assert_close(features.double().mean(0), mean, rtol=1e-5, atol=1e-6)


def test_statistics_that_lack_a_part_are_one_line(tmp_path: Path) -> None:
    save_file({"mean": torch.zeros(FEATURE_CHANNELS)}, tmp_path / TEST_STATISTICS)
    with pytest.raises(UserError, match=r"holds \['mean'\], expected mean and covariance: run scripts/train"):
        fashion_statistics(tmp_path)
