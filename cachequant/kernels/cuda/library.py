"""Calls the compiled kernels through ctypes, on torch's current stream, without allocating anything but their workspace."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cachequant.kernels.cuda.build import library_path
from cachequant.kernels.cuda.variants import Variant

CUDA_ERROR = 1000
"""Statuses from here on are CUDA errors, those below CUTLASS's own."""


class _Epilogue(Structure):
    _fields_ = (
        ("scale", c_void_p), ("shift", c_void_p), ("source", c_void_p), ("beta", c_float), ("row_sum", c_void_p),
        ("offset", c_void_p), ("columns", c_void_p), ("out", c_void_p), ("grid", c_void_p),
    )  # fmt: skip


class _Launch(Structure):
    _fields_ = (
        ("workspace", c_void_p), ("workspace_bytes", c_int64), ("stream", c_void_p), ("device", c_int32),
        ("multiprocessors", c_int32),
    )  # fmt: skip


class _Gemm(Structure):
    _fields_ = (
        ("x", c_void_p), ("w", c_void_p), ("m", c_int32), ("n", c_int32), ("k", c_int32), ("epilogue", _Epilogue),
    )  # fmt: skip


_CONV_SIZES = ("batch", "height", "width", "channels", "n", "rows", "columns", "stride_h", "stride_w")


class _Conv(Structure):
    _fields_ = (
        ("x", c_void_p), ("w", c_void_p), *((name, c_int32) for name in _CONV_SIZES), ("epilogue", _Epilogue),
    )  # fmt: skip


class KernelError(RuntimeError):
    """A compiled kernel refused its arguments or failed to start."""


@cache
def _load(variant: Variant) -> ctypes.CDLL:
    problem = _Gemm if variant.operation == "linear" else _Conv
    try:
        library = ctypes.CDLL(str(library_path(variant)))
    except OSError as error:
        raise KernelError(f"{variant.name} cannot be loaded ({str(error)[:120]}): build it on this machine") from error
    for function, result in ((library.cq_run, c_int32), (library.cq_workspace, c_int64)):
        function.argtypes, function.restype = (POINTER(problem), POINTER(_Launch)), result
    library.cq_shared_memory.restype = c_int32
    return library


def shared_memory(variant: Variant) -> int:
    """Bytes of shared memory that one block of the kernel takes; runs without a GPU."""
    return int(_load(variant).cq_shared_memory())


@cache
def _columns(device: torch.device, count: int) -> Tensor:
    """0, 1, 2, ... in float32."""
    return torch.arange(count, dtype=torch.float32, device=device)


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def run(
    variant: Variant,
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    scale: Tensor,
    shift: Tensor | None,
    source: Tensor | None,
    beta: float,
    row_sum: Tensor | None,
    offset: Tensor | None,
    out: Tensor,
    grid: Tensor | None = None,
) -> None:
    """One product or convolution into `out`; every tensor contiguous, on the same card.

    Args:
        variant: a kernel that supports these channels and this output type.
        x: int8 [M, K] or [B, H, W, C].
        weight: int8 [N, K] or [N, R, S, C].
        stride: of a convolution.
        scale, shift, source, beta, row_sum, offset: of the epilogue, see `cachequant.kernels.cuda`.
        out: [M, N] or [B, P, Q, N].
        grid: float32 [4] of the integers behind a variant's activation.

    Raises:
        KernelError: the kernel did not start.
    """
    library = _load(variant)
    columns = _columns(x.device, max(4096, weight.shape[0])) if variant.arch == 80 and x.dim() == 4 else None
    pointers = [_pointer(t) for t in (scale, shift, source)]
    end = _Epilogue(*pointers, beta, *[_pointer(t) for t in (row_sum, offset, columns, out, grid)])
    problem: Any
    if x.dim() == 2:
        problem = _Gemm(_pointer(x), _pointer(weight), x.shape[0], weight.shape[0], x.shape[1], end)
    else:
        problem = _Conv(_pointer(x), _pointer(weight), *x.shape, *weight.shape[:3], *stride, end)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream(x.device).cuda_stream
        launch = _Launch(None, 0, stream, x.device.index or 0, _multiprocessors(x.device))
        size = library.cq_workspace(byref(problem), byref(launch))
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device) if size > 0 else None
        launch.workspace, launch.workspace_bytes = _pointer(workspace), max(size, 0)
        status = library.cq_run(byref(problem), byref(launch))
    if status != 0:
        what = f"CUDA error {status - CUDA_ERROR}" if status >= CUDA_ERROR else f"CUTLASS status {status}"
        raise KernelError(f"{variant.name} on {list(x.shape)} × {list(weight.shape)}: {what}")
