"""Which operators compute a plan's integers, chosen by what the machine can do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cachequant.errors import UserError
from cachequant.kernels.cpu import unavailable
from cachequant.kernels.native import load_native

SIMULATED, CPU_INT8 = "simulated", "cpu-int8"
BACKENDS = ("auto", SIMULATED, CPU_INT8)


@dataclass(frozen=True)
class Backend:
    """A backend that runs here.

    Attributes:
        name: SIMULATED or CPU_INT8.
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
    reason = unavailable() if device.type == "cpu" else f"the model is on {device.type}, and INT8 runs on the cpu only"
    if reason is None:
        return Backend(CPU_INT8, f"integers on oneDNN{_between()}")
    if requested == CPU_INT8:
        raise UserError(f"backend {CPU_INT8} does not run here ({reason}): use auto or {SIMULATED}")
    return Backend(SIMULATED, f"integers computed in floating point, slower than the model itself, because {reason}")


def _between() -> str:
    """What runs between two products."""
    reason = load_native()
    return (
        ", C++ operators between them" if reason is None else f", plain torch between them, which is slower: {reason}"
    )
