"""What images are compared with: images, or the statistics of a guided-diffusion reference batch."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cachequant.errors import UserError
from cachequant.evaluation.fashion_mnist import load_fashion_mnist, to_model_range
from cachequant.evaluation.features import fashion_statistics
from cachequant.evaluation.frechet import Gaussian
from cachequant.evaluation.images import ImageSet, open_images
from cachequant.evaluation.inception import POOL, SPATIAL
from cachequant.shards import to_uint8

FASHION = "fashion-mnist"
"""As --ref: the test images of Fashion-MNIST, for the miniature."""


@dataclass(frozen=True)
class Reference:
    """What is known of the reference.

    Attributes:
        images: its images, if it has any.
        gaussians: metric -> mean [C] and covariance [C, C] that the reference brings along.
    """

    images: ImageSet | None
    gaussians: dict[str, Gaussian] = field(default_factory=dict)


def _statistics(path: Path) -> tuple[set[str], dict[str, Gaussian]]:
    """Names of an .npz's arrays, and the statistics among them; nothing is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}

            def array(name: str) -> Tensor:
                with archive.open(f"{name}.npy") as stream:
                    return torch.from_numpy(np.lib.format.read_array(stream, allow_pickle=False))

            pairs = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}
            found = {metric: (array(mu), array(sigma)) for metric, (mu, sigma) in pairs.items() if {mu, sigma} <= names}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, TypeError) as error:
        raise UserError(f"{path} is no readable .npz ({str(error)[:80]}): fetch it again") from None
    return names, found


class FashionImages:
    """Fashion-MNIST's test images, read when they are asked for."""

    count = 10_000
    first_seed: int | None = None

    @cached_property
    def _images(self) -> Tensor:
        grey = to_uint8(to_model_range(load_fashion_mnist("test")[0]) / 2 + 0.5)  # [10000, 1, 32, 32]
        return grey.expand(-1, 3, -1, -1)

    def read(self, start: int, stop: int) -> Tensor:
        """[n, 3, 32, 32] uint8."""
        return self._images[start:stop]


def open_reference(path: Path, resize: int | None = None) -> Reference:
    """A reference: any image set, an .npz with arr_0 and/or mu, sigma, mu_s, sigma_s, or the word fashion-mnist.

    Raises:
        UserError: none of these, or statistics of other features than Inception's.
    """
    if str(path) == FASHION:
        return Reference(FashionImages(), {"frechet_fashion_cnn": fashion_statistics()})
    if path.suffix != ".npz" or not path.is_file():
        return Reference(open_images(path, resize))
    names, found = _statistics(path)
    for metric, (mu, sigma) in found.items():
        channels = POOL if metric == "fid" else SPATIAL
        if mu.shape != (channels,) or sigma.shape != (channels, channels):
            raise UserError(
                f"{path} has {metric} statistics of {list(mu.shape)}, expected [{channels}]: use another file"
            )
    if not found and "arr_0" not in names:
        raise UserError(f"{path} holds {', '.join(sorted(names)) or 'nothing'}: expected arr_0, or mu and sigma")
    return Reference(open_images(path, resize) if "arr_0" in names else None, found)
