"""What one way of sampling cost and how close it came to the full model, and tables of several such rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

FULL = "full"


@dataclass(frozen=True)
class Row:
    """One row of a comparison from the same noise.

    Attributes:
        name: the way of sampling; `full` is the reference of every other row.
        feature_distance: mean distance to the features of `full`'s images, 0 if equal; None if not measured.
        psnr: decibels to `full`'s images; None where they are equal (infinite) or it was not measured.
        ssim: structural similarity to `full`'s images in [-1, 1]; None if not measured.
        full_step_share: share of the steps that run the whole network, in [0, 1].
        macs: multiply-accumulate operations of all steps, per image.
        bytes: size of the weights as stored.
        seconds: wall-clock time of sampling.
    """

    name: str
    feature_distance: float | None
    psnr: float | None
    ssim: float | None
    full_step_share: float
    macs: float
    bytes: int
    seconds: float

    @property
    def psnr_or_infinity(self) -> float | None:
        """PSNR in dB, infinite where the images equal the full model's; None if not measured."""
        return math.inf if self.psnr is None and self.feature_distance == 0.0 else self.psnr


@dataclass(frozen=True)
class Column:
    """One column of numbers.

    Attributes:
        title: two lines of heading, the upper may be empty.
        value: the number of a row, given the `full` row or None without one.
        digits: decimals shown.
        best: whether a high or a low value is better.
        suffix: text behind each number.
    """

    title: tuple[str, str]
    value: Callable[[Row, Row | None], float | None]
    digits: int
    best: Literal["high", "low"]
    suffix: str = ""

    def text(self, row: Row, full: Row | None) -> str:
        """The number as shown: ∞ where infinite, – where there is none."""
        value = self.value(row, full)
        if value is None:
            return "–"
        return "∞" if value == math.inf else f"{value:.{self.digits}f}{self.suffix}"


def full_row(rows: Sequence[Row]) -> Row | None:
    """The row named `full`, or None."""
    return next((row for row in rows if row.name == FULL), None)


def speed_up(row: Row, full: Row | None) -> float | None:
    """Seconds of `full` over seconds of `row`; None without `full` or without a measured time."""
    return full.seconds / row.seconds if full is not None and row.seconds > 0 else None


COLUMNS = (
    Column(("feature", "distance"), lambda row, _: row.feature_distance, 3, "low"),
    Column(("PSNR", "dB"), lambda row, _: row.psnr_or_infinity, 2, "high"),
    Column(("", "SSIM"), lambda row, _: row.ssim, 4, "high"),
    Column(("full", "steps %"), lambda row, _: 100 * row.full_step_share, 1, "low"),
    Column(("GMACs", "per image"), lambda row, _: row.macs / 1e9, 2, "low"),
    Column(("", "MB"), lambda row, _: row.bytes / 1e6, 2, "low"),
    Column(("", "seconds"), lambda row, _: row.seconds, 2, "low"),
    Column(("", "speed-up"), speed_up, 2, "high", "×"),
)


def format_table(rows: Sequence[Row]) -> str:
    """The rows as aligned plain text of about 80 columns: two lines of heading, a rule, a line per row."""
    full = full_row(rows)
    head = [["", *(c.title[0] for c in COLUMNS)], ["row", *(c.title[1] for c in COLUMNS)]]
    return aligned(head, [[row.name, *(c.text(row, full) for c in COLUMNS)] for row in rows])


def aligned(head: Sequence[Sequence[str]], body: Sequence[Sequence[str]]) -> str:
    """Plain text of lines of heading, a rule and a body, each a cell a column; the first column stands on the left."""
    lines = [*head, *body]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(len(head), ["─" * width for width in widths])
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def rows_to_json(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows as `{"rows": [{"name": …, "psnr": …}]}` of finite numbers; None stands for one that is not."""
    return {"rows": [{key: _finite(value) for key, value in asdict(row).items()} for row in rows]}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
