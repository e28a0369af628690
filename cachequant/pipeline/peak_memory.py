"""The most memory that a piece of work took."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cachequant.host_memory import process_memory, restart_high_water_mark, trim_heap


@dataclass
class Peak:
    """Filled behind the block: bytes held at most, above those held before it; None where nothing can tell."""

    bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure a block: tensors of the GPU, or this process's resident pages on a CPU under Linux.

    Pages that a CPU's allocator kept from earlier work are given back first; what it cannot give back is not counted, so
    that small figures are lower bounds. None where the system has no resettable high-water mark.
    """
    found = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    trim_heap()
    resettable = restart_high_water_mark()
    held = process_memory("VmRSS")
    yield found
    most = process_memory("VmHWM")
    if resettable and held is not None and most is not None:
        found.bytes = most - held
