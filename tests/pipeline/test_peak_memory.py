"""Peak memory counts what was held and given back within the block, not what was there before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cachequant import host_memory
from cachequant.pipeline.peak_memory import peak_memory

CPU, MEGABYTE = torch.device("cpu"), 1 << 20
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's resettable mark")


@LINUX
def test_what_was_freed_within_the_block_counts_and_what_was_held_before_does_not() -> None:
    held = torch.ones(64 * MEGABYTE, dtype=torch.uint8)
    with peak_memory(CPU) as peak:
        del held
        for _ in range(2):
            freed = torch.ones(200 * MEGABYTE, dtype=torch.uint8)
            del freed
    assert peak.bytes is not None and 100 * MEGABYTE < peak.bytes < 230 * MEGABYTE  # 200, less the 64 given back


@LINUX
def test_an_earlier_peak_does_not_count() -> None:
    earlier = torch.ones(300 * MEGABYTE, dtype=torch.uint8)
    del earlier
    with peak_memory(CPU) as peak:
        small = torch.ones(80 * MEGABYTE, dtype=torch.uint8)
        del small
    assert peak.bytes is not None and 60 * MEGABYTE < peak.bytes < 150 * MEGABYTE


def test_a_system_that_cannot_tell_says_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host_memory, "PROCESS", tmp_path / "absent")
    with peak_memory(CPU) as peak:
        pass
    assert peak.bytes is None
