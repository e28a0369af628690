"""Which kernel is fastest for each shape on this card: measured once, kept on disk beside the compiled libraries."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from cachequant.kernels.cuda.build import folder

CALLS, REPEATS = 10, 5
"""Calls in one captured graph, and how often it is timed; the median counts."""

REFERENCE = "torch"
"""Stands among kernels for plain torch: slow, and run only where every kernel failed."""

Measure = Callable[[Callable[[], object]], float]
Result = TypeVar("Result")


def measure(call: Callable[[], object]) -> float:
    """Median milliseconds of one call, replayed from a CUDA graph: launching from Python takes longer than many kernels."""
    call()  # loads and compiles
    torch.cuda.synchronize()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graph.capture_begin()
        try:
            for _ in range(CALLS):
                call()
        finally:
            graph.capture_end()
        graph.replay()
        times = [_elapsed(graph) for _ in range(REPEATS)]
    torch.cuda.current_stream().wait_stream(side)
    return statistics.median(times) / CALLS


def _elapsed(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of one replay on the current stream."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


@dataclass
class TuningTable:
    """Shape -> name of the fastest kernel, for one kind of card.

    Attributes:
        path: JSON file; read once, written whenever something was measured.
        measure: returns the milliseconds of a call.
        chosen: key -> kernel, as on file.
        provisional: the same of this process alone, since another kernel found no memory or none runs: the next process
            measures again.
        failures: kernel and key -> why it is left out in this process.
    """

    path: Path
    measure: Measure = measure
    chosen: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    provisional: dict[str, str] = field(default_factory=dict)
    _short_of_memory: set[str] = field(default_factory=set)

    @staticmethod
    def of(device: torch.device) -> TuningTable:
        """The table of a card, from disk where there is one."""
        name = torch.cuda.get_device_name(device).lower().replace(" ", "-").replace("/", "-")
        table = TuningTable(folder() / f"tuning-{name}.json")
        table.read()
        return table

    def read(self) -> None:
        """Take over what the file holds beside what is known; a file that is cut short is as good as none."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if isinstance(found, dict):
            self.chosen = {str(key): str(value) for key, value in found.items()} | self.chosen

    def write(self) -> None:
        """Replace the file as a whole, so that two processes cannot leave half a table, with what others filed since."""
        self.read()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as scratch:
            json.dump(self.chosen, scratch, indent=0, sort_keys=True)
        os.replace(scratch.name, self.path)

    @property
    def unserved(self) -> list[str]:
        """Keys that no kernel runs, so that plain torch does."""
        return [key for key, name in self.provisional.items() if name == REFERENCE]

    def run(self, key: str, names: Sequence[str], call: Callable[[str], Result], may_measure: bool = True) -> Result:
        """What `call` returns for the `best` kernel; if that one fails now, for the next, and for `REFERENCE` at last.

        Args:
            key, names, may_measure: of `best`.
            call: runs a kernel, or `REFERENCE`.

        Raises:
            Exception: plain torch fails too, or anything does while a CUDA graph is captured, which voids the capture; a
                note on it has the reasons of the kernels.
        """
        while True:
            name = self.best(key, names, call, may_measure)
            try:
                return call(name)
            except Exception as error:
                if name == REFERENCE or not may_measure:
                    reasons = [self.failures[_label(n, key)] for n in names if _label(n, key) in self.failures]
                    error.add_note(f"{key}: {'; '.join(reasons) or f'{name} failed during a capture'}")
                    raise
                self._leave_out(name, key, error)

    def best(self, key: str, names: Sequence[str], call: Callable[[str], object], may_measure: bool = True) -> str:
        """The kernel for `key`: the one on file if it is still offered, else the fastest of `names`, else `REFERENCE`.

        A kernel that fails, or finds no memory, is left out.

        Args:
            key: names the operation, its shapes and what is fused.
            names: kernels that support it, the most promising first.
            call: runs one of them.
            may_measure: False while a CUDA graph is captured: the first of `names` is returned, and not filed.
        """
        offered = [name for name in names if _label(name, key) not in self.failures]
        known = self.provisional.get(key, self.chosen.get(key))
        if known in offered:
            return str(known)
        if offered and not may_measure:
            return offered[0]
        times: dict[str, float] = {}
        for name in offered:
            try:
                with warnings.catch_warnings(action="ignore"):  # what does not fit says so in its error, too
                    times[name] = self.measure(lambda name=name: call(name))  # type: ignore[misc]
            except Exception as error:  # Triton's errors share no base with torch's; the reason is kept
                self._leave_out(name, key, error)
        fastest = min(times, key=lambda name: times[name], default=REFERENCE)
        if fastest == REFERENCE or key in self._short_of_memory:
            self.provisional[key] = fastest
        else:
            self.chosen[key] = fastest
            self.write()
        return fastest

    def _leave_out(self, name: str, key: str, error: Exception) -> None:
        """Never offer a kernel for this key again in this process."""
        torch.cuda.empty_cache()
        if isinstance(error, torch.OutOfMemoryError):
            self._short_of_memory.add(key)
        self.failures[_label(name, key)] = f"{name}: {(str(error).splitlines() or [type(error).__name__])[0][:120]}"


def _label(name: str, key: str) -> str:
    return f"{name} {key}"
