"""Which operators compute a plan's integers, chosen by what the machine can do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cachequant.errors import UserError
from cachequant.kernels.cpu import unavailable
from cachequant.kernels.native import load_native

SIMULATED, CPU_INT8, CUDA_INT8 = "simulated", "cpu-int8", "cuda-int8"
BACKENDS = ("auto", SIMULATED, CPU_INT8, CUDA_INT8)


@dataclass(frozen=True)
class Backend:
    """A backend that runs here.

    Attributes:
        name: SIMULATED, CPU_INT8 or CUDA_INT8.
        note: one line for people: what computes, and why nothing faster does.
    """

    name: str
    note: str


def choose_backend(requested: str, device: torch.device) -> Backend:
    """The backend called `requested`; "auto" is the fastest that runs exactly on this device.

    Raises:
        UserError: no such backend, or it does not run here.
    """
    if requested not in BACKENDS:
        raise UserError(f"backend is {requested!r}, expected one of {', '.join(BACKENDS)}: choose one of these")
    if requested == SIMULATED:
        return Backend(SIMULATED, "integers computed in floating point, the reference for every kernel")
    reasons = {CPU_INT8: _refuses_cpu(device), CUDA_INT8: _refuses_cuda(device)}
    if requested in reasons and reasons[requested] is not None:
        raise UserError(f"backend {requested} does not run here ({reasons[requested]}): use auto or {SIMULATED}")
    if reasons[CPU_INT8] is None:
        return Backend(CPU_INT8, f"integers on oneDNN{_between()}")
    if reasons[CUDA_INT8] is None:
        return Backend(CUDA_INT8, f"integers on the GPU{_products(device)}")
    reason = reasons[CPU_INT8] if device.type == "cpu" else reasons[CUDA_INT8]
    return Backend(SIMULATED, f"integers computed in floating point, slower than the model itself, because {reason}")


def _between() -> str:
    """What runs between two products."""
    reason = load_native()
    return (
        ", C++ operators between them" if reason is None else f", plain torch between them, which is slower: {reason}"
    )


def _refuses_cpu(device: torch.device) -> str | None:
    return unavailable() if device.type == "cpu" else f"the model is on {device.type}"


def _refuses_cuda(device: torch.device) -> str | None:
    """Why the GPU's INT8 does not run on this device; None where it does."""
    if device.type != "cuda":
        return f"the model is on {device.type}"
    if not torch.cuda.is_available():
        return "the model is on cuda, but torch finds no CUDA device"
    from cachequant.kernels.cuda.dispatch import has_triton

    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):
        return f"compute capability {major}.{minor}, INT8 needs 8.0 or newer"
    return None if has_triton() else "Triton is not installed, which the operators between the products need"


def _products(device: torch.device) -> str:
    """What multiplies integers on a GPU."""
    from cachequant.kernels.cuda.build import unavailable as cannot_build
    from cachequant.kernels.cuda.dispatch import built
    from cachequant.kernels.cuda.variants import variants_for

    capability = torch.cuda.get_device_capability(device)
    made, all_of_them = len(built(capability)), len(variants_for(capability))
    if made == all_of_them:
        return f", {made} CUTLASS kernels"
    reason = cannot_build()
    hint = "run python -m cachequant.kernels.cuda.build" if reason is None else reason
    return f", {made} of {all_of_them} CUTLASS kernels, Triton for the rest, which is slower: {hint}"
