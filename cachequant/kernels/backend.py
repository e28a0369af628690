"""Which operators compute a plan's integers, chosen by what the machine can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cachequant.errors import UserError
from cachequant.kernels import torch_quantizer_package, winograd
from cachequant.kernels.cpu import unavailable
from cachequant.kernels.native import load_native

SIMULATED, CPU_INT8, CUDA_INT8 = "simulated", "cpu-int8", "cuda-int8"
TORCH_QUANTIZER = torch_quantizer_package.NAME
BACKENDS = ("auto", SIMULATED, CPU_INT8, CUDA_INT8, TORCH_QUANTIZER)


@dataclass(frozen=True)
class Backend:
    """A backend that runs here.

    Attributes:
        name: SIMULATED, CPU_INT8, CUDA_INT8 or TORCH_QUANTIZER.
        note: one line for people: what computes, and why nothing faster does.
    """

    name: str
    note: str


def choose_backend(requested: str, device: torch.device) -> Backend:
    """The backend called `requested`; "auto" is the fastest that runs exactly on this device, of our own.

    Raises:
        UserError: no such backend, or it does not run here.
    """
    if requested not in BACKENDS:
        raise UserError(f"backend is {requested!r}, expected one of {', '.join(BACKENDS)}: choose one of these")
    if requested == SIMULATED:
        return Backend(SIMULATED, "integers computed in floating point, the reference for every kernel")
    refuse = _REFUSALS.get(requested)
    refused = None if refuse is None else refuse(device)
    if refused is not None:
        raise UserError(f"backend {requested} does not run here ({refused}): use auto or {SIMULATED}")
    if requested == TORCH_QUANTIZER:
        whose = f"{TORCH_QUANTIZER} {torch_quantizer_package.version()}"
        return Backend(TORCH_QUANTIZER, f"integers in the modules of {whose}, half precision between them")
    reasons = {CPU_INT8: _refuses_cpu(device), CUDA_INT8: _refuses_cuda(device)}
    if reasons[CPU_INT8] is None:
        return Backend(CPU_INT8, f"integers on oneDNN{_between()}")
    if reasons[CUDA_INT8] is None:
        return Backend(CUDA_INT8, f"integers on the GPU{_products(device)}")
    reason = reasons[CPU_INT8] if device.type == "cpu" else reasons[CUDA_INT8]
    return Backend(SIMULATED, f"integers computed in floating point, slower than the model itself, because {reason}")


def _between() -> str:
    """What else multiplies, and what runs between two products."""
    reason = load_native()
    if reason is not None:
        return f", plain torch between them, which is slower: {reason}"
    return f"{'' if winograd.unavailable() else ' and in 3×3 convolutions by Winograd'}, C++ operators between them"


def _refuses_cpu(device: torch.device) -> str | None:
    return unavailable() if device.type == "cpu" else f"the model is on {device.type}"


def _refuses_cuda(device: torch.device) -> str | None:
    """Why the GPU's INT8 does not run on this device; None where it does."""
    reason = _refuses_card(device)
    if reason is not None:
        return reason
    from cachequant.kernels.cuda.dispatch import has_triton

    return None if has_triton() else "Triton is not installed, which the operators between the products need"


def _refuses_torch_quantizer(device: torch.device) -> str | None:
    return torch_quantizer_package.not_importable() or _refuses_card(device)


def _refuses_card(device: torch.device) -> str | None:
    """Why INT8's tensor cores are not there; None where they are."""
    if device.type != "cuda":
        return f"the model is on {device.type}"
    if not torch.cuda.is_available():
        return "the model is on cuda, but torch finds no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    return f"compute capability {major}.{minor}, INT8 needs 8.0 or newer" if (major, minor) < (8, 0) else None


_REFUSALS: dict[str, Callable[[torch.device], str | None]] = {
    CPU_INT8: _refuses_cpu,
    CUDA_INT8: _refuses_cuda,
    TORCH_QUANTIZER: _refuses_torch_quantizer,
}


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
