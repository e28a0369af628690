"""Fill a network from an original checkpoint: every weight asks for its original name, and nothing may be left over.

A mapping goes from our (diffusers') name to the original one. So a weight that is missing is reported by the name that the
checkpoint should have held, one original tensor can serve several places, and completeness is checked both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from cachequant.errors import UserError


def one_group(_: int) -> int:
    """Fused projections that hold all queries, then all keys, then all values."""
    return 1


@dataclass(frozen=True)
class Source:
    """Where a weight comes from.

    Attributes:
        key: original name, without the network's prefix.
        part: 0, 1 or 2 for the query, key or value rows of a fused projection; None takes the whole tensor.
        groups: channels C -> how often a fused projection repeats (query, key, value), once per head in old code.
    """

    key: str
    part: int | None = None
    groups: Callable[[int], int] = one_group

    def take(self, tensor: Tensor) -> Tensor:
        """The weight [C, …] out of the original tensor [C, …] or [3·C, …]."""
        if self.part is None:
            return tensor
        channels, rest = len(tensor) // 3, tensor.shape[1:]
        fused = tensor.reshape(self.groups(channels), 3, -1, *rest)  # [groups, 3, C / groups, …]
        return fused[:, self.part].reshape(channels, *rest)


@dataclass(frozen=True)
class Network:
    """One network of a pipeline and how it is filled.

    Attributes:
        component: its name in the pipeline: unet, vqvae, …
        title: what messages call it.
        build: makes it, with any weights.
        prefix: what its keys in the checkpoint begin with.
        source: our name of a weight -> its place in the checkpoint.
    """

    component: str
    title: str
    build: Callable[[], nn.Module]
    prefix: str
    source: Callable[[str], Source]


def fill(network: Network, tensors: dict[str, Tensor], where: str) -> tuple[nn.Module, set[str]]:
    """Build a network with the checkpoint's weights: (the network in evaluation mode, the keys it used).

    Args:
        network: what to build.
        tensors: the checkpoint, by original name.
        where: name of the checkpoint for messages.

    Raises:
        UserError: a weight is missing or has another shape; the first is named.
    """
    module = network.build()
    weights, used = {}, set()
    for name, ours in module.state_dict().items():
        source = network.source(name)
        key = network.prefix + source.key
        if key not in tensors:
            raise UserError(
                f"{where}: the {network.title} lacks {key}: the file is incomplete, or its configuration is another one"
            )
        used.add(key)
        value = source.take(tensors[key]) if source.part is None or tensors[key].shape[0] % 3 == 0 else tensors[key]
        if value.numel() != ours.numel() or _trimmed(value) != _trimmed(ours):
            raise UserError(
                f"{where}: {key} is {list(tensors[key].shape)}, the configuration expects {list(ours.shape)} for the "
                f"{network.title}'s {name}: give the YAML that belongs to this checkpoint"
            )
        weights[name] = value.reshape(ours.shape).to(ours.dtype, copy=True)  # no two places share memory
    module.load_state_dict(weights, assign=True)
    return module.eval(), used


def _trimmed(tensor: Tensor) -> list[int]:
    """A shape without trailing ones: 1×1 convolutions and linear layers hold the same matrix."""
    shape = list(tensor.shape)
    while shape and shape[-1] == 1:
        shape.pop()
    return shape


def renamed(name: str, table: Mapping[str, str]) -> str:
    """`name` with its leading module path replaced; the longest entry of the table that matches decides."""
    for ours in sorted(table, key=len, reverse=True):
        if name == ours or name.startswith(ours + "."):
            return table[ours] + name[len(ours) :]
    return name
