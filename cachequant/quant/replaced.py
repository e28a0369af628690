"""What becomes of a layer that waits elsewhere while integers run in its place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cachequant.errors import UserError


def change_type_in_place(source: nn.Module, device: torch.device, fn: Callable[[Tensor], Tensor]) -> None:
    """What `.to()` does to a layer that waits elsewhere while its integers run: the type changes, the place does not.

    Args:
        source: the replaced layer.
        device: where the integers are.
        fn: of `nn.Module._apply`.

    Raises:
        UserError: the network is moved to another device.
    """
    here = torch.empty(0, device=device)
    if fn(here).device != here.device:
        raise UserError(
            f"this pipeline runs INT8 on {here.device}, expected it to stay there: call cachequant.disable first"
        )
    source._apply(lambda tensor: tensor.to(fn(here.to(tensor.dtype)).dtype))
