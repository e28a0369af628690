"""Read an original checkpoint without running anything that it holds."""

from __future__ import annotations

import re
import warnings
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
        stored: what the file calls the averaged weight that belongs to a raw one, by the name of the raw one.
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
            UserError: EMA weights are asked for and the file has one set only, or not all of them.
        """
        if not self.ema:
            if weights == "ema":
                raise UserError(f"{self.name} holds one set of weights, expected an EMA copy: drop --weights ema")
            return self, "only"
        if weights == "raw":
            unused = {
                **self.unused,
                "EMA weights, the raw ones are used": sorted(self.stored.get(k, f"ema.{k}") for k in self.ema),
            }
            return replace(self, ema={}, stored={}, unused=unused), "raw"
        missing = [name for key, name in self.stored.items() if key not in self.ema]
        if missing:
            raise UserError(
                f"{self.name} lacks {missing[0]}: its EMA copy is incomplete; fetch it again, or --weights raw"
            )
        unused = {**self.unused, "raw weights, the EMA ones are used": sorted(self.ema)}
        return replace(self, tensors={**self.tensors, **self.ema}, ema={}, unused=unused), "ema"


def read_checkpoint(path: Path) -> Checkpoint:
    """Read .ckpt, .pt, .pth (weights-only unpickling) or .safetensors.

    Known layouts, each with or without EMA weights: a state dict; `{"state_dict": …}` of Lightning; `{"model": …, "ema": …,
    "opt": …}` of DiT; the list [raw, optimiser, epoch, step, EMA] of DDIM. A "module." in front of all names is dropped.

    Raises:
        UserError: no such file, truncated, objects other than plain data in it, or no weights.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint {path}: expected a .ckpt, .pt, .pth or .safetensors file")
    weights, copies, rest = _layout(_read(path))
    tensors, ema = _plain(weights), _plain(copies)
    if not tensors:
        raise UserError(f"{path} holds no weights, expected a state dict of tensors: is it the right file?")
    stored = {k: f"ema.{k}" for k in tensors} if ema else {}
    unused = {"training state beside the weights": rest} if rest else {}
    return with_ema_apart(Checkpoint(path.name, tensors, ema, stored, unused))


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        inert = torch.serialization.safe_globals([(Inert, name) for name in _INERT])
        with inert, warnings.catch_warnings(action="ignore"):  # pickle's protocol, say
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch, pickle and zip raise many kinds for a damaged file
        foreign = re.search(r"GLOBAL ([\w.]+)|Trying to instantiate a class ([\w.<>' ]+)|function ([\w.]+)", str(error))
        if foreign and "Weights only load failed" in str(error):
            name = next(group for group in foreign.groups() if group)
            raise UserError(
                f"{path} holds {name}, expected tensors and plain data only: refused, since loading it could run code"
            ) from None
        raise UserError(f"{path} cannot be read: truncated, or not a checkpoint; fetch it again") from None


def _layout(content: Any) -> tuple[Any, Any, list[str]]:
    """(weights, EMA weights, names of the rest) of a file's content."""
    if isinstance(content, list | tuple) and len(content) in (4, 5):
        rest = ["optimiser state (entry 1)", "epoch (entry 2)", "step (entry 3)"]
        return content[0], content[4] if len(content) == 5 else {}, rest
    if not isinstance(content, Mapping):
        return {}, {}, []
    for name in ("state_dict", "model"):
        if isinstance(content.get(name), Mapping):
            rest = sorted(str(k) for k in content if k not in (name, "ema"))
            return content[name], content.get("ema", {}), rest
    return content, {}, sorted(str(k) for k, v in content.items() if not isinstance(v, Tensor))


def _plain(entries: Any) -> dict[str, Tensor]:
    """The tensors among `entries`, without a "module." that all names share."""
    if not isinstance(entries, Mapping):
        return {}
    tensors = {str(k): v for k, v in entries.items() if isinstance(v, Tensor)}
    shared = "module." if tensors and all(k.startswith("module.") for k in tensors) else ""
    return {k.removeprefix(shared): v for k, v in tensors.items()}


def with_ema_apart(checkpoint: Checkpoint) -> Checkpoint:
    """Take the copy that latent diffusion keeps under `model_ema.`, its names without dots, out of the state dict."""
    if not any(k.startswith("model_ema.") for k in checkpoint.tensors):
        return checkpoint
    raw = [k for k in checkpoint.tensors if k.startswith("model.")]
    stored = {k: "model_ema." + k.removeprefix("model.").replace(".", "") for k in raw}
    counters: list[str] = [k for k in ("model_ema.decay", "model_ema.num_updates") if k in checkpoint.tensors]
    copies = {*stored.values(), *counters}
    return replace(
        checkpoint,
        tensors={k: v for k, v in checkpoint.tensors.items() if k not in copies},
        ema={k: checkpoint.tensors[name] for k, name in stored.items() if name in checkpoint.tensors},
        stored=stored,
        unused={**checkpoint.unused, **({"counters of the EMA": counters} if counters else {})},
    )
