"""Stage outputs in folders named by the hash of what went into them: equal inputs are never computed twice, or mixed."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cachequant.errors import UserError
from cachequant.host_memory import trim_heap
from cachequant.storage import content_hash, file_hash, load_json, make_folder, save_json

Value = TypeVar("Value")
FORMAT = 3
"""Raised whenever a stage's meaning or files change, so that older outputs are not taken for current ones."""


@dataclass(frozen=True)
class StageStore:
    """Outputs of the stages of one model.

    Attributes:
        root: folder of the run.
        allowed: numbers of the stages that may be computed; others must be current already.
        quiet: print nothing.
    """

    root: Path
    allowed: frozenset[int] = frozenset(range(1, 7))
    quiet: bool = False
    _held: dict[str, Any] = field(default_factory=dict)

    def obtain(
        self,
        number: int,
        name: str,
        inputs: dict[str, Any],
        compute: Callable[[], Value],
        save: Callable[[Path, Value], None],
        load: Callable[[Path], Value],
        resumes: bool = False,
    ) -> tuple[Value, str]:
        """The stage's output and its key: loaded where it is current, else computed and filed.

        Args:
            number: stage, 1 to 6.
            name: what the folder is called.
            inputs: JSON-like values that determine the output.
            compute, save, load: the stage itself and how its output travels to and from a folder.
            resumes: the stage writes into its folder as it goes, and goes on from what it finds there.

        Raises:
            UserError: the output is missing and this stage may not be computed, or the folder is not writable.
        """
        key = self.key(number, name, inputs)
        if key in self._held:
            return self._held[key], key
        self._held[key] = self._obtain(number, name, key, compute, save, load, resumes)
        return self._held[key], key

    def key(self, number: int, name: str, inputs: dict[str, Any]) -> str:
        """Name of a stage's output by all that determines it."""
        return content_hash({"stage": number, "name": name, "format": FORMAT, "inputs": inputs})

    def folder(self, number: int, name: str, key: str) -> Path:
        """Where an output is."""
        return self.root / f"{number}_{name}-{key[:12]}"

    def _obtain(
        self,
        number: int,
        name: str,
        key: str,
        compute: Callable[[], Value],
        save: Callable[[Path, Value], None],
        load: Callable[[Path], Value],
        resumes: bool,
    ) -> Value:
        """Load a current output, or compute and file it."""
        folder = self.folder(number, name, key)
        if is_current(folder, key):
            self._say(f"{number} {name}: current ({folder.name})")
            return load(folder)
        if number not in self.allowed:
            raise UserError(
                f"stage {number} ({name}) has no output for this configuration in {self.root}: run its script first, "
                "with the same --set options"
            )
        start = time.perf_counter()
        value = compute()
        if not resumes:
            shutil.rmtree(folder, ignore_errors=True)
        make_folder(folder)
        save(folder, value)
        files = {str(p.relative_to(folder)): file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file()}
        seconds = time.perf_counter() - start
        save_json(folder / "done.json", {"key": key, "files": files, "seconds": seconds})
        trim_heap()  # what a stage leaves behind keeps its freed memory from the next: a study grew to 24 GB
        self._say(f"{number} {name}: {seconds:.1f} s ({folder.name})")
        return value

    def _say(self, line: str) -> None:
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)


def is_current(folder: Path, key: str) -> bool:
    """Whether a stage finished there for exactly these inputs and its files are as it left them."""
    if not (folder / "done.json").is_file():
        return False
    try:
        record = load_json(folder / "done.json")
        files = record["files"]
        return record["key"] == key and all(file_hash(folder / name) == digest for name, digest in files.items())
    except (UserError, OSError, KeyError, TypeError, AttributeError):
        return False
