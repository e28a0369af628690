"""Many images in files of a few, each whole or absent: workers may be killed at any moment and started again.

A folder holds `set.json` (what the images are), one safetensors file per range of seeds, and `manifest.jsonl` with a
line per file. A file is written under a temporary name, flushed and renamed, and only then entered; what has no line, or
another sha256 than its line, does not count and is drawn again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cachequant.errors import UserError
from cachequant.storage import (
    file_hash,
    load_json,
    load_tensors,
    make_folder,
    save_json,
    save_tensors,
    write_atomically,
)

IMAGES = 64
"""Images in a file, about: what a killed worker can lose."""


@dataclass(frozen=True)
class Shard:
    """One file: the images of the seeds first … first + count - 1."""

    first: int
    count: int

    @property
    def name(self) -> str:
        """File name, by seed range."""
        return f"images-{self.first:010d}-{self.first + self.count - 1:010d}.safetensors"

    @property
    def seeds(self) -> list[int]:
        """One seed an image."""
        return list(range(self.first, self.first + self.count))


@dataclass(frozen=True)
class ShardSet:
    """A folder of shards.

    Attributes:
        folder: where they are.
        maker: JSON-like values that determine every image (plan, sampler, prompts).
        first: seed of the first image.
        count: number of images.
        size: images a shard; the last one may hold fewer.
    """

    folder: Path
    maker: dict[str, Any]
    first: int
    count: int
    size: int

    @staticmethod
    def create(folder: Path, maker: dict[str, Any], first: int, count: int, batch_size: int) -> ShardSet:
        """A new set, or the one that was begun in this folder, whatever its shards' size.

        Raises:
            UserError: the folder holds another set, or cannot be written.
        """
        size = batch_size * max(1, IMAGES // batch_size)
        asked = ShardSet(make_folder(folder), json.loads(json.dumps(maker)), first, count, size)
        if not (folder / "set.json").exists():
            save_json(folder / "set.json", asked._record())
            return asked
        found = ShardSet.open(folder)
        for key, want in asked._record().items():
            have = found._record()[key]
            if key != "size" and have != want:
                what = ", ".join(_differences(have, want)) if isinstance(want, dict) else f"{key} {have}, not {want}"
                raise UserError(f"{folder} holds other images (of {what}): choose another folder or remove this one")
        return found

    @staticmethod
    def open(folder: Path) -> ShardSet:
        """The set in a folder.

        Raises:
            UserError: there is none, or its description is damaged.
        """
        if not (folder / "set.json").is_file():
            raise UserError(f"no images in {folder}: expected set.json, written by `cachequant sample`")
        record = load_json(folder / "set.json")
        try:
            made = ShardSet(folder, record["maker"], *(int(record[key]) for key in ("first", "count", "size")))
        except (KeyError, TypeError, ValueError):
            made = None
        if made is None or not isinstance(made.maker, dict) or min(made.count, made.size, made.first + 1) < 1:
            raise UserError(f"{folder / 'set.json'} is damaged: remove the folder and sample again")
        return made

    def _record(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "folder"}

    def shards(self) -> list[Shard]:
        """All of them, finished or not, in order."""
        end = self.first + self.count
        return [Shard(seed, min(self.size, end - seed)) for seed in range(self.first, end, self.size)]

    def entries(self) -> dict[str, dict[str, Any]]:
        """Valid lines of the manifest by file name: one cut short by a kill is passed over, the last of several counts."""
        path = self.folder / "manifest.jsonl"
        found: dict[str, dict[str, Any]] = {}
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            try:
                entry = json.loads(line)
                found[entry["file"]] = {**entry, "sha256": str(entry["sha256"])}
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def pending(self) -> list[Shard]:
        """Shards that are not there, or not as they were entered; every finished file is read."""
        entries = self.entries()
        return [shard for shard in self.shards() if not self._is_whole(shard, entries)]

    def _is_whole(self, shard: Shard, entries: dict[str, dict[str, Any]]) -> bool:
        path = self.folder / shard.name
        return shard.name in entries and path.is_file() and file_hash(path) == entries[shard.name]["sha256"]

    def tidy(self) -> None:
        """Put the manifest in order, a line a shard; once all workers are done.

        So the same images have the same bytes in all files, whoever drew them and however often they were interrupted.
        """
        entries = self.entries()
        lines = [_line(entries[shard.name]) for shard in self.shards() if shard.name in entries]
        write_atomically(self.folder / "manifest.jsonl", lambda path: _write(path, "".join(lines)))

    def write(self, shard: Shard, images: Tensor) -> None:
        """File one shard and enter it, as one act among all workers of the folder.

        Args:
            shard: which.
            images: [shard.count, C, H, W] in [0, 1]; kept as uint8, rounded to nearest.

        Raises:
            UserError: the disk is full or the folder not writable.
        """
        if len(images) != shard.count:
            raise ValueError(f"{len(images)} images for {shard}")
        with self._alone() as manifest:
            save_tensors(self.folder / shard.name, {"images": to_uint8(images)})
            entry = {"file": shard.name, "first": shard.first, "count": shard.count}
            _append(manifest, _line({**entry, "sha256": file_hash(self.folder / shard.name)}))

    def load(self, shard: Shard) -> Tensor:
        """Images of one shard: [count, C, H, W] uint8.

        Raises:
            UserError: it is missing or was changed.
        """
        if not self._is_whole(shard, self.entries()):
            raise UserError(
                f"{self.folder / shard.name} is missing or was changed: run the same `cachequant sample` again to redraw it"
            )
        return load_tensors(self.folder / shard.name)["images"]

    def images(self, count: int | None = None) -> Tensor:
        """The first `count` images, default all: [n, C, H, W] uint8."""
        wanted = self.count if count is None else min(count, self.count)
        last = -(-wanted // self.size)
        return torch.cat([self.load(shard) for shard in self.shards()[:last]])[:wanted]

    @contextmanager
    def _alone(self) -> Iterator[int]:
        """The manifest, open for appending, while no other worker writes."""
        path = self.folder / "manifest.jsonl"
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose a writable folder") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; free space or choose another folder") from None
        finally:
            os.close(handle)


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] to 0…255, rounded to nearest (the released code truncates)."""
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True) + "\n"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _append(handle: int, line: str) -> None:
    """Add a line and flush it; a line that a kill cut short is closed first."""
    end = os.lseek(handle, 0, os.SEEK_END)
    torn = end > 0 and os.pread(handle, 1, end - 1) != b"\n"
    text = line.encode()
    os.write(handle, b"\n" + text if torn else text)
    os.fsync(handle)


def _differences(have: dict[str, Any], want: dict[str, Any]) -> list[str]:
    keys = sorted({*have, *want})
    return [f"{k} {str(have.get(k))[:24]}, not {str(want.get(k))[:24]}" for k in keys if have.get(k) != want.get(k)]
