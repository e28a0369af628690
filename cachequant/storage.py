"""Reading and writing: atomic files, safetensors, hashes, and the flat names under which values are saved. No pickle."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cachequant.config import FORMATS
from cachequant.errors import UserError
from cachequant.types import ActivationTable, AffineMap, Correction, LayerQuant, QuantState, WeightGrid


def make_folder(folder: Path) -> Path:
    """Create a folder and its parents.

    Raises:
        UserError: it cannot be created or is not a folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make folder {folder}: {error.strerror}; choose a writable one") from None
    return folder


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it over `path`.

    Raises:
        UserError: the folder is not writable or the disk is full; `path` is as it was.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot write {path}: {reason}; free space or choose another folder") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    write_atomically(path, lambda p: _write_text(p, text + "\n"))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def load_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        UserError: missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no file {path}: run the stage that writes it") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({str(error)[:80]}): make it again") from None


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write safetensors atomically."""
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}  # no two share memory
    write_atomically(path, lambda p: save_file(plain, p))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors.

    Raises:
        UserError: missing or damaged.
    """
    if not path.is_file():
        raise UserError(f"no file {path}: run the stage that writes it")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, MemoryError) as error:
        raise UserError(f"{path} is damaged ({str(error)[:80]}): make it again") from None


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def content_hash(value: Any) -> str:
    """sha256 of a JSON-like value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def pack_maps(prefix: str, maps: dict[int, AffineMap]) -> dict[str, Tensor]:
    """step -> map as `{prefix}.steps` [R], `.scale` [R, C], `.shift` [R, C] and, with a forecast, `.previous` [R, C]."""
    if not maps:
        return {}
    steps = sorted(maps)
    flat = {
        f"{prefix}.steps": torch.tensor(steps, dtype=torch.int32),
        f"{prefix}.scale": torch.stack([maps[s].scale for s in steps]).float(),
        f"{prefix}.shift": torch.stack([maps[s].shift for s in steps]).float(),
    }
    previous = [maps[s].previous for s in steps]
    if any(p is not None for p in previous):
        rows = [torch.zeros_like(maps[s].scale) if p is None else p for s, p in zip(steps, previous, strict=True)]
        flat[f"{prefix}.previous"] = torch.stack(rows).float()
    return flat


def unpack_maps(prefix: str, flat: dict[str, Tensor]) -> dict[int, AffineMap]:
    """The inverse of `pack_maps`; {} where nothing was saved."""
    if f"{prefix}.steps" not in flat:
        return {}
    scale, shift = flat[f"{prefix}.scale"], flat[f"{prefix}.shift"]
    previous = flat.get(f"{prefix}.previous")
    steps = flat[f"{prefix}.steps"].tolist()
    if not scale.shape == shift.shape or len(steps) != len(scale):
        raise UserError(f"{prefix} holds {len(steps)} steps for maps of shape {list(scale.shape)}: the file is damaged")
    return {
        int(s): AffineMap(scale[i], shift[i], None if previous is None else previous[i]) for i, s in enumerate(steps)
    }


def pack_correction(correction: Correction) -> dict[str, Tensor]:
    """A correction as named tensors."""
    flat = {**pack_maps("cache", correction.cache), **pack_maps("output", correction.output)}
    for name, maps in correction.layers.items():
        flat |= pack_maps(f"layers.{name}", maps)
    return flat


def unpack_correction(flat: dict[str, Tensor]) -> Correction:
    """The inverse of `pack_correction`."""
    names = _names(flat, "layers.", ".steps")
    layers = {n: unpack_maps(f"layers.{n}", flat) for n in names}
    return Correction(unpack_maps("cache", flat), layers, unpack_maps("output", flat))


def pack_quant(state: QuantState) -> dict[str, Tensor]:
    """A quantisation state as named tensors; scalars (bits, widths) travel as small int32 tensors."""
    return {**pack_weights(state), **pack_tables(state)}


def pack_weights(state: QuantState) -> dict[str, Tensor]:
    """The part of a quantisation state that depends on the weights alone; weights of at most 4 bits go two to a byte."""
    flat: dict[str, Tensor] = {}
    for name, layer in state.layers.items():
        flat[f"layers.{name}.widths"] = torch.tensor(layer.widths, dtype=torch.int32)
        for i, grid in enumerate(layer.weights):
            prefix = f"layers.{name}.{i}"
            flat[f"{prefix}.weight"] = pack_nibbles(grid.values) if grid.bits <= 4 else grid.values
            flat[f"{prefix}.weight_scale"] = grid.scale
            flat[f"{prefix}.weight_zero_point"] = grid.zero_point.to(torch.uint8)
            flat[f"{prefix}.weight_grid"] = torch.tensor([grid.bits, *grid.values.shape], dtype=torch.int32)
            flat |= _pack_format(f"{prefix}.weight_format", grid.format)
    return flat


def pack_nibbles(values: Tensor) -> Tensor:
    """Integers in [0, 15] of any shape -> uint8 [ceil(n / 2)], the first of two in the lower half of each byte."""
    flat = values.flatten()
    padded = torch.cat([flat, flat.new_zeros(len(flat) % 2)])
    return padded[0::2] | (padded[1::2] << 4)


def unpack_nibbles(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack_nibbles`: uint8 of `shape`."""
    pairs = torch.stack([packed & 15, packed >> 4], dim=1).flatten()
    return pairs[: math.prod(shape)].view(shape).clone()


def pack_tables(state: QuantState) -> dict[str, Tensor]:
    """The part of a quantisation state that was calibrated: activation and operand tables."""
    flat: dict[str, Tensor] = {}
    for name, layer in state.layers.items():
        for i, table in enumerate(layer.inputs):
            flat |= _pack_table(f"layers.{name}.{i}.input", table)
    for name, table in state.operands.items():
        flat |= _pack_table(f"operands.{name}", table)
    return flat


def unpack_quant(flat: dict[str, Tensor]) -> QuantState:
    """The inverse of `pack_quant`.

    Raises:
        UserError: a tensor is missing.
    """
    try:
        layers = {name: _unpack_layer(f"layers.{name}", flat) for name in _names(flat, "layers.", ".widths")}
        return QuantState(layers, _unpack_operands(flat))
    except KeyError as error:
        raise UserError(
            f"quantisation state lacks tensor {error.args[0]}: the file is damaged, make it again"
        ) from None


class StoredLayers(Mapping[str, LayerQuant]):
    """The layers of a quantisation state in a file, each read when it is asked for and never kept.

    Every reading maps the file anew: what an earlier one touched does not stay in memory.

    Args:
        path: safetensors written from `pack_quant`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with safe_open(path, framework="pt") as handle:
            self._names = _names(handle.keys(), "layers.", ".widths")

    def __getitem__(self, name: str) -> LayerQuant:
        if name not in self._names:
            raise KeyError(name)
        prefix = f"layers.{name}"
        with safe_open(self.path, framework="pt") as handle:
            flat = {key: handle.get_tensor(key) for key in handle.keys() if key.startswith(f"{prefix}.")}  # noqa: SIM118
        flat = {
            key: value if key.endswith(".weight") else value.clone() for key, value in flat.items()
        }  # the rest is small
        own = {key: value for key, value in flat.items() if key[len(prefix) + 1 :].split(".")[0].isdigit()}
        return _unpack_layer(prefix, {**own, f"{prefix}.widths": flat[f"{prefix}.widths"]})

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def stored_quant(path: Path) -> QuantState:
    """A quantisation state whose layers stay in their file until they are asked for.

    Raises:
        UserError: missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            names = [key for key in handle.keys() if key.startswith("operands.")]  # noqa: SIM118
            operands = {key: handle.get_tensor(key).clone() for key in names}
        return QuantState(StoredLayers(path), _unpack_operands(operands))
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"{path} is damaged ({str(error)[:80]}): make it again") from None


def _unpack_operands(flat: dict[str, Tensor]) -> dict[str, ActivationTable]:
    return {name: _unpack_table(f"operands.{name}", flat) for name in _names(flat, "operands.", ".zero_point")}


def _unpack_layer(prefix: str, flat: dict[str, Tensor]) -> LayerQuant:
    widths = tuple(int(w) for w in flat[f"{prefix}.widths"])
    grids, tables = [], []
    for i in range(len(widths)):
        p = f"{prefix}.{i}"
        bits, *shape = flat[f"{p}.weight_grid"].tolist()
        stored, zero_point = flat[f"{p}.weight"], flat[f"{p}.weight_zero_point"].float()
        values = unpack_nibbles(stored, tuple(shape)) if bits <= 4 else stored
        kind = _unpack_format(f"{p}.weight_format", flat)
        grids.append(WeightGrid(values, flat[f"{p}.weight_scale"], zero_point, bits, kind))
        tables.append(_unpack_table(f"{p}.input", flat))
    return LayerQuant(tuple(grids), tuple(tables), widths)


def _pack_table(prefix: str, table: ActivationTable) -> dict[str, Tensor]:
    return {
        f"{prefix}.steps": table.steps,
        f"{prefix}.scale": table.scale,
        f"{prefix}.zero_point": table.zero_point,
        f"{prefix}.bits": torch.tensor(table.bits, dtype=torch.int32),
        **_pack_format(f"{prefix}.format", table.format),
    }


def _unpack_table(prefix: str, flat: dict[str, Tensor]) -> ActivationTable:
    columns = (flat[f"{prefix}.steps"], flat[f"{prefix}.scale"], flat[f"{prefix}.zero_point"])
    return ActivationTable(*columns, int(flat[f"{prefix}.bits"]), _unpack_format(f"{prefix}.format", flat))


def _pack_format(key: str, name: str) -> dict[str, Tensor]:
    """A number format by its place in `FORMATS`; nothing for integers."""
    return {} if name == "int" else {key: torch.tensor(FORMATS.index(name), dtype=torch.int32)}


def _unpack_format(key: str, flat: dict[str, Tensor]) -> str:
    return FORMATS[int(flat[key])] if key in flat else "int"


def _names(flat: Iterable[str], start: str, end: str) -> list[str]:
    return [key[len(start) : -len(end)] for key in flat if key.startswith(start) and key.endswith(end)]
