"""Libraries of the `eval` extra, imported when they are needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from cachequant.errors import UserError


def require(name: str) -> Any:
    """A module of the `eval` extra, such as "torch_fidelity" or "torchvision.models".

    Raises:
        UserError: it is not installed, or torchvision was built for another torch than the one that is here.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(
            f"this metric needs {error.name or name}, which is not installed: pip install 'cachequant[eval]'"
        ) from None
    except RuntimeError as error:  # torchvision's operators are missing: it was built for CUDA, torch for the CPU
        raise UserError(
            f"{name} cannot be imported ({str(error)[:60]}): install the torchvision built for the same device as your torch"
        ) from None
