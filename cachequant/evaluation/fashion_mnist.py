"""Fashion-MNIST (Xiao et al. 2017) from its idx files, compressed or not; nothing is downloaded."""

import gzip
import os
import struct
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cachequant.errors import UserError

Split = Literal["train", "test"]

FOLDER_VARIABLE = "CACHEQUANT_FASHION_MNIST"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
TORCHVISION_ROOT = Path("data")
TORCHVISION_RAW = Path("FashionMNIST") / "raw"

_PREFIX = {"train": "train", "test": "t10k"}
_LENGTH = {"train": 60_000, "test": 10_000}


def load_fashion_mnist(split: Split, folder: Path | None = None) -> tuple[Tensor, Tensor]:
    """Images uint8 `[N, 28, 28]` in 0..255 and labels uint8 `[N]` in 0..9; N is 60,000 or 10,000.

    Looks in `folder`, else the environment variable CACHEQUANT_FASHION_MNIST, else Debian's folder, else
    torchvision's `./data`. A folder holds the idx files, or is a torchvision root with `FashionMNIST/raw`.

    Raises:
        UserError: unknown split, files missing, or a file that is not the expected idx file.
    """
    if split not in _PREFIX:
        raise UserError(f"split {split!r} given; expected 'train' or 'test'")
    prefix, length = _PREFIX[split], _LENGTH[split]
    source = _find_folder(folder, prefix)
    images = _read_idx(_find_file(source, f"{prefix}-images-idx3-ubyte"), (length, 28, 28))
    labels = _read_idx(_find_file(source, f"{prefix}-labels-idx1-ubyte"), (length,))
    return images, labels


def to_model_range(images: Tensor) -> Tensor:
    """uint8 `[N, 28, 28]` in 0..255 to float32 `[N, 1, 32, 32]` in [-1, 1], with 2 pixels of -1 all round."""
    scaled = images.unsqueeze(1).float() / 127.5 - 1.0  # [N, 1, 28, 28]
    return F.pad(scaled, (2, 2, 2, 2), value=-1.0)  # [N, 1, 32, 32]


def _find_folder(folder: Path | None, prefix: str) -> Path:
    """The first place that holds the split; a place that the user named is the only one tried."""
    named = folder or os.environ.get(FOLDER_VARIABLE)
    roots = [Path(named)] if named else [DEBIAN_FOLDER, TORCHVISION_ROOT]
    for root in roots:
        for candidate in (root, root / TORCHVISION_RAW):
            if any(candidate.glob(f"{prefix}-images-idx3-ubyte*")):
                return candidate
    places = " or ".join(map(str, roots))
    raise UserError(
        f"no {prefix}-images-idx3-ubyte[.gz] in {places}; expected Fashion-MNIST's idx files: "
        "apt install dataset-fashion-mnist, or torchvision.datasets.FashionMNIST('data', download=True), "
        f"or set {FOLDER_VARIABLE}"
    )


def _find_file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(f"no {name}[.gz] in {folder}; expected it beside the rest: fetch the data set again")


def _read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """An idx file of unsigned bytes: magic 0x0000 08 rank, a big-endian uint32 a dimension, the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); expected an idx file: fetch it again") from error
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    if content[: len(header)] != header:
        raise UserError(
            f"{path} begins with {content[: len(header)].hex()}; expected the idx header {header.hex()} "
            f"of uint8 {list(shape)}: fetch the data set again"
        )
    values = np.frombuffer(content, dtype=np.uint8, offset=len(header))
    if values.size != np.prod(shape):
        raise UserError(f"{path} holds {values.size} values; expected {np.prod(shape)}: fetch it again")
    return torch.from_numpy(values.reshape(shape).copy())
