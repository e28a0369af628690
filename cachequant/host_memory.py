"""This process's memory on the host: what the system holds for it, and giving back what was freed."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

PROCESS = Path("/proc/self")


def process_memory(field: str) -> int | None:
    """Bytes of a field of /proc/self/status; None elsewhere than on Linux."""
    try:
        lines = (PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def restart_high_water_mark() -> bool:
    """Sets the high-water mark to what is resident now (proc(5), clear_refs); whether the system let us."""
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library can (glibc).

    Packing weights frees a buffer as large as the one that it keeps, and the next one does not fit the hole by its
    alignment; what a stage keeps lies between what it freed.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
