"""A quantised layer that torch_quantizer's own module computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.kernels.torch_quantizer import Held, to_buffers
from cachequant.kernels.torch_quantizer_package import make_module
from cachequant.quant.layers import Layer
from cachequant.quant.replaced import change_type_in_place


class TorchQuantizerLayer(nn.Module):
    """Stands where an `nn.Conv2d` or `nn.Linear` stood: torch_quantizer's module, told which step it is.

    The numbers are those of `QuantLayer` in its QUANTIZED mode, but for what the package does in half precision: scales,
    quantisation (an integer may be the neighbour of ours) and outputs. Its module counts its own calls; a cached step makes
    none of a deep layer, so the row is set before each of them.

    Args:
        source: the layer that is replaced; its weight is not read, and may be on the meta device.
        held: integers, bias and corrections, for which `unsupported` is None.
        clock: tells the step.
        device: where it runs.

    Raises:
        UserError: the installed package's modules are others than those it was written for.
    """

    def __init__(self, source: Layer, held: Held, clock: FeatureCache, device: torch.device) -> None:
        super().__init__()
        self.clock, self.device = clock, device
        self._source = (source,)  # a tuple hides it from the module tree
        buffers = {name: value.to(device) for name, value in to_buffers(held, clock.schedule.num_steps).items()}
        self._module = (
            make_module(source, clock.schedule.num_steps, buffers),
        )  # whose types `.half()` must not change

    @property
    def source(self) -> Layer:
        """The layer that was replaced."""
        return self._source[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TorchQuantizerLayer:
        """`.to()` changes the type of the replaced layer where it waits; integers stay as they are.

        Raises:
            UserError: the network is moved to another device.
        """
        change_type_in_place(self.source, self.device, fn)
        super()._apply(fn, recurse)
        return self

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """[B, I, H, W] -> [B, O, H', W'], or [..., I] -> [..., O]; of x's type, the numbers are half precision's."""
        (module,) = self._module
        module.current_step = self.clock.schedule.num_steps - 1 - self.clock.step
        output: Tensor = module(x.half().contiguous())
        return output.to(x.dtype)
