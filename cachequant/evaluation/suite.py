"""The metrics that one evaluation asks for: which images are seen by which networks, and the numbers in the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cachequant.errors import UserError
from cachequant.evaluation.frechet import frechet_distance
from cachequant.evaluation.images import ImageSet, open_images
from cachequant.evaluation.inception import Inception
from cachequant.evaluation.judges import NETWORKS, DrawingFeatures, FeatureNetwork
from cachequant.evaluation.manifold import precision_recall
from cachequant.evaluation.measures import (
    ClipMeasure,
    DistanceMeasure,
    FrechetMeasure,
    InceptionMeasure,
    Measure,
    PairedMeasure,
    RetrievalMeasure,
)
from cachequant.evaluation.perceptual import ClipScore, Lpips
from cachequant.evaluation.reference import Reference, open_reference

INCEPTION = ("fid", "sfid", "is", "precision", "recall")
PAIRED = ("psnr", "ssim", "lpips")
JUDGED = tuple(f"{kind}_{name}" for name in NETWORKS for kind in ("frechet", "distance"))
"""Fréchet distance of two sets, and mean distance of pairs, over a miniature's judge."""
METRICS = (*INCEPTION, "clip", *PAIRED, *JUDGED, "retrieval")
NEEDS_REFERENCE = {"fid", "sfid", "precision", "recall", *PAIRED, *JUDGED}
NEEDS_PROMPTS = {"clip", "retrieval"}


@dataclass(frozen=True)
class Request:
    """One evaluation.

    Attributes:
        images: what is judged (`open_images`).
        metrics: of `METRICS`.
        reference: what it is compared with (`open_reference`); in the paired metrics image by image.
        prompts: the text of each image, for clip and retrieval; for shards all prompts that they were drawn from.
        weights: folder of the networks' weights, else the libraries' caches.
        resize: pixels to cut and resize images and reference to before all metrics but clip.
    """

    images: Path
    metrics: tuple[str, ...] = INCEPTION
    reference: Path | None = None
    prompts: tuple[str, ...] = ()
    weights: Path | None = None
    resize: int | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown or not self.metrics:
            raise UserError(
                f"metric {unknown[0] if unknown else ''!r} is unknown, expected some of {', '.join(METRICS)}"
            )
        lacking = [name for name in self.metrics if name in NEEDS_REFERENCE]
        if lacking and self.reference is None:
            raise UserError(f"{lacking[0]} compares with a reference and there is none: give --ref")
        texts = [name for name in self.metrics if name in NEEDS_PROMPTS]
        if texts and not self.prompts:
            raise UserError(f"{texts[0]} needs the text of each image: give --prompts FILE with one a line")


Device = torch.device | str


@dataclass(frozen=True)
class Part:
    """Metrics that share passes over images.

    Attributes:
        passes: images, and the measure that is to see them all.
        results: the numbers then, by name, given the device to compute on.
    """

    passes: tuple[tuple[ImageSet, Measure], ...]
    results: Callable[[Device], dict[str, float]]


@dataclass(frozen=True)
class Suite:
    """All parts of a request."""

    request: Request
    parts: tuple[Part, ...]

    @staticmethod
    def of(request: Request) -> Suite:
        """Open the images and load the networks.

        Raises:
            UserError: anything that is missing, before any image is read.
        """
        asked = set(request.metrics)
        images = open_images(request.images, request.resize)
        reference = Reference(None)
        if request.reference is not None and asked & NEEDS_REFERENCE:
            reference = open_reference(request.reference, request.resize)
        parts = []
        if asked & set(INCEPTION):
            network = Inception.load(request.weights)
            parts.append(_inception_part(asked & set(INCEPTION), images, reference, network))
        if asked & set(PAIRED):
            network_of_pairs = Lpips.load(request.weights) if "lpips" in asked else None
            parts.append(_paired_part([n for n in PAIRED if n in asked], images, reference, network_of_pairs))
        for name in NETWORKS:
            parts += _judge_parts(name, asked, images, reference)
        if "retrieval" in asked:
            parts.append(_retrieval_part(open_images(request.images), request.prompts))
        if "clip" in asked:
            parts.append(_clip_part(open_images(request.images), request.prompts, ClipScore.load(request.weights)))
        return Suite(request, tuple(parts))

    @property
    def passes(self) -> list[tuple[ImageSet, Measure]]:
        """Of all parts."""
        return [one for part in self.parts for one in part.passes]

    def results(self, device: Device = "cpu") -> dict[str, float]:
        """The numbers, in the order of the request, once every measure has seen all its images.

        Args:
            device: where precision and recall compute distances.
        """
        found: dict[str, float] = {}
        for part in self.parts:
            found |= part.results(device)
        return {name: found[name] for name in self.request.metrics}


def _inception_part(wanted: set[str], images: ImageSet, reference: Reference, network: Inception) -> Part:
    """FID, sFID, IS, precision, recall; the reference's images are seen only for what its file does not bring along."""
    mine = InceptionMeasure(network, wanted, images.count)
    missing = wanted - {"is"} - set(reference.gaussians)
    other, passes = None, [(images, mine)]
    if missing:
        source = _images_of(reference, sorted(missing)[0])
        other = InceptionMeasure(network, missing, source.count)
        passes.append((source, other))

    def results(device: Device) -> dict[str, float]:
        """Every distance and score that the passes' sums give."""
        theirs = {**reference.gaussians, **(other.gaussians() if other else {})}
        found = {name: frechet_distance(*gaussian, *theirs[name]) for name, gaussian in mine.gaussians().items()}
        if mine.score is not None:
            found["is"] = mine.score.value
        if mine.points is not None:
            assert other is not None and other.points is not None
            found["precision"], found["recall"] = precision_recall(other.points, mine.points, device=device)
        return found

    return Part(tuple(passes), results)


def _paired_part(names: Sequence[str], images: ImageSet, reference: Reference, network: Lpips | None) -> Part:
    """PSNR, SSIM, LPIPS."""
    measure = PairedMeasure(names, _pairs_of(images, reference, names[0]), network)
    return Part(((images, measure),), lambda _: measure.means())


def _judge_parts(name: str, asked: set[str], images: ImageSet, reference: Reference) -> list[Part]:
    """What is asked for of a miniature's judge."""
    frechet, distance = (f"{kind}_{name}" for kind in ("frechet", "distance"))
    if not asked & {frechet, distance}:
        return []
    network, parts = NETWORKS[name](), []
    if frechet in asked:
        parts.append(_frechet_part(frechet, network, images, reference))
    if distance in asked:
        measure = DistanceMeasure(distance, network, _pairs_of(images, reference, distance))
        parts.append(Part(((images, measure),), lambda _: measure.means()))
    return parts


def _frechet_part(name: str, network: FeatureNetwork, images: ImageSet, reference: Reference) -> Part:
    """The distance; the reference's images are seen only where it does not bring their statistics along."""
    mine, theirs = FrechetMeasure(network), FrechetMeasure(network)
    passes: list[tuple[ImageSet, Measure]] = [(images, mine)]
    if name not in reference.gaussians:
        passes.append((_images_of(reference, name), theirs))

    def results(_: Device) -> dict[str, float]:
        other = reference.gaussians.get(name) or theirs.statistics.gaussian
        return {name: frechet_distance(*mine.statistics.gaussian, *other)}

    return Part(tuple(passes), results)


def _retrieval_part(images: ImageSet, prompts: tuple[str, ...]) -> Part:
    """Whether images find their prompts, at the size they have."""
    measure = RetrievalMeasure(DrawingFeatures(), _texts(images, prompts), prompts)
    return Part(((images, measure),), lambda _: measure.means())


def _clip_part(images: ImageSet, prompts: tuple[str, ...], network: ClipScore) -> Part:
    """The CLIP score, of images at the size they have."""
    measure = ClipMeasure(network, _texts(images, prompts))
    return Part(((images, measure),), lambda _: measure.means())


def _images_of(reference: Reference, metric: str) -> ImageSet:
    if reference.images is None:
        raise UserError(f"{metric} needs images of the reference, but --ref holds statistics only: give one with arr_0")
    return reference.images


def _pairs_of(images: ImageSet, reference: Reference, metric: str) -> ImageSet:
    """The reference's images, as many as are judged."""
    source = _images_of(reference, metric)
    if source.count != images.count:
        raise UserError(
            f"{metric} compares image by image, but there are {images.count} images and {source.count} in --ref: "
            "give the reference's images of the same seeds"
        )
    return source


def _texts(images: ImageSet, prompts: tuple[str, ...]) -> list[str]:
    """The text of each image: that of its seed where the set knows seeds, else line by line."""
    if images.first_seed is not None:
        return [prompts[(images.first_seed + i) % len(prompts)] for i in range(images.count)]
    if len(prompts) != images.count:
        raise UserError(
            f"there are {images.count} images and {len(prompts)} prompts: expected a line an image, in order"
        )
    return list(prompts)
