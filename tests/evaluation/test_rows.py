"""Tables of rows: alignment, the numbers in them, and JSON that every parser reads."""

import json
import math
from dataclasses import replace

import pytest

from cachequant.evaluation.rows import COLUMNS, Row, format_table, full_row, rows_to_json, speed_up

FULL = Row("full", 0.0, None, 1.0, 1.0, 12.4e9, 9_120_000, 14.0)
CACHED = Row("cachequant", 1.25, 26.704, 0.94213, 0.2, 3.6e9, 2_310_000, 5.6)


def cells(line: str) -> list[str]:
    return line.split()


def test_the_table_holds_the_numbers_in_their_units() -> None:
    full, cached = format_table([FULL, CACHED]).splitlines()[3:]
    assert cells(full) == cells("full 0.000 ∞ 1.0000 100.0 12.40 9.12 14.00 1.00×")
    assert cells(cached) == cells("cachequant 1.250 26.70 0.9421 20.0 3.60 2.31 5.60 2.50×")


def test_the_columns_are_aligned() -> None:
    wide = replace(CACHED, name="a-very-long-name", macs=123_456e9, seconds=12_345.0)
    lines = format_table([FULL, CACHED, wide]).splitlines()
    rule = lines[2]
    assert set(rule) == {"─", " "}
    ends = [i for i in range(len(rule)) if rule[i] == "─" and rule[i + 1 : i + 2] != "─"]
    starts = [i for i in range(len(rule)) if rule[i] == "─" and (i == 0 or rule[i - 1] != "─")]
    assert len(ends) == 1 + len(COLUMNS)
    for line in lines[1:]:
        assert len(line) == len(rule)
        assert line[0] != " "  # names at the left
        assert all(line[end] != " " for end in ends[1:])  # numbers at the right
        assert all(line[start - 2 : start] == "  " for start in starts[1:])


def test_the_headings_name_every_column() -> None:
    upper, lower = (cells(line) for line in format_table([FULL]).splitlines()[:2])
    assert upper == ["feature", "PSNR", "full", "GMACs"]
    assert lower == cells("row distance dB SSIM steps % per image MB seconds speed-up")


def test_the_usual_table_fits_a_terminal() -> None:
    assert max(map(len, format_table([FULL, CACHED]).splitlines())) <= 80


def test_what_was_not_measured_is_a_dash_and_not_infinite() -> None:
    unmeasured = replace(CACHED, feature_distance=None, psnr=None, ssim=None)
    line = format_table([unmeasured]).splitlines()[3]
    assert cells(line)[1:4] == ["–", "–", "–"]
    assert cells(line)[-1] == "–"  # no full row to be faster than
    assert unmeasured.psnr_or_infinity is None
    assert FULL.psnr_or_infinity == math.inf


def test_speed_up_is_relative_to_full() -> None:
    rows = [CACHED, FULL]
    assert full_row(rows) is FULL
    assert full_row([CACHED]) is None
    assert speed_up(CACHED, FULL) == pytest.approx(2.5)
    assert speed_up(replace(CACHED, seconds=0.0), FULL) is None


def test_an_empty_table_is_its_heading() -> None:
    assert len(format_table([]).splitlines()) == 3


def test_json_holds_every_number_and_is_finite() -> None:
    diverged = replace(CACHED, name="naive", feature_distance=math.nan, psnr=math.inf, ssim=-math.inf)
    text = json.dumps(rows_to_json([FULL, CACHED, diverged]), allow_nan=False)
    full, cached, broken = json.loads(text)["rows"]
    assert Row(**full) == FULL
    assert Row(**cached) == CACHED
    assert list(cached) == [
        "name", "feature_distance", "psnr", "ssim", "full_step_share", "macs", "bytes", "seconds",
    ]  # fmt: skip
    assert [broken[key] for key in ("feature_distance", "psnr", "ssim")] == [None, None, None]
