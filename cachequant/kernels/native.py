"""Builds the C++ operators of this folder once per machine, and says why where it cannot.

One compiler call against torch's own headers (no ninja, about twenty seconds), kept in a cache folder named by everything
that the result depends on. Without a compiler the package works on the plain torch operators of `cachequant.kernels.fused`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCES = tuple(Path(__file__).with_name(f"{name}.cpp") for name in ("fused", "attention", "winograd"))
HEADER = Path(__file__).with_name("vectors.h")
SWITCH = "CACHEQUANT_NATIVE"
"""Environment variable: 0 leaves the C++ operators out."""


@functools.cache
def load_native() -> str | None:
    """Make `torch.ops.cachequant.*` available, compiling them on the first call; None, or the reason why they are not."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    try:
        library = _library_path()
        if not library.is_file():
            _compile(library)
        torch.ops.load_library(str(library))
        importlib.import_module("cachequant.kernels.native_fakes")  # what the compiler sees of them
    except FileNotFoundError:
        return f"no C++ compiler {_compiler()!r} (install g++, or name one in CXX)"
    except subprocess.CalledProcessError as error:
        lines = [line for line in (error.stderr or "").splitlines() if "error" in line] or [str(error)]
        return f"{_compiler()} could not build them: {lines[0][:160]}"
    except OSError as error:
        return f"they could not be loaded: {str(error)[:160]}"
    return None


def _compiler() -> str:
    return os.environ.get("CXX", "c++" if sys.platform == "darwin" else "g++")


def _flags() -> list[str]:
    """What the library is built with; `-march=native` because it is built where it runs."""
    flags = ["-O3", "-std=c++20", "-fPIC", "-shared", "-fopenmp"]
    flags += ["-fno-math-errno", "-fno-trapping-math", "-fwrapv", "-Wno-psabi"]  # sums of winograd.cpp wrap
    if platform.machine() in ("x86_64", "AMD64"):
        return [*flags, "-march=native", "-mprefer-vector-width=512"]
    return [*flags, "-mcpu=native"]


def _library_path() -> Path:
    """Where the library of this source, compiler, torch and processor is or will be."""
    sources = [path.read_text(encoding="utf-8") for path in (*SOURCES, HEADER)]
    key = [*sources, _compiler(), *_flags(), torch.__version__, _processor()]
    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "cachequant" / f"fused-{digest}.so"


def _processor() -> str:
    """The processor's features, so that a shared home folder never serves code for another machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _compile(library: Path) -> None:
    """Build into a temporary name beside the final one and rename, so that two processes cannot meet half a file."""
    from torch.utils.cpp_extension import include_paths, library_paths

    library.parent.mkdir(parents=True, exist_ok=True)
    print("building the C++ operators (once per machine, about twenty seconds) …", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        includes = [f"-I{path}" for path in include_paths()]
        links = [*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu"]
        command = [_compiler(), *_flags(), *includes, *map(str, SOURCES), "-o", str(made), *links]
        subprocess.run(command, check=True, capture_output=True, text=True)
        made.replace(library)
