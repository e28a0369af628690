"""CacheQuant: feature caching and quantisation of pretrained diffusion models, planned together, without training."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "load_config": "cachequant.config",
    "Plan": "cachequant.plan",
    "UserError": "cachequant.errors",
    "load_pipeline": "cachequant.models.loading",
    "calibrate": "cachequant.api",
    "enable": "cachequant.api",
    "load_quantized": "cachequant.api",
    "disable": "cachequant.api",
    "bypass": "cachequant.api",
    "report": "cachequant.api",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'cachequant' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
