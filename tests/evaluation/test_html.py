"""The report: one page, well formed, complete, and without a reference to anything outside it."""

import math
import re
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cachequant.errors import UserError
from cachequant.evaluation.html import facts_block, table_block, views_block, write_page, write_report
from cachequant.evaluation.rows import Row, format_table

PNG = b"\x89PNG\r\n\x1a\n and the rest"
VOID = {"meta", "img", "br", "input"}
EVIL = "<script>alert('x & \"y\"')</script>"
ROWS = [
    Row("full", 0.0, None, 1.0, 1.0, 12.4e9, 9_120_000, 14.0),
    Row("naive", 5.125, 17.91, 0.7012, 0.2, 3.61e9, 2_300_000, 5.0),
    Row("cachequant", 1.25, 26.7, 0.9421, 0.2, 3.61e9, 2_310_000, 5.6),
]


class Page(HTMLParser):
    """Checks that elements nest, and keeps what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.table: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag == "tr":
            self.table.append([])
        if tag in ("td", "th"):
            self.table[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)
        if {"td", "th"} & set(self.open):
            self.table[-1][-1] += data

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.seen if tag == name]


def write(path: Path, rows: list[Row] = ROWS) -> str:
    figures = {"Samples from the same noise": PNG, f"Errors {EVIL}": PNG + b"2"}
    sections = [("How to read it", "First part.\n\nSecond part."), (f"Title {EVIL}", f"Text {EVIL}")]
    write_report(path, f"Report {EVIL}", rows, figures, sections, {"torch": "2.13.0", f"key {EVIL}": EVIL})
    return path.read_text(encoding="utf-8")


@pytest.fixture
def text(tmp_path: Path) -> str:
    return write(tmp_path / "report.html")


@pytest.fixture
def page(text: str) -> Page:
    return Page(text)


def test_the_page_is_a_titled_document(text: str, page: Page) -> None:
    assert text.startswith("<!DOCTYPE html>")
    assert page.tags("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in page.tags("meta")
    assert any(meta.get("name") == "viewport" for meta in page.tags("meta"))
    assert page.texts["title"] == page.texts["h1"] == [f"Report {EVIL}"]
    assert "prefers-color-scheme: dark" in text


def test_the_page_needs_nothing_else(text: str, page: Page) -> None:
    assert not re.search(r"https?://|url\(|@import|\bhref=", text)
    assert {tag for tag, _ in page.seen} & {"script", "link", "iframe", "object"} == set()
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in page.tags("img"))
    assert not any(name.startswith("on") for _, attributes in page.seen for name in attributes)


def test_the_table_holds_what_the_terminal_shows(page: Page) -> None:
    plain = [line.split() for line in format_table(ROWS).splitlines()[3:]]
    assert page.table[1 : 1 + len(ROWS)] == plain
    assert len(page.table[0]) == len(plain[0])


def test_the_best_values_but_those_of_full_are_bold(page: Page) -> None:
    # Bytes, seconds, speed-up of naive; distance, PSNR, SSIM of cachequant; nothing where the two tie.
    assert page.texts["strong"] == ["2.30", "5.00", "2.80×", "1.250", "26.70", "0.9421"]


def test_broken_and_missing_values_are_never_the_best(tmp_path: Path) -> None:
    broken = replace(ROWS[1], name="broken", feature_distance=math.nan, psnr=math.nan, ssim=None)
    page = Page(write(tmp_path / "report.html", [*ROWS, broken]))
    assert {"1.250", "26.70", "0.9421"} <= set(page.texts["strong"])
    assert not {"nan", "–"} & set(page.texts["strong"])


def test_rows_that_equal_full_have_the_best_psnr(tmp_path: Path) -> None:
    same = replace(ROWS[1], name="same", feature_distance=0.0, psnr=None, ssim=1.0)
    assert "∞" in Page(write(tmp_path / "report.html", [*ROWS, same])).texts["strong"]


def test_figures_carry_their_bytes_captions_and_alternative_text(page: Page) -> None:
    images = page.tags("img")
    assert [b64decode((image["src"] or "").split(",")[1]) for image in images] == [PNG, PNG + b"2"]
    captions = ["Samples from the same noise", f"Errors {EVIL}"]
    assert [image["alt"] for image in images] == page.texts["figcaption"] == captions


def test_sections_and_facts_are_there_as_text(text: str, page: Page) -> None:
    assert "<script" not in text
    assert page.texts["h3"] == ["How to read it", f"Title {EVIL}"]
    assert page.texts["p"][1:] == ["First part.", "Second part.", f"Text {EVIL}"]
    assert page.table[-2:] == [["torch", "2.13.0"], [f"key {EVIL}", EVIL]]


def test_a_row_name_is_escaped(tmp_path: Path) -> None:
    text = write(tmp_path / "report.html", [*ROWS, replace(ROWS[1], name=EVIL)])
    assert "<script" not in text
    assert Page(text).table[len(ROWS) + 1][0] == EVIL


def test_nothing_to_show_makes_a_page_still(tmp_path: Path) -> None:
    write_report(tmp_path / "empty.html", "Empty", [], {}, [], {})
    page = Page((tmp_path / "empty.html").read_text(encoding="utf-8"))
    assert page.texts["h1"] == ["Empty"]
    assert page.tags("img") == page.tags("figure") == []


def test_the_page_is_written_atomically(tmp_path: Path) -> None:
    write(tmp_path / "report.html")
    write(tmp_path / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        write(tmp_path / "taken")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "taken"]


def blocks_page(tmp_path: Path, blocks: list[str]) -> Page:
    write_page(tmp_path / "blocks.html", "Blocks", blocks)
    return Page((tmp_path / "blocks.html").read_text(encoding="utf-8"))


def test_views_show_one_picture_at_a_time_by_style_alone(tmp_path: Path) -> None:
    """Each button's class has a rule that shows the figure of that class; the first button is pressed."""
    page = blocks_page(tmp_path, [views_block(f"Look {EVIL}", {"a": ("first", PNG), f"b {EVIL}": ("second", PNG)})])
    buttons, figures = page.tags("input"), page.tags("figure")
    assert [b["class"] for b in buttons] == [f["class"] for f in figures] == ["view-0", "view-1"]
    assert [("checked" in b) for b in buttons] == [True, False] and len({b["name"] for b in buttons}) == 1
    style = "".join(page.texts["style"])
    assert all(
        f".views:has(input.{b['class']}:checked) figure.{b['class']} {{ display: block; }}" in style for b in buttons
    )
    assert ".views figure { padding: 0; margin: 1rem 0 0; display: none; }" in style
    assert not page.tags("script")


def test_tables_and_facts_keep_their_order_and_may_fold(tmp_path: Path) -> None:
    table = table_block("Layers", ["name", "bytes"], [["conv", "1"], [EVIL, "2"]], folded=True)
    facts = facts_block("Facts", [("reads it", "a"), ("reads it", EVIL)])
    page = blocks_page(tmp_path, [table, facts])
    assert page.table == [["name", "bytes"], ["conv", "1"], [EVIL, "2"], ["reads it", "a"], ["reads it", EVIL]]
    assert len(page.tags("details")) == 1 and page.texts["summary"] == ["Layers"]
