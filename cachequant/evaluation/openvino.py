"""The same quantised network in OpenVINO, a peer to measure against (extra `bench`)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cachequant.errors import UserError
from cachequant.kernels.reference import Geometry, product
from cachequant.quant.convert import replace_module
from cachequant.types import LayerQuant, QuantState


class FakeQuantLayer(nn.Module):
    """A layer with torch's fake quantisation on inputs and weights, which OpenVINO's runtime turns into INT8.

    Weights are on a symmetric grid here, which its kernels are fast on; the number of operations is the same.

    Args:
        source: the layer.
        state: segments and activation grids; the first row of each table is used.
    """

    def __init__(self, source: Any, state: LayerQuant) -> None:
        super().__init__()
        self.geometry, self.widths = Geometry.of(source), list(state.widths)
        self.grids = [(float(t.scale[0]), int(t.zero_point[0]), 2**t.bits - 1) for t in state.inputs]
        self.weight, self.bias = nn.Parameter(source.weight.detach().contiguous()), source.bias

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """As the layer."""
        dim = 1 if self.geometry.is_conv else -1
        parts = x.split(self.widths, dim=dim) if len(self.widths) > 1 else (x,)
        total = None
        for part, (scale, zero, levels), weight in zip(
            parts, self.grids, self.weight.split(self.widths, 1), strict=True
        ):
            q = torch.fake_quantize_per_tensor_affine(part, scale, zero, 0, levels)
            steps = weight.detach().flatten(1).abs().amax(1).clamp(min=1e-8) / 127  # [O]
            zeros = torch.zeros(len(steps), dtype=torch.int32)
            w = torch.fake_quantize_per_channel_affine(weight, steps, zeros, 0, -127, 127)
            y = product(q, w, self.geometry)
            total = y if total is None else total + y
        assert total is not None
        if self.bias is None:
            return total
        return total + (self.bias.view(1, -1, 1, 1) if self.geometry.is_conv else self.bias)


class _Positional(nn.Module):
    """The denoiser with tensors as positional arguments only, which tracing needs."""

    def __init__(self, denoiser: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.denoiser, self.names = denoiser, names

    def forward(self, x: Tensor, timestep: Tensor, *rest: Tensor) -> Tensor:
        return self.denoiser(x, timestep, **dict(zip(self.names, rest, strict=True)), return_dict=False)[0]


def compile_openvino(
    denoiser: nn.Module, state: QuantState, x: Tensor, timestep: Tensor, kwargs: dict[str, Tensor]
) -> Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]:
    """Convert and compile for the CPU with as many threads as torch uses.

    Args:
        denoiser: in full precision; copied.
        state: which layers are quantised and on which activation grids.
        x, timestep, kwargs: one evaluation.

    Returns:
        (x, timestep, kwargs) -> output.

    Raises:
        UserError: OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError:
        raise UserError(
            "mode openvino needs OpenVINO: pip install 'cachequant[bench]', or leave the mode out"
        ) from None
    twin = copy.deepcopy(denoiser)
    for name, layer in state.layers.items():
        replace_module(twin, name, FakeQuantLayer(twin.get_submodule(name), layer))
    names = tuple(kwargs)
    model = openvino.convert_model(_Positional(twin, names), example_input=(x, timestep, *kwargs.values()))
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

    def run(x: Tensor, timestep: Tensor, kwargs: dict[str, Tensor]) -> Tensor:
        inputs = [t.contiguous().numpy() for t in (x, timestep, *(kwargs[name] for name in names))]
        return torch.from_numpy(request.infer(inputs)[0].copy())

    return run
