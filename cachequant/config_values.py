"""What the values of a configuration may be: choices, ranges, and what excludes what."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachequant.errors import UserError

if TYPE_CHECKING:
    from cachequant.config import QuantConfig, RunConfig

FAMILIES = ("ddpm-cifar10", "ldm4-bedroom", "ldm8-church", "ldm4-imagenet", "sd-v1", "dit-xl2")
"""The paper's models."""

FORMATS = ("int", "fp8", "log2")
"""What numbers a grid holds."""


_CHOICES = {
    "model.family": ("", *FAMILIES),
    "model.weights": ("auto", "ema", "raw"),
    "schedule.kind": ("uniform", "power", "dps"),
    "schedule.cost": (
        "l1",
        "l2",
        "quantised",
        "residual",
        "forecast",
        "sampler",
        "residual_sampler",
        "forecast_sampler",
        "effect",
        "residual_effect",
        "forecast_effect",
        "drift",
        "joint",
    ),
    "correction.layers": ("none", "consumers", "all"),
    "correction.output": ("none", "refreshes", "least_squares", "spread", "auto"),
    "correction.trajectory": ("full_precision", "free_running"),
    "quant.weight_search": ("minmax", "mse", "percentile"),
    "quant.activation_search": ("minmax", "mse", "percentile"),
    "quant.rounding": ("nearest", "compensated"),
    "quant.weight_format": FORMATS,
    "quant.activation_format": FORMATS,
}
_RANGES: dict[str, tuple[float, float]] = {
    "sampler.steps": (1, 100_000),
    "sampler.eta": (0, 1),
    "cache.interval": (1, 100_000),
    "cache.refreshes": (1, 100_000),
    "cache.budget_ms": (0, 1e12),
    "cache.speedup": (1, 1e6),
    "cache.branch": (0, 1000),
    "cache.feature_bits": (8, 8),
    "correction.ridge": (0, 1e6),
    "correction.inflation": (0, 100),
    "quant.weight_bits": (2, 8),
    "quant.activation_bits": (2, 8),
    "quant.ends_bits": (2, 8),
    "quant.attention_bits": (2, 8),
    "quant.rounding_samples": (1, 10**7),
    "quant.budget": (0, 1),
    "quant.recon.iterations": (1, 10**7),
    "quant.recon.samples": (1, 10**7),
    "quant.recon.batch_size": (1, 10**6),
    "quant.recon.weight_lr": (0, 1e3),
    "quant.recon.scale_lr": (0, 1e3),
    "quant.recon.zero_point_lr": (0, 1e3),
    "quant.recon.regulariser": (0, 1e3),
    "quant.recon.drop": (0, 1),
    "calibration.samples": (1, 10**7),
    "calibration.dps_samples": (1, 10**7),
    "calibration.dec_samples": (1, 10**7),
    "calibration.batch_size": (1, 10**6),
    "calibration.refresh_inputs": (1, 10**7),
    "calibration.cached_inputs": (1, 10**7),
    "calibration.seed": (0, 2**62),
    "sample.count": (1, 10**8),
    "sample.batch_size": (1, 10**6),
    "sample.seed": (0, 2**62),
}


def allowed_values(key: str) -> str:
    """What a key such as "cache.interval" accepts beside its type, in words; empty where anything of the type does."""
    if key in _CHOICES:
        return ", ".join(str(choice) or '""' for choice in _CHOICES[key])
    return " to ".join(f"{end:,}" for end in _RANGES[key]) if key in _RANGES else ""


def validate(config: RunConfig) -> None:
    """Check choices and ranges.

    Raises:
        UserError: names the key, what was given and what was expected.
    """
    for key, choices in _CHOICES.items():
        value = _lookup(config, key)
        if value not in choices:
            raise UserError(
                f"{key} is {value!r}, expected one of {', '.join(choices)}: correct it in the YAML or with --set"
            )
    for key, (low, high) in _RANGES.items():
        value = _lookup(config, key)
        if value is not None and not low <= value <= high:
            raise UserError(f"{key} is {value}, expected {low:g} to {high:g}: correct it in the YAML or with --set")
    name = config.model.name
    if name and (Path(name).name != name or name == ".." or "\0" in name):
        raise UserError(f"model.name is {name[:80]!r}, expected the name of a folder in {config.output}: correct it")
    _validate_quant(config.quant)
    calibration, correction = config.calibration, config.correction
    if calibration.cached_inputs > calibration.refresh_inputs:
        raise UserError(
            f"calibration.cached_inputs is {calibration.cached_inputs}, expected at most calibration.refresh_inputs "
            f"({calibration.refresh_inputs}): cached steps reuse features of refreshed rows, lower it"
        )
    if correction.layers == "all" and correction.trajectory == "full_precision":
        raise UserError(
            "correction.layers is all with full_precision trajectories, expected consumers there: "
            "set correction.trajectory=free_running"
        )
    if correction.output != "none" and correction.trajectory == "full_precision":
        raise UserError(
            f"correction.output is {correction.output} with full_precision trajectories, expected none there: "
            "set correction.trajectory=free_running"
        )
    paces = [f"cache.{n}" for n in ("refreshes", "budget_ms", "speedup") if getattr(config.cache, n) is not None]
    if len(paces) > 1:
        raise UserError(
            f"{' and '.join(paces)} are set, expected at most one of them: each says how many steps are full"
        )
    if (config.cache.refreshes or 1) > config.sampler.steps:
        raise UserError(
            f"cache.refreshes is {config.cache.refreshes} and sampler.steps is {config.sampler.steps}, "
            "expected at most one refresh a step: lower cache.refreshes"
        )
    if config.cache.interval > config.sampler.steps:
        raise UserError(
            f"cache.interval is {config.cache.interval} and sampler.steps is {config.sampler.steps}, "
            "expected an interval of at most the steps: lower cache.interval"
        )


def parse_bits(value: str) -> tuple[int, int] | None:
    """Bits of weights and activations of an entry of `quant.bits_map`; None for float.

    Raises:
        UserError: neither float nor w8a8, w4a8, ….
    """
    if value == "float":
        return None
    found = re.fullmatch(r"w([2-8])a([2-8])", value)
    if found is None:
        raise UserError(f"quant.bits_map holds {value!r}, expected float or bits such as w8a8 or w4a8: correct it")
    return int(found[1]), int(found[2])


def _validate_quant(quant: QuantConfig) -> None:
    """What single choices and ranges do not say about the quantisation."""
    for value in quant.bits_map.values():
        parse_bits(value)
    formats = {quant.weight_format, quant.activation_format}
    for kind, bits in ((quant.weight_format, quant.weight_bits), (quant.activation_format, quant.activation_bits)):
        if kind == "fp8" and bits != 8:
            raise UserError(f"fp8 with {bits} bits, expected 8: set quant.weight_bits and quant.activation_bits to 8")
    if formats != {"int"} and quant.recon.enabled:
        raise UserError(
            f"{(formats - {'int'}).pop()} with quant.recon.enabled, expected int: only integer grids are reconstructed"
        )
    if quant.budget is not None and quant.rounding != "compensated":
        raise UserError(
            "quant.budget is set with nearest rounding, expected compensated: set quant.rounding=compensated"
        )


def _lookup(config: RunConfig, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)
