"""The package torch_quantizer where it is installed: its modules, and why it does not run.

Written against github.com/ThisisBillhe/torch_quantizer 0.1.0 (commit 942384f): `torch_quantizer.src.quant_layer` holds
`qlinear_8bit(org_module, n_bits=8, num_steps=1)` and `qconv2d_8bit` of the same signature. Both read `current_step` as the
row of their tables, take half precision and return it. The package of that name on PyPI has no kernels.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from cachequant.errors import UserError

NAME = "torch_quantizer"
SOURCE = "github.com/ThisisBillhe/torch_quantizer"
_KINDS = {True: "qlinear_8bit", False: "qconv2d_8bit"}


def not_importable() -> str | None:
    """Why the package cannot be imported, with what is expected; None where it can."""
    try:
        import_module(f"{NAME}.src.quant_layer")
    except (ImportError, OSError) as error:  # its kernels, built for another torch, fail as either
        reason = " ".join(str(error).split())[:100]
        return f"the package cannot be imported: {reason}; expected {SOURCE}, built for this torch"
    return None


def version() -> str:
    """What the installed package calls itself."""
    return str(getattr(import_module(NAME), "__version__", "of unknown version"))


def make_module(source: nn.Conv2d | nn.Linear, num_steps: int, buffers: dict[str, Tensor]) -> Any:
    """The package's own module in the place of a layer.

    Args:
        source: gives shape, bias, stride and padding; its weight is not read.
        num_steps: T.
        buffers: of `cachequant.kernels.torch_quantizer.to_buffers`, where the module is to run.

    Raises:
        UserError: the installed package's modules are others.
    """
    layers, kind = import_module(f"{NAME}.src.quant_layer"), _KINDS[isinstance(source, nn.Linear)]
    try:
        with torch.device("meta"):  # it begins with random integers, which take neither time nor memory there
            module = getattr(layers, kind)(source, n_bits=8, num_steps=num_steps)
        module.load_state_dict(buffers, assign=True)
    except (AttributeError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{NAME} {version()} has another {kind} ({reason}): install {SOURCE} 0.1.0") from None
    return module
