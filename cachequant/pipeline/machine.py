"""What a measured time belongs to."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cachequant import __version__

PACKAGES = ("torch", "diffusers", "triton", "openvino", "DeepCache", "cache_dit", "torchao")
"""What a bench's rows run through, where it is installed."""
DRIVER = Path("/proc/driver/nvidia/version")


def machine_name(device: torch.device) -> str:
    """Name of the card, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def processor_name() -> str:
    """The processor's name as the system knows it, or its kind; `platform.processor` would start a program to ask."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str]:
    """Name -> version of everything that decides a measured time: packages that are there, Python, CUDA and its driver."""
    found = {"cachequant": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # names the build, which the package's metadata may not
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    driver = _driver()
    return found if driver is None else {**found, "driver": driver}


def _driver() -> str | None:
    """The NVIDIA driver's version as the kernel module tells it."""
    try:
        told = re.search(r"Module\s+(?:for \S+\s+)?([\d.]+)", DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return None
    return told.group(1) if told else None
