"""The stage store gives back what a stage has freed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cachequant.host_memory import process_memory
from cachequant.pipeline.store import StageStore

MEGABYTE = 1 << 20


@pytest.mark.skipif(process_memory("RssAnon") is None, reason="needs Linux's /proc")
def test_memory_that_a_stage_freed_between_what_it_keeps_is_given_back(tmp_path: Path) -> None:
    def compute() -> list[Tensor]:
        """400 MB in blocks that are too small to be mapped alone, each held apart from the next by one that stays."""
        kept, freed = [], []
        for _ in range(8000):
            freed.append(torch.ones(50 * 1024, dtype=torch.uint8))
            kept.append(torch.ones(256, dtype=torch.uint8))
        assert len(freed) == len(kept)
        return kept

    def held() -> int:
        pages = process_memory("RssAnon")
        assert pages is not None
        return pages

    before = held()
    value, _ = StageStore(tmp_path, quiet=True).obtain(1, "x", {}, compute, lambda *_: None, lambda _: [])
    assert len(value) == 8000 and held() - before < 150 * MEGABYTE
