"""Reading and writing: atomic files, safetensors, hashes, and the flat names under which values are saved. No pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

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
    """The part of a quantisation state that depends on the weights alone."""
    flat: dict[str, Tensor] = {}
    for name, layer in state.layers.items():
        flat[f"layers.{name}.widths"] = torch.tensor(layer.widths, dtype=torch.int32)
        for i, grid in enumerate(layer.weights):
            prefix = f"layers.{name}.{i}"
            flat[f"{prefix}.weight"] = grid.values
            flat[f"{prefix}.weight_scale"] = grid.scale
            flat[f"{prefix}.weight_zero_point"] = grid.zero_point.to(torch.uint8)
            flat[f"{prefix}.weight_bits"] = torch.tensor(grid.bits, dtype=torch.int32)
    return flat


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
        operands = {name: _unpack_table(f"operands.{name}", flat) for name in _names(flat, "operands.", ".zero_point")}
    except KeyError as error:
        raise UserError(
            f"quantisation state lacks tensor {error.args[0]}: the file is damaged, make it again"
        ) from None
    return QuantState(layers, operands)


def _unpack_layer(prefix: str, flat: dict[str, Tensor]) -> LayerQuant:
    widths = tuple(int(w) for w in flat[f"{prefix}.widths"])
    grids, tables = [], []
    for i in range(len(widths)):
        p = f"{prefix}.{i}"
        zero_point = flat[f"{p}.weight_zero_point"].float()
        grids.append(
            WeightGrid(flat[f"{p}.weight"], flat[f"{p}.weight_scale"], zero_point, int(flat[f"{p}.weight_bits"]))
        )
        tables.append(_unpack_table(f"{p}.input", flat))
    return LayerQuant(tuple(grids), tuple(tables), widths)


def _pack_table(prefix: str, table: ActivationTable) -> dict[str, Tensor]:
    return {
        f"{prefix}.steps": table.steps,
        f"{prefix}.scale": table.scale,
        f"{prefix}.zero_point": table.zero_point,
        f"{prefix}.bits": torch.tensor(table.bits, dtype=torch.int32),
    }


def _unpack_table(prefix: str, flat: dict[str, Tensor]) -> ActivationTable:
    columns = (flat[f"{prefix}.steps"], flat[f"{prefix}.scale"], flat[f"{prefix}.zero_point"])
    return ActivationTable(*columns, int(flat[f"{prefix}.bits"]))


def _names(flat: Iterable[str], start: str, end: str) -> list[str]:
    return [key[len(start) : -len(end)] for key in flat if key.startswith(start) and key.endswith(end)]
