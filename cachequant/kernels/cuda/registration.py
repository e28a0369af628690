"""How an operator gets its kernel for GPUs, and what that kernel asks of its operands."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef

Kernel = Callable[..., Any]


def contiguous(*tensors: Tensor | None) -> None:
    """Check operands of which a kernel reads every value in its place; None stands for one that is not given.

    Raises:
        ValueError: one is not contiguous, so that wrong values would be read.
    """
    for tensor in tensors:
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"a tensor of shape {list(tensor.shape)} is not contiguous, expected contiguous operands")


def gpu_kernel(operator: CustomOpDef) -> Callable[[Kernel], Any]:
    """Decorator that registers a function as an operator's kernel for GPUs, run on the card of its first operand.

    Triton launches, and CUDA allocates streams and events, on the current card, whichever holds the operands.
    """
    return lambda kernel: operator.register_kernel("cuda")(_on_its_card(kernel))


def _on_its_card(kernel: Kernel) -> Kernel:
    """The same function, with the card of its first operand, a tensor or a list of them, as the current one."""

    @functools.wraps(kernel)
    def on_card(first: Tensor | list[Tensor], *operands: Any) -> Any:
        with torch.cuda.device((first if isinstance(first, Tensor) else first[0]).device):
            return kernel(first, *operands)

    return on_card
