"""A report of one run as a single page that needs no other file, no script and no network."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from cachequant.evaluation.rows import COLUMNS, FULL, Column, Row, full_row
from cachequant.storage import write_atomically

STYLE = """
:root { color-scheme: light dark; --page: #fafafa; --card: #fff; --ink: #1b1f24; --soft: #59636e;
  --line: #d9dee3; --mark: #0b62a4; --tint: #eaf3fa; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1317; --card: #171c22; --ink: #e6eaee; 
  --soft: #9aa5b1; --line: #2c343d; --mark: #6cb8ee; --tint: #15293a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 1.5rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; }
p { margin: 0 0 .6rem; } p:last-child { margin-bottom: 0; }
.note, figcaption { color: var(--soft); font-size: .875rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.scroll { overflow-x: auto; margin-bottom: .6rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .85rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { border-top: 0; vertical-align: bottom; font-size: .8rem; font-weight: 600; line-height: 1.3;
  color: var(--soft); }
tbody th { text-align: left; font-weight: 500; }
thead th:first-child { text-align: left; }
.results th:first-child { position: sticky; left: 0; background: var(--card); }
tr.reference td, tr.reference th { color: var(--soft); }
td strong { color: var(--mark); background: var(--tint); border-radius: 4px; padding: .1rem .35rem;
  margin: 0 -.35rem; }
.sections { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr));
  margin-top: 1.75rem; }
.sections section { padding: 1rem 1.15rem; }
.sections p { white-space: pre-line; }
figure { margin: 0 0 1.5rem; padding: 1rem; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto .75rem; background: #fff;
  border-radius: 6px; }
.views { padding: 1rem; margin-bottom: 1.5rem; }
.views figure { padding: 0; margin: 1rem 0 0; display: none; }
.choice { display: flex; flex-wrap: wrap; gap: .35rem 1.25rem; }
.choice label { cursor: pointer; font-weight: 500; }
.choice input { margin: 0 .4rem 0 0; accent-color: var(--mark); }
@supports not selector(:has(*)) { .views figure { display: block; } .choice { display: none; } }
details { margin: 1.5rem 0; } summary { cursor: pointer; font-weight: 600; margin-bottom: .75rem; }
.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.facts th { color: var(--soft); vertical-align: top; width: 1%; }
.facts tr:first-child > * { border-top: 0; }
@media print { body { background: #fff; } .card { break-inside: avoid; } }
"""
VIEWS = 6
CHOSEN = "".join(f".views:has(input.view-{i}:checked) figure.view-{i} {{ display: block; }}\n" for i in range(VIEWS))

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

NOTE = (
    f"Feature distance, PSNR and SSIM compare each row with “{FULL}”, which starts from the same noise. "
    f"↑ higher is better, ↓ lower is better; the best value of the rows other than “{FULL}” is bold."
)


def write_report(
    path: Path,
    title: str,
    rows: Sequence[Row],
    figures: dict[str, bytes],
    sections: list[tuple[str, str]],
    facts: dict[str, str],
) -> None:
    """Write one self-contained HTML page atomically.

    Args:
        path: the file, replaced where it exists.
        title: heading and window title.
        rows: the results; in each column the best value of the rows other than `full` is bold.
        figures: caption -> PNG, in order; the caption is the alternative text too.
        sections: (heading, text) shown below the table; an empty line parts paragraphs.
        facts: name -> value, what the run was made with.

    Raises:
        UserError: the folder is not writable or the disk is full.
    """
    shown = figures_block("Figures", figures) if figures else ""
    made = facts_block("How it was made", facts.items()) if facts else ""
    write_page(path, title, [results_block(rows), sections_block(sections), shown, made])


def write_page(path: Path, title: str, blocks: Sequence[str]) -> None:
    """Write a page of blocks (the functions below) atomically; it needs no other file, no script and no network.

    Raises:
        UserError: the folder is not writable or the disk is full.
    """
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>{STYLE}{CHOSEN}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{"".join(blocks)}</main>
</body>
</html>
"""

    def write(file: Path) -> None:
        file.write_text(page, encoding="utf-8")

    write_atomically(path, write)


def results_block(rows: Sequence[Row]) -> str:
    """The results as a table; in each column the best value of the rows other than `full` is bold."""
    full = full_row(rows)
    best = [_best_text(column, rows, full) for column in COLUMNS]
    lines = []
    for row in rows:
        texts = [column.text(row, full) for column in COLUMNS]
        cells = [_cell(t, row.name != FULL and t == top) for t, top in zip(texts, best, strict=True)]
        kind = ' class="reference"' if row.name == FULL else ""
        lines.append(f'<tr{kind}><th scope="row">{escape(row.name)}</th>{"".join(cells)}</tr>\n')
    heads = "".join(f'<th scope="col">{_heading(column)}</th>' for column in COLUMNS)
    head = f'<thead><tr><th scope="col">row</th>{heads}</tr></thead>\n'
    table = f'<table class="results">\n{head}<tbody>\n{"".join(lines)}</tbody>\n</table>'
    return f'<div class="card scroll">{table}</div>\n<p class="note">{NOTE}</p>\n'


def _cell(text: str, is_best: bool) -> str:
    return f"<td><strong>{text}</strong></td>" if is_best else f"<td>{text}</td>"


def _heading(column: Column) -> str:
    lines = [escape(line) for line in column.title if line]
    return "<br>".join(lines) + (" ↑" if column.best == "high" else " ↓")


def _best_text(column: Column, rows: Sequence[Row], full: Row | None) -> str | None:
    """The best value of the rows other than `full` as shown; None where they all show the same."""
    shown = {column.text(row, full): column.value(row, full) for row in rows if row.name != FULL}
    ranked = {text: value for text, value in shown.items() if value is not None and not math.isnan(value)}
    if len(shown) < 2 or not ranked:
        return None
    choose = max if column.best == "high" else min
    return choose(ranked, key=lambda text: ranked[text])


def sections_block(sections: list[tuple[str, str]]) -> str:
    """Cards of (heading, text); an empty line parts paragraphs."""
    parts = []
    for heading, text in sections:
        paragraphs = "".join(f"<p>{escape(p.strip())}</p>" for p in text.split("\n\n") if p.strip())
        parts.append(f'<section class="card"><h3>{escape(heading)}</h3>{paragraphs}</section>\n')
    return f'<div class="sections">\n{"".join(parts)}</div>\n' if parts else ""


def figures_block(heading: str, figures: dict[str, bytes]) -> str:
    """Caption -> PNG, in order; the caption is the alternative text too."""
    parts = [f'<figure class="card">{_image(caption, png)}</figure>\n' for caption, png in figures.items()]
    return f"<h2>{escape(heading)}</h2>\n{''.join(parts)}"


def views_block(heading: str, views: dict[str, tuple[str, bytes]]) -> str:
    """Pictures in one place, of which the reader chooses one at a time: name -> (caption, PNG), at most `VIEWS`.

    Radio buttons and style alone, as the page runs no script.
    """
    group = escape(heading)
    buttons, figures = [], []
    for i, (name, (caption, png)) in enumerate(views.items()):
        checked = " checked" if i == 0 else ""
        buttons.append(f'<label><input type="radio" name="{group}" class="view-{i}"{checked}>{escape(name)}</label>\n')
        figures.append(f'<figure class="view-{i}">{_image(caption, png)}</figure>\n')
    choice = f'<div class="choice" role="radiogroup" aria-label="{group}">\n{"".join(buttons)}</div>\n'
    return f'<h2>{group}</h2>\n<div class="card views">{choice}{"".join(figures)}</div>\n'


def table_block(heading: str, columns: Sequence[str], lines: Sequence[Sequence[str]], folded: bool = False) -> str:
    """A table of texts, the first column naming the row; `folded` shows it only when its heading is clicked."""
    heads = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(line[0])}</th>{"".join(f"<td>{escape(text)}</td>" for text in line[1:])}</tr>\n'
        for line in lines
    )
    table = (
        f'<div class="card scroll"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n'
    )
    if folded:
        return f"<details><summary>{escape(heading)}</summary>\n{table}</details>\n"
    return f"<h2>{escape(heading)}</h2>\n{table}"


def facts_block(heading: str, facts: Iterable[tuple[str, str]], folded: bool = False) -> str:
    """(name, value) in order; names may occur again."""
    lines = [f'<tr><th scope="row">{escape(k)}</th><td>{escape(v)}</td></tr>\n' for k, v in facts]
    table = f'<div class="card scroll"><table class="facts"><tbody>\n{"".join(lines)}</tbody></table></div>\n'
    if folded:
        return f"<details><summary>{escape(heading)}</summary>\n{table}</details>\n"
    return f"<h2>{escape(heading)}</h2>\n{table}"


def _image(caption: str, png: bytes) -> str:
    source = f"data:image/png;base64,{b64encode(png).decode()}"
    return f'<img alt="{escape(caption)}" src="{source}"><figcaption>{escape(caption)}</figcaption>'
