"""How a part of the paper's tables is measured here: on the real model, or on the miniature that stands in for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cachequant.config import load_config, repository_folder
from cachequant.errors import UserError
from cachequant.evaluation.tables import Part, read_miniature

MINIATURE_IMAGES = 1000
"""Images of a row on a miniature, where no number is asked for."""


@dataclass(frozen=True)
class Options:
    """How tables are measured.

    Attributes:
        out: folder.
        miniature: on the trained miniatures, with the distances that they have.
        reference: of the metrics of real models.
        count: images of each row, default the paper's number, or 1,000 of a miniature.
        overrides: `key=value` for every row.
        rows: names of those to measure, default all.
        weights: folder of the metrics' networks.
        device, devices: of `cachequant run`.
    """

    out: Path
    miniature: bool = False
    reference: Path | None = None
    count: int | None = None
    overrides: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    weights: Path | None = None
    device: str = "auto"
    devices: int | None = None


@dataclass(frozen=True)
class Recipe:
    """What a part needs here, on the real model or on its miniature."""

    config: Path
    metrics: tuple[str, ...]
    reference: str | None
    paired: tuple[str, ...]
    resize: int | None
    overrides: tuple[str, ...]

    @property
    def subject(self) -> str:
        """What is measured, in words."""
        config = load_config(self.config, list(self.overrides))
        sample = config.sample
        return (
            f"configs/{self.config.name}, {config.sampler.steps} steps, {sample.count} images in batches of "
            f"{sample.batch_size}"
        )

    @staticmethod
    def of(part: Part, options: Options) -> Recipe:
        """Raises UserError where a reference is needed and not given, or a miniature is not there."""
        if not options.miniature:
            if part.reference is not None and options.reference is None:
                raise UserError(f"part {part.name} compares with {part.reference} and there is none: give --ref")
            count = part.images if options.count is None else options.count
            reference = options.reference if part.reference else None
            own = (f"sample.count={count}", *options.overrides)
            config = _found(part.config)
            return Recipe(config, part.metrics, _text(reference), ("psnr", "ssim"), part.resize, own)
        stand_in = read_miniature(part.miniature)
        config = _found(stand_in.config)
        count = MINIATURE_IMAGES if options.count is None else options.count
        own = (*part.miniature_set, f"sample.count={count}", *options.overrides)
        model = Path(load_config(config, list(own)).model.path)
        if not (model.is_dir() or (repository_folder() / model).is_dir()):
            raise UserError(
                f"no miniature in {model}, expected its trained weights: scripts/train/train_miniatures.py makes them"
            )
        return Recipe(config, stand_in.metrics, stand_in.reference, stand_in.paired, None, own)


def _found(name: str) -> Path:
    """A file of the repository, by a relative path where that is possible."""
    return Path(name) if Path(name).is_file() else repository_folder() / name


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
