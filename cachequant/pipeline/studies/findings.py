"""What a study found, and its page: one HTML file that needs no other, with JSON and PNG files beside it."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from cachequant import __version__
from cachequant.config import config_to_dict
from cachequant.evaluation.html import facts_block, figures_block, sections_block, table_block, write_page
from cachequant.evaluation.plots import figure_png, save_figure
from cachequant.evaluation.rows import aligned
from cachequant.pipeline.context import Context
from cachequant.storage import save_json


@dataclass(frozen=True)
class Table:
    """Texts in lines, the first column naming each."""

    heading: str
    columns: tuple[str, ...]
    lines: list[list[str]]

    def text(self) -> str:
        """Aligned plain text."""
        return f"{self.heading}\n{aligned([self.columns], self.lines)}"


@dataclass(frozen=True)
class Findings:
    """What a study found.

    Attributes:
        title: of the page.
        notes: (heading, text): what was done and how to read it.
        tables: in order.
        figures: caption -> figure, in order.
        numbers: everything behind them, ready for JSON.
        facts: name -> value, beside those of machine and configuration.
        details: tables that are too long for a terminal, on the page only.
    """

    title: str
    notes: list[tuple[str, str]]
    tables: list[Table]
    figures: dict[str, Figure]
    numbers: dict[str, Any]
    facts: dict[str, str] = field(default_factory=dict)
    details: list[Table] = field(default_factory=list)

    def text(self) -> str:
        """The tables, for a terminal."""
        return "\n\n".join(table.text() for table in self.tables)


def write_study(findings: Findings, context: Context, page: Path) -> list[Path]:
    """Write the page, `<page>.json` and a PNG of each figure beside it: all files, the page first.

    Raises:
        UserError: the folder is not writable or the disk is full.
    """
    machine = {
        "device": f"{context.pipe.device} ({_device_name(context)}), {torch.get_num_threads()} threads",
        "made with": f"cachequant {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }
    facts = {"model": f"{context.identity.model} {context.identity.weights[:12]}", **findings.facts, **machine}
    blocks = [sections_block(findings.notes)]
    blocks += [table_block(table.heading, table.columns, table.lines) for table in findings.tables]
    blocks.append(figures_block("Figures", {caption: figure_png(f) for caption, f in findings.figures.items()}))
    blocks += [table_block(table.heading, table.columns, table.lines) for table in findings.details]
    blocks.append(facts_block("How it was made", facts.items()))
    config = config_to_dict(context.config)
    settings = [
        (f"{part}.{key}", str(v)) for part, keys in config.items() if isinstance(keys, dict) for key, v in keys.items()
    ]
    blocks.append(facts_block("Configuration", settings, folded=True))
    write_page(page, findings.title, blocks)
    numbers = page.with_suffix(".json")
    save_json(numbers, {"title": findings.title, "facts": facts, "config": config, **findings.numbers})
    pictures = [page.with_name(f"{page.stem}-{_slug(caption)}.png") for caption in findings.figures]
    for path, figure in zip(pictures, findings.figures.values(), strict=True):
        save_figure(figure, path)
    return [page, numbers, *pictures]


def _device_name(context: Context) -> str:
    device = context.pipe.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def _slug(caption: str) -> str:
    """First words of a caption, for a file name."""
    return "-".join(re.findall(r"[a-z0-9]+", caption.lower())[:4])
