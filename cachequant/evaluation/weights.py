"""Where the evaluation networks' weights are: a folder that the user names, else the cache of the library they belong to."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from cachequant.errors import UserError
from cachequant.storage import file_hash

VARIABLE = "CACHEQUANT_WEIGHTS"


@dataclass(frozen=True)
class WeightFile:
    """A published file.

    Attributes:
        name: as published; for those of torch.hub the end of the stem is the start of the content's sha256.
        url: where it is.
        purpose: what it is for, for messages.
    """

    name: str
    url: str
    purpose: str

    @property
    def digest(self) -> str:
        """First digits of the sha256."""
        return Path(self.name).stem.rsplit("-", 1)[1]


INCEPTION = WeightFile(
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "FID's Inception",
)
ALEXNET = WeightFile(
    "alexnet-owt-7be5be79.pth",
    "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "LPIPS's AlexNet",
)
CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
CLIP_REPOSITORY = "laion/CLIP-ViT-g-14-laion2B-s34B-b88K"
CLIP_TAG = "laion2b_s34b_b88k"


def named_folder(folder: Path | None) -> Path | None:
    """The folder of weights that the user names by option or by CACHEQUANT_WEIGHTS, if any."""
    variable = os.environ.get(VARIABLE)
    return folder or (Path(variable) if variable else None)


def find_weights(file: WeightFile, folder: Path | None = None) -> Path:
    """Path of a weight file with the right content; it is fetched into torch.hub's cache where it is nowhere.

    Args:
        file: which.
        folder: where the user keeps weights; then it is looked for nowhere else.

    Raises:
        UserError: it is not there and cannot be fetched, or its content is not the published one.
    """
    named = named_folder(folder)
    home = named or Path(torch.hub.get_dir()) / "checkpoints"
    path = home / file.name
    if not path.is_file():
        if named is not None:
            raise UserError(f"no weights of {file.purpose} in {named}: put {file.name} there, from {file.url}")
        _fetch(file, path)
    if not file_hash(path).startswith(file.digest):
        raise UserError(f"{path} is damaged (its sha256 does not start with {file.digest}): fetch {file.url} again")
    return path


def _fetch(file: WeightFile, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(file.url, str(path), hash_prefix=file.digest)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"weights of {file.purpose} cannot be fetched ({str(error)[:60]}): put {file.name} from {file.url} into "
            f"{path.parent}, or into a folder that --weights or {VARIABLE} names"
        ) from None


def find_clip_weights(folder: Path | None = None) -> str:
    """What open_clip is to load: a file of the user's folder, or its own tag, which goes through the hub's cache.

    Raises:
        UserError: the named folder lacks the file.
    """
    named = named_folder(folder)
    if named is None:
        return CLIP_TAG
    for name in CLIP_FILES:
        if (named / name).is_file():
            return str(named / name)
    raise UserError(
        f"no weights of CLIP's ViT-g/14 in {named}: put {' or '.join(CLIP_FILES)} there, "
        f"from huggingface.co/{CLIP_REPOSITORY}"
    )
