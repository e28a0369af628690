"""Read an original checkpoint without running anything that it holds."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cachequant.errors import UserError

# Training files also name these classes, none of which is needed: they are read as inert placeholders.
_INERT = (
    "argparse.Namespace",
    "_codecs.encode",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
)


class Inert:
    """Stands for an object of a checkpoint that is not a tensor; accepts any state and does nothing with it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


@dataclass(frozen=True)
class Checkpoint:
    """Weights by their original names.

    Attributes:
        name: of the file.
        tensors: everything that is a tensor, the raw weights where there are two sets.
        ema: averaged weights by the names of the raw ones; empty where the file has one set only.
        stored: what the file itself calls an averaged weight, by the name of the raw one.
        unused: reason -> names of what no network will need.
    """

    name: str
    tensors: dict[str, Tensor]
    ema: dict[str, Tensor] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)
    unused: dict[str, list[str]] = field(default_factory=dict)

    def choose(self, weights: str) -> tuple[Checkpoint, str]:
        """This checkpoint with one set of weights, and which it is: "ema", "raw" or "only".

        Args:
            weights: "ema", "raw", or "auto" for EMA weights where the file has them.

        Raises:
            UserError: EMA weights are asked for and the file has one set only.
        """
        if not self.ema:
            if weights == "ema":
                raise UserError(f"{self.name} holds one set of weights, expected an EMA copy: drop --weights ema")
            return self, "only"
        if weights == "raw":
            unused = {**self.unused, "EMA weights, the raw ones are used": sorted(self.stored[k] for k in self.ema)}
            return replace(self, ema={}, stored={}, unused=unused), "raw"
        unused = {**self.unused, "raw weights, the EMA ones are used": sorted(self.ema)}
        return replace(self, tensors={**self.tensors, **self.ema}, ema={}, unused=unused), "ema"


def read_checkpoint(path: Path) -> Checkpoint:
    """Read .ckpt, .pt, .pth (weights-only unpickling) or .safetensors.

    Known layouts: a state dict; `{"state_dict": …}` of Lightning; `{"model": …, "ema": …, "opt": …}` of DiT; the list
    [raw, optimiser, epoch, step, EMA] of DDIM. A "module." in front of all names (data parallel) is dropped.

    Raises:
        UserError: no such file, truncated, objects other than plain data in it, or no weights.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint {path}: expected a .ckpt, .pt, .pth or .safetensors file")
    tensors, copies, rest = _layout(_read(path))
    ema = _plain(copies)
    unused = {"training state beside the weights": rest} if rest else {}
    checkpoint = Checkpoint(path.name, _plain(tensors), ema, {k: f"ema.{k}" for k in ema}, unused)
    if not checkpoint.tensors:
        raise UserError(f"{path} holds no weights, expected a state dict of tensors: is it the right file?")
    return _split_lit_ema(checkpoint)


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([(Inert, name) for name in _INERT]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch, pickle and zip raise many kinds for a damaged file
        foreign = re.search(r"GLOBAL ([\w.]+)|Trying to instantiate a class ([\w.<>' ]+)|function ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and foreign:
            name = next(group for group in foreign.groups() if group)
            raise UserError(
                f"{path} holds {name}, expected tensors and plain data only: refused, since loading it could run code"
            ) from None
        raise UserError(f"{path} cannot be read: truncated, or not a checkpoint; fetch it again") from None


def _layout(content: Any) -> tuple[Any, Any, list[str]]:
    """(weights, EMA weights, names of the rest) of a file's content."""
    if isinstance(content, list | tuple) and len(content) == 5:
        return content[0], content[4], ["optimiser state (entry 1)", "epoch (entry 2)", "step (entry 3)"]
    if not isinstance(content, Mapping):
        return {}, {}, []
    if isinstance(content.get("state_dict"), Mapping):
        return content["state_dict"], {}, sorted(str(k) for k in content if k != "state_dict")
    if isinstance(content.get("model"), Mapping) and isinstance(content.get("ema"), Mapping):
        return content["model"], content["ema"], sorted(str(k) for k in content if k not in ("model", "ema"))
    return content, {}, sorted(str(k) for k, v in content.items() if not isinstance(v, Tensor))


def _plain(entries: Any) -> dict[str, Tensor]:
    """The tensors among `entries`, without a "module." that all names share."""
    if not isinstance(entries, Mapping):
        return {}
    tensors = {str(k): v for k, v in entries.items() if isinstance(v, Tensor)}
    shared = "module." if tensors and all(k.startswith("module.") for k in tensors) else ""
    return {k.removeprefix(shared): v for k, v in tensors.items()}


def _split_lit_ema(checkpoint: Checkpoint) -> Checkpoint:
    """Take the copy that latent diffusion keeps under `model_ema.`, its names without dots, out of the state dict."""
    copies = {k: v for k, v in checkpoint.tensors.items() if k.startswith("model_ema.")}
    if not copies:
        return checkpoint
    tensors = {k: v for k, v in checkpoint.tensors.items() if k not in copies}
    names = {"model_ema." + k.removeprefix("model.").replace(".", ""): k for k in tensors if k.startswith("model.")}
    counters = [k for k in copies if k in ("model_ema.decay", "model_ema.num_updates")]
    stray = [k for k in copies if k not in names and k not in counters]
    if stray:
        raise UserError(f"{checkpoint.name}: {stray[0]} has no raw counterpart, expected a copy of a weight of model.*")
    ema = {names[k]: v for k, v in copies.items() if k in names}
    stored = {names[k]: k for k in copies if k in names}
    unused = {**checkpoint.unused, "counters of the EMA": counters} if counters else checkpoint.unused
    return replace(checkpoint, tensors=tensors, ema=ema, stored=stored, unused=unused)
