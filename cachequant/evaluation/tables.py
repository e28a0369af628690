"""The paper's tables as data (`configs/tables/`), and ours beside them: figures, derived ones, text and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cachequant.config import read_yaml, repository_folder
from cachequant.errors import UserError
from cachequant.evaluation.rows import FULL, aligned

Figures = Mapping[str, float]
"""Quantity -> value."""

TITLES = {
    "fid": "FID", "sfid": "sFID", "is": "IS", "precision": "precision", "recall": "recall", "clip": "CLIP",
    "clip_change": "CLIP - full's", "frechet_fashion_cnn": "Fréchet FashionCNN", "retrieval": "retrieval",
    "frechet_drawings_clip": "Fréchet drawings-clip", "psnr": "PSNR dB", "ssim": "SSIM",
    "distance_fashion_cnn": "FashionCNN distance", "distance_drawings_clip": "drawings-clip distance",
    "removed": "damage removed", "speedup": "speed-up", "size": "times smaller", "bops_saved": "fewer Bops",
}  # fmt: skip
"""What is shown of each quantity, in this order. `seconds` (an image), `bytes` (of the denoiser) and `bops` (tera bit
operations an evaluation) only enter into others."""
DIGITS = {
    "sfid": 2,
    "fid": 2,
    "is": 2,
    "clip": 2,
    "clip_change": 2,
    "psnr": 2,
    "speedup": 2,
    "size": 2,
    "bops_saved": 1,
}


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        name: unique in its part; `full` is the untouched model.
        set: configuration that makes it, `key=value`; None where the paper's figures are only quoted.
        paper: the paper's figures.
        source: where they were seen.
        approximate: those that were read off a plot, marked `~` in the file.
    """

    name: str
    set: tuple[str, ...] | None = None
    paper: Figures = field(default_factory=dict)
    source: str = ""
    approximate: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """A table, or one of two that belong together.

    Attributes:
        name, title: for people.
        config: YAML of the model.
        images: how many the paper judges.
        metrics: of `cachequant evaluate`.
        miniature: what stands in for the model, of `_miniatures.yaml`.
        rows: in order; one is named `full`.
        naive: the row whose damage the others remove, where there is one.
        reference: what the images are compared with, in words.
        resize: pixels, before all metrics but CLIP.
        miniature_set: `key=value` changes of the miniature.
    """

    name: str
    title: str
    config: str
    images: int
    metrics: tuple[str, ...]
    miniature: str
    rows: tuple[Row, ...]
    naive: str | None = None
    reference: str | None = None
    resize: int | None = None
    miniature_set: tuple[str, ...] = ()

    @property
    def quality(self) -> str:
        """The metric that stands for quality in the plot and in the share of the damage removed: the first."""
        return self.metrics[0]


@dataclass(frozen=True)
class Miniature:
    """How the images of a miniature are judged; `reference` is of `cachequant evaluate`, or `full`.

    `full` are the untouched model's images from other noise; `paired` metrics compare with its images from the same noise.
    """

    config: str
    metrics: tuple[str, ...]
    reference: str
    paired: tuple[str, ...]


def tables_folder() -> Path:
    """Where the tables lie."""
    return repository_folder() / "configs" / "tables"


def table_names() -> tuple[str, ...]:
    """The tables that there are."""
    return tuple(sorted(path.stem for path in tables_folder().glob("[!_]*.yaml")))


def read_table(name: str) -> tuple[Part, ...]:
    """The parts of a table.

    Raises:
        UserError: no such table, or a file that does not say what it must.
    """
    if name not in table_names():
        raise UserError(f"table {name!r} given, expected one of {', '.join(table_names())}: choose one of these")
    path = tables_folder() / f"{name}.yaml"
    parts = tuple(_part(entry, path) for entry in _contents(path).get("parts", ()))
    if not parts:
        raise UserError(f"{path} has no parts: expected a list of them")
    return parts


def read_miniature(name: str) -> Miniature:
    """What stands in for a paper's model.

    Raises:
        UserError: no such entry.
    """
    path = tables_folder() / "_miniatures.yaml"
    entries = _contents(path)
    if name not in entries:
        raise UserError(f"miniature {name!r} is not in {path}, expected one of {', '.join(entries)}: add it there")
    return _made(Miniature, entries[name], path)


def _contents(path: Path) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(read_yaml(path), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:120]}") from None
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _part(entry: dict[str, Any], path: Path) -> Part:
    part: Part = _made(Part, {**entry, "rows": [_row(row, path) for row in entry.get("rows", ())]}, path)
    names = [row.name for row in part.rows]
    needed = [FULL] if part.naive is None else [FULL, part.naive]
    wrong = [name for name in [*names, *needed] if names.count(name) != 1]
    if wrong:
        raise UserError(f"{path}, {part.name}: row {wrong[0]!r} occurs {names.count(wrong[0])} times, expected once")
    return part


def _row(entry: dict[str, Any], path: Path) -> Row:
    given = entry.get("paper", {})
    paper = {name: _figure(value, path) for name, value in given.items()}
    marked = [name for name, value in given.items() if str(value).startswith("~")]
    return _made(Row, {**entry, "paper": paper, "approximate": marked}, path)


def _figure(value: Any, path: Path) -> float:
    """4.05, or "~4.05"."""
    try:
        return float(str(value).removeprefix("~"))
    except ValueError:
        raise UserError(f"{path}: figure {value!r}, expected a number such as 4.05 or ~4.05") from None


def _made(kind: Any, entry: dict[str, Any], path: Path) -> Any:
    """A dataclass from a section of YAML; lists become tuples."""
    known = {f.name for f in fields(kind)}
    unknown = [key for key in entry if key not in known]
    if unknown:
        raise UserError(f"{path}: unknown key {unknown[0]}, expected one of {', '.join(sorted(known))}")
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()})
    except TypeError as error:
        raise UserError(f"{path}: a {kind.__name__.lower()} lacks keys ({error})") from None


def derived(figures: Mapping[str, Figures], quality: str, naive: str | None) -> dict[str, dict[str, float]]:
    """Figures by row with what follows from those of `full` and of the naive row, where they are not given.

    speedup, size, bops_saved: full's seconds, bytes and bit operations over the row's. clip_change: CLIP score less
    full's. removed: share of the naive row's loss of quality that a row takes away, 1 - (q - q_full) / (q_naive - q_full).
    """
    found = {name: dict(row) for name, row in figures.items()}
    full, bad = found.get(FULL, {}), found.get(naive or "", {})
    for name, row in found.items():
        for ratio, of in (("speedup", "seconds"), ("size", "bytes"), ("bops_saved", "bops")):
            if of in full and row.get(of):
                row.setdefault(ratio, full[of] / row[of])
        if "clip" in full and "clip" in row:
            row.setdefault("clip_change", row["clip"] - full["clip"])
        if quality in full and quality in bad and quality in row and name not in (FULL, naive):
            damage = bad[quality] - full[quality]
            if damage:
                row.setdefault("removed", 1 - (row[quality] - full[quality]) / damage)
    return found


@dataclass(frozen=True)
class Comparison:
    """Ours beside the paper's.

    Attributes:
        part: the table.
        ours, paper: row -> quantity -> value, derived ones included.
        quality: our quantity that stands for quality (a miniature has another one than the paper).
        subject: what ours were measured on, in words.
    """

    part: Part
    ours: Mapping[str, Figures]
    paper: Mapping[str, Figures]
    quality: str
    subject: str

    @staticmethod
    def of(part: Part, ours: Mapping[str, Figures], quality: str, subject: str) -> Comparison:
        """From what was measured: row -> quantity -> value."""
        paper = derived({row.name: row.paper for row in part.rows}, part.quality, part.naive)
        return Comparison(part, derived(ours, quality, part.naive), paper, quality, subject)

    def quantities(self) -> list[str]:
        """Those that any row has, in order."""
        present = {name for side in (self.ours, self.paper) for row in side.values() for name in row}
        return [name for name in TITLES if name in present]

    def values(self, row: str, quantity: str) -> tuple[float | None, float | None, float | None]:
        """Ours, the paper's, and the difference where there are both."""
        ours, paper = self.ours.get(row, {}).get(quantity), self.paper.get(row, {}).get(quantity)
        return ours, paper, None if ours is None or paper is None else ours - paper

    def text(self) -> str:
        """The table as aligned plain text; a column that would be empty is left out."""
        columns = [(name, i) for name in self.quantities() for i in range(3) if self._column(name, i)]
        titles = [TITLES[name] if i == self._first(name) else "" for name, i in columns]
        sides = [("ours", "paper", "difference")[i] for _, i in columns]
        body = []
        for row in self.part.rows:
            cells = [_cell(self.values(row.name, name)[i], name, signed=i == 2) for name, i in columns]
            marks = ["~" if i == 1 and name in row.approximate else "" for name, i in columns]
            body.append([row.name, *map(str.__add__, marks, cells), row.source])
        heading = f"{self.part.name}: {self.part.title}\nours: {self.subject}\n"
        return heading + aligned([["", *titles, ""], ["row", *sides, "source"]], body)

    def _column(self, quantity: str, side: int) -> bool:
        return any(self.values(row.name, quantity)[side] is not None for row in self.part.rows)

    def _first(self, quantity: str) -> int:
        return next(i for i in range(3) if self._column(quantity, i))


def _cell(value: float | None, quantity: str, signed: bool) -> str:
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "∞"
    if quantity == "removed":
        return f"{100 * value:{'+' if signed else ''}.0f} %"
    return f"{value:{'+' if signed else ''}.{DIGITS.get(quantity, 3)}f}"


def to_csv(comparisons: Sequence[Comparison]) -> str:
    """A line for each row and quantity: part, row, quantity, ours, paper, difference, source."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["part", "row", "quantity", "ours", "paper", "difference", "source"])
    for comparison in comparisons:
        for row in comparison.part.rows:
            for quantity in comparison.quantities():
                values = comparison.values(row.name, quantity)
                if any(value is not None for value in values):
                    cells = ["" if value is None else repr(float(value)) for value in values]
                    writer.writerow([comparison.part.name, row.name, quantity, *cells, row.source])
    return stream.getvalue()
