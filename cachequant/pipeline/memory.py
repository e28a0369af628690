"""How many bytes of a device's memory objects hold, whatever they are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

WALKED = ("cachequant.", "diffusers.", "torch.nn.", "torchao.", "transformers.")
"""Packages whose objects are looked into."""


def held_bytes(roots: Iterable[Any], device: torch.device) -> int:
    """Bytes on `device` of all tensors that can be reached from `roots` through modules, containers and attributes.

    Memory that several tensors share counts once, and all of it counts where a tensor is a view of a part. So what a
    quantised layer keeps of the layer that it replaced shows.
    """
    storages = {}
    for tensor in _tensors(list(roots)):
        if tensor.device.type == device.type:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(pending: list[Any]) -> Iterator[Tensor]:
    """Every tensor behind the pending objects; a tensor made of others (a quantised one) gives those."""
    seen: set[int] = set()
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            if hasattr(item, "__tensor_flatten__"):
                pending += [getattr(item, name) for name in item.__tensor_flatten__()[0]]
            else:
                yield item
        elif isinstance(item, Mapping):
            pending += list(item.values())
        elif isinstance(item, list | tuple | set | frozenset):
            pending += list(item)
        elif isinstance(item, nn.Module) or type(item).__module__.startswith(WALKED):
            pending += list(getattr(item, "__dict__", {}).values())
