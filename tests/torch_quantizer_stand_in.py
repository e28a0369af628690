"""torch_quantizer's two modules by their documented formula, so that the backend runs without the package and without a GPU.

Quantisation is done in half precision, one rounded operation after the other, as its kernel does; the sum of products is
exact (float64 of integers), and what follows it float32. Operands of another type than its kernels read are refused.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

VERSION = "0.1.0 (stand-in)"


class Quantised(nn.Module):
    """The buffers, and the step counted down by one with every call."""

    int_weight: Tensor
    act_delta: Tensor
    act_zp: Tensor
    act_times_weight_delta: Tensor
    zp_times_weight_channel_sum: Tensor
    bias: Tensor

    def __init__(self, org_module: Any, n_bits: int = 8, num_steps: int = 1) -> None:
        super().__init__()
        self.total_steps, self.current_step = num_steps, num_steps - 1
        outputs, inputs, *window = org_module.weight.shape
        self.register_buffer("int_weight", torch.empty(outputs, *window, inputs, dtype=torch.int8))
        self.register_buffer("bias", torch.zeros(outputs) if org_module.bias is None else org_module.bias.data)
        for name in ("act_delta", "act_zp"):
            self.register_buffer(name, torch.full((num_steps,), torch.nan, dtype=torch.float16))
        for name in ("act_times_weight_delta", "zp_times_weight_channel_sum"):
            self.register_buffer(name, torch.full((num_steps, outputs), torch.nan))

    def quantise(self, x: Tensor) -> Tensor:
        """Integers of x at this step, as float64."""
        row = self.current_step
        assert x.dtype == self.act_delta.dtype == self.act_zp.dtype == torch.float16 and x.is_contiguous()
        moved = x / self.act_delta[row] + self.act_zp[row]
        assert moved.dtype == torch.float16
        return moved.round().clamp(-128, 127).double()

    def finish(self, total: Tensor) -> Tensor:
        """Float16 of the exact sums [..., O]; the next call is the next step's."""
        row = self.current_step
        self.current_step = (row or self.total_steps) - 1
        tables = (self.zp_times_weight_channel_sum[row], self.act_times_weight_delta[row], self.bias)
        assert all(table.dtype == torch.float32 and table.is_contiguous() for table in tables)
        return ((total.float() - tables[0]) * tables[1] + tables[2]).half()


class Linear(Quantised):
    """`qlinear_8bit`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> float16 [..., O]."""
        assert self.int_weight.dtype == torch.int8
        return self.finish(self.quantise(x) @ self.int_weight.double().t())


class Conv2d(Quantised):
    """`qconv2d_8bit`: the border holds the zero point."""

    def __init__(self, org_module: Any, n_bits: int = 8, num_steps: int = 1) -> None:
        super().__init__(org_module, n_bits, num_steps)
        self.stride, (self.rows, self.columns) = org_module.stride, org_module.padding

    def forward(self, x: Tensor) -> Tensor:
        """[B, I, H, W] -> float16 [B, O, H', W']."""
        assert self.int_weight.dtype == torch.int8 and self.int_weight.is_contiguous()
        border = (self.columns, self.columns, self.rows, self.rows)
        q = F.pad(self.quantise(x), border, value=float(self.act_zp[self.current_step]))
        total = F.conv2d(q, self.int_weight.double().permute(0, 3, 1, 2), stride=self.stride)
        return self.finish(total.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


def install(monkeypatch: pytest.MonkeyPatch, **layers: Any) -> None:
    """Make `torch_quantizer` importable; `layers` replaces its modules."""
    held = {"qlinear_8bit": Linear, "qconv2d_8bit": Conv2d, **layers}
    for name, values in {"": {"__version__": VERSION}, ".src": {}, ".src.quant_layer": held}.items():
        module = ModuleType(f"torch_quantizer{name}")
        module.__dict__.update(values, __path__=[])
        monkeypatch.setitem(sys.modules, module.__name__, module)
