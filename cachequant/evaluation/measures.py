"""What is gathered from a stream of images for each metric: sums, so that any number of workers may share the images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cachequant.errors import UserError
from cachequant.evaluation.frechet import FeatureStatistics, Gaussian, ScoreSums
from cachequant.evaluation.images import ImageSet
from cachequant.evaluation.inception import CLASSES, POOL, SPATIAL, Inception
from cachequant.evaluation.judges import DrawingFeatures, FeatureNetwork
from cachequant.evaluation.paired import feature_distance, finite_psnr, ssim
from cachequant.evaluation.perceptual import ClipScore, Lpips


class Measure(nn.Module):
    """Sees every image once, in any order, in any worker; its `state` adds over workers."""

    def update(self, start: int, images: Tensor) -> None:
        """Take the images start … start + B - 1: [B, 3, H, W] uint8 on this module's device."""
        raise NotImplementedError

    def state(self) -> list[Tensor]:
        """Tensors of one shape in every worker, on the CPU, whose sums over workers are those of all images."""
        raise NotImplementedError

    def restore(self, state: list[Tensor]) -> None:
        """Take the sums over all workers."""
        raise NotImplementedError


class InceptionMeasure(Measure):
    """Statistics of Inception's features, for FID, sFID, IS, precision and recall.

    Args:
        network: with its weights.
        wanted: names of metrics; only what they need is kept. Precision and recall keep 8 KB an image.
        count: number of images.
    """

    def __init__(self, network: Inception, wanted: set[str], count: int) -> None:
        super().__init__()
        self.network = network
        self.pool = FeatureStatistics(POOL) if "fid" in wanted else None
        self.spatial = FeatureStatistics(SPATIAL) if "sfid" in wanted else None
        self.score = ScoreSums(count, CLASSES) if "is" in wanted else None
        self.points = torch.zeros(count, POOL) if wanted & {"precision", "recall"} else None

    def update(self, start: int, images: Tensor) -> None:
        """One pass of the network."""
        features = self.network(images)
        if self.pool is not None:
            self.pool.update(features.pool)
        if self.spatial is not None:
            self.spatial.update(features.spatial)
        if self.score is not None:
            self.score.update(start, features.probabilities)
        if self.points is not None:
            self.points[start : start + len(images)] = features.pool.cpu()

    def state(self) -> list[Tensor]:
        """Sums of each part."""
        state = [tensor for part in self._parts() for tensor in part.state()]
        return state if self.points is None else [*state, self.points]

    def restore(self, state: list[Tensor]) -> None:
        """The reverse of `state`."""
        rest = list(state)
        for part in self._parts():
            part.restore(rest[:3])
            rest = rest[3:]
        if self.points is not None:
            self.points = rest[0]

    def gaussians(self) -> dict[str, Gaussian]:
        """Metric -> mean and covariance of its features."""
        parts = {"fid": self.pool, "sfid": self.spatial}
        return {name: part.gaussian for name, part in parts.items() if part is not None}

    def _parts(self) -> list[FeatureStatistics | ScoreSums]:
        return [part for part in (self.pool, self.spatial, self.score) if part is not None]


class FrechetMeasure(Measure):
    """Statistics of a judge's features, for its Fréchet distance, which is not FID."""

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__()
        self.network, self.statistics = network, FeatureStatistics(network.channels)

    def update(self, start: int, images: Tensor) -> None:
        """One pass of the network; raises UserError for images that it was not made for."""
        self.statistics.update(self.network(images.float() / 255))

    def state(self) -> list[Tensor]:
        """Of the statistics."""
        return self.statistics.state()

    def restore(self, state: list[Tensor]) -> None:
        """Of the statistics."""
        self.statistics.restore(state)


class MeanMeasure(Measure):
    """Means over images of numbers that each has.

    Args:
        names: of the numbers.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.total, self.count = torch.zeros(len(names), dtype=torch.float64), torch.zeros((), dtype=torch.float64)

    def add(self, values: Sequence[Tensor]) -> None:
        """One [B] tensor a name."""
        self.total += torch.stack([value.double().sum().cpu() for value in values])
        self.count += len(values[0])

    def means(self) -> dict[str, float]:
        """Name -> mean."""
        return dict(zip(self.names, (self.total / self.count).tolist(), strict=True))

    def state(self) -> list[Tensor]:
        """Sums and count."""
        return [self.total, self.count]

    def restore(self, state: list[Tensor]) -> None:
        """The reverse of `state`."""
        self.total, self.count = state


class PairedMeasure(MeanMeasure):
    """PSNR, SSIM and LPIPS of each image to the reference's image of the same number (the same noise).

    Args:
        names: of psnr, ssim and lpips.
        reference: as many images.
        lpips: its network, where lpips is asked for.
    """

    def __init__(self, names: Sequence[str], reference: ImageSet, lpips: Lpips | None) -> None:
        super().__init__(names)
        self.reference, self.lpips = reference, lpips

    def update(self, start: int, images: Tensor) -> None:
        """Read the reference's images of the same numbers and compare.

        Raises:
            UserError: they are of another size.
        """
        other = self.reference.read(start, start + len(images)).to(images.device)
        if other.shape != images.shape:
            raise UserError(
                f"images are {images.shape[3]} × {images.shape[2]}, the reference's {other.shape[3]} × {other.shape[2]}: "
                "expected one size, or --resize N for both"
            )
        self.add([self._compare(name, images, other) for name in self.names])

    def _compare(self, name: str, images: Tensor, other: Tensor) -> Tensor:
        if name == "lpips":
            assert self.lpips is not None
            return self.lpips(images, other)
        if name == "psnr":
            return finite_psnr(images.float(), other.float(), 255.0)
        return ssim(images.float(), other.float(), 255.0)


class ClipMeasure(MeanMeasure):
    """CLIP score of each image and its prompt.

    Args:
        network: with its weights.
        prompts: one an image.
    """

    def __init__(self, network: ClipScore, prompts: Sequence[str]) -> None:
        super().__init__(["clip"])
        self.network, self.prompts = network, prompts

    def update(self, start: int, images: Tensor) -> None:
        """Score a batch."""
        self.add([self.network(images, self.prompts[start : start + len(images)])])


class DistanceMeasure(MeanMeasure):
    """Distance of each image's features to those of the reference's image of the same number (the same noise).

    Args:
        name: of the metric.
        network: whose features.
        reference: as many images.
    """

    def __init__(self, name: str, network: FeatureNetwork, reference: ImageSet) -> None:
        super().__init__([name])
        self.network, self.reference = network, reference

    def update(self, start: int, images: Tensor) -> None:
        """Read the reference's images of the same numbers and compare."""
        other = self.reference.read(start, start + len(images)).to(images.device)
        self.add([feature_distance(*(self.network(x.float() / 255) for x in (images, other)))])


class RetrievalMeasure(MeanMeasure):
    """Share of images that find their own prompt first.

    Args:
        network: of the judge of drawings.
        answers: the prompt of each image.
        prompts: all that compete.
    """

    def __init__(self, network: DrawingFeatures, answers: Sequence[str], prompts: Sequence[str]) -> None:
        super().__init__(["retrieval"])
        self.network, self.answers, self.prompts = network, answers, list(dict.fromkeys(prompts))

    def update(self, start: int, images: Tensor) -> None:
        """Look a batch up."""
        own = list(self.answers[start : start + len(images)])
        self.add([self.network.found(images.float() / 255, own, self.prompts)])
