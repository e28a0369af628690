"""Reading and writing: atomic files, safetensors, hashes, and the flat names under which values are saved. No pickle."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cachequant.config_values import FORMATS
from cachequant.errors import UserError
from cachequant.types import ActivationTable, AffineMap, Correction, LayerQuant, QuantState, WeightGrid


def make_folder(folder: Path) -> Path:
    """Create a folder and its parents.

    Raises:
        UserError: it cannot be created or is not a folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot make folder {str(folder)[:80]!r}: {reason}; choose a writable one") from None
    return folder


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it over `path`.

    A device or a pipe (/dev/stdout) is written to as it is: a file would take its place.

    Raises:
        UserError: the folder is not writable or the disk is full; `path` is as it was.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if str(path.parent) in ("/dev", "/dev/fd") or (path.exists() and not path.is_file() and not path.is_dir()):
            return write(path)
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
        raise UserError(f"{path} is damaged ({_start(error)}): make it again") from None


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
    with _reading(path):
        return load_file(path)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What safetensors and the system say of a file that cannot be read, as one line."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, MemoryError) as error:
        raise UserError(f"{path} is damaged ({_start(error)}): make it again") from None


def _start(error: BaseException) -> str:
    """The beginning of an error's text, on one line."""
    return " ".join(str(error).split())[:80]


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
    """The inverse of `pack_maps`; {} where nothing was saved.

    Raises:
        UserError: a tensor is missing, or not of the type and shape that `pack_maps` gives it.
    """
    if f"{prefix}.steps" not in flat:
        return {}
    scale, shift = (_checked(flat, f"{prefix}.{name}", torch.float32, 2) for name in ("scale", "shift"))
    previous = flat.get(f"{prefix}.previous")
    if previous is not None and (previous.dtype, previous.shape) != (scale.dtype, scale.shape):
        raise UserError(f"{prefix}.previous is not of the shape of {prefix}.scale: the file is damaged, make it again")
    steps = _checked(flat, f"{prefix}.steps", torch.int32, 1).tolist()
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
        UserError: a tensor is missing, or not of the type and shape that `pack_quant` gives it.
    """
    layers = {name: _unpack_layer(f"layers.{name}", flat) for name in _names(flat, "layers.", ".widths")}
    return QuantState(layers, _unpack_operands(flat))


class StoredLayers(Mapping[str, LayerQuant]):
    """The layers of a quantisation state in a file, each read when it is asked for and never kept.

    Every reading maps the file anew: what an earlier one touched does not stay in memory.

    Args:
        path: safetensors written from `pack_quant`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _reading(path), safe_open(path, framework="pt") as handle:
            self._names = _names(handle.keys(), "layers.", ".widths")

    def __getitem__(self, name: str) -> LayerQuant:
        if name not in self._names:
            raise KeyError(name)
        prefix = f"layers.{name}"
        with _reading(self.path), safe_open(self.path, framework="pt") as handle:
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
    with _reading(path), safe_open(path, framework="pt") as handle:
        names = [key for key in handle.keys() if key.startswith("operands.")]  # noqa: SIM118
        operands = {key: handle.get_tensor(key).clone() for key in names}
    return QuantState(StoredLayers(path), _unpack_operands(operands))


def _checked(flat: Mapping[str, Tensor], name: str, dtype: torch.dtype, dims: int) -> Tensor:
    """The tensor called `name`, which must have this type and so many dimensions."""
    if name not in flat:
        raise UserError(f"the file lacks tensor {name}: it is damaged, make it again")
    tensor = flat[name]
    if tensor.dtype != dtype or tensor.dim() != dims:
        found = f"{str(tensor.dtype)[6:]} with {tensor.dim()} dimensions"
        raise UserError(
            f"tensor {name} is {found}, expected {str(dtype)[6:]} with {dims}: the file is damaged, make it again"
        )
    return tensor


def _unpack_operands(flat: dict[str, Tensor]) -> dict[str, ActivationTable]:
    return {name: _unpack_table(f"operands.{name}", flat) for name in _names(flat, "operands.", ".zero_point")}


def _unpack_layer(prefix: str, flat: dict[str, Tensor]) -> LayerQuant:
    widths = tuple(_checked(flat, f"{prefix}.widths", torch.int32, 1).tolist())
    grids = tuple(_unpack_grid(f"{prefix}.{i}", flat) for i in range(len(widths)))
    tables = tuple(_unpack_table(f"{prefix}.{i}.input", flat) for i in range(len(widths)))
    if not widths or widths != tuple(grid.values.shape[1] for grid in grids):
        raise UserError(
            f"{prefix}.widths are {list(widths)}, which its weights are not: the file is damaged, make it again"
        )
    return LayerQuant(grids, tables, widths)


def _unpack_grid(prefix: str, flat: dict[str, Tensor]) -> WeightGrid:
    """The integer weights of one segment."""
    bits, *shape = _checked(flat, f"{prefix}.weight_grid", torch.int32, 1).tolist() or [0]
    scale = _checked(flat, f"{prefix}.weight_scale", torch.float32, 1)
    zero_point = _checked(flat, f"{prefix}.weight_zero_point", torch.uint8, 1).float()
    packed = bits <= 4
    stored = _checked(flat, f"{prefix}.weight", torch.uint8, 1 if packed else len(shape))
    held = [-(-math.prod(shape) // 2)] if packed else shape
    if not 2 <= bits <= 8 or len(shape) < 2 or min(shape) < 1 or list(stored.shape) != held:
        raise UserError(f"{prefix}.weight is not {bits} bits of shape {shape}: the file is damaged, make it again")
    if not len(scale) == len(zero_point) == shape[0]:
        raise UserError(f"{prefix} has {shape[0]} channels and {len(scale)} scales: the file is damaged, make it again")
    values = unpack_nibbles(stored, tuple(shape)) if packed else stored
    return WeightGrid(values, scale, zero_point, bits, _unpack_format(f"{prefix}.weight_format", flat))


def _pack_table(prefix: str, table: ActivationTable) -> dict[str, Tensor]:
    return {
        f"{prefix}.steps": table.steps,
        f"{prefix}.scale": table.scale,
        f"{prefix}.zero_point": table.zero_point,
        f"{prefix}.bits": torch.tensor(table.bits, dtype=torch.int32),
        **_pack_format(f"{prefix}.format", table.format),
    }


def _unpack_table(prefix: str, flat: dict[str, Tensor]) -> ActivationTable:
    steps = _checked(flat, f"{prefix}.steps", torch.int32, 1)
    scale, zero_point = (_checked(flat, f"{prefix}.{name}", torch.float32, 1) for name in ("scale", "zero_point"))
    bits = int(_checked(flat, f"{prefix}.bits", torch.int32, 0))
    usable = (
        len(steps) == len(scale) == len(zero_point)
        and bool((steps.diff() > 0).all() and (steps >= 0).all())
        and bool((scale.isfinite() & (scale > 0)).all())
        and 2 <= bits <= 8
        and bool(((zero_point >= 0) & (zero_point < 2**bits) & (zero_point == zero_point.round())).all())
    )
    if not usable:
        raise UserError(f"{prefix} is no table of {bits} bit grids by rising steps: the file is damaged, make it again")
    return ActivationTable(steps, scale, zero_point, bits, _unpack_format(f"{prefix}.format", flat))


def _pack_format(key: str, name: str) -> dict[str, Tensor]:
    """A number format by its place in `FORMATS`; nothing for integers."""
    return {} if name == "int" else {key: torch.tensor(FORMATS.index(name), dtype=torch.int32)}


def _unpack_format(key: str, flat: dict[str, Tensor]) -> str:
    if key not in flat:
        return "int"
    place = int(_checked(flat, key, torch.int32, 0))
    if not 0 <= place < len(FORMATS):
        raise UserError(f"{key} is {place}, expected 0 to {len(FORMATS) - 1}: the file is damaged, make it again")
    return FORMATS[place]


def _names(flat: Iterable[str], start: str, end: str) -> list[str]:
    return [key[len(start) : -len(end)] for key in flat if key.startswith(start) and key.endswith(end)]
